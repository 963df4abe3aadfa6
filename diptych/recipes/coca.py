"""CoCa (contrastive captioner): configuration and recipes.

An image tower, a text tower and a caption decoder learn from captioned images by two losses: image and text features
of the same sample must match among the global batch, and the decoder must predict the caption. Model and losses are
open_clip's (Yu et al. 2022, arXiv:2205.01917).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic

from diptych.batches import ImageNeed, Needs, TokenNeed
from diptych.config import Config, ConfigError, DataConfig, OptimConfig, RunConfig, TaskConfig, TrainConfig, ValidationConfig


class CocaArchitecture(Config):
    """Sizes of a CoCa of one's own, used when `task.model=custom`."""

    width: int = pydantic.Field(96, ge=8)
    """Width of the text tower and the decoder, and dimension of the features, in channels."""
    heads: int = pydantic.Field(4, ge=1)
    """Attention heads of every tower and of the poolers."""
    patch_size: int = pydantic.Field(8, ge=1)
    """Side of an image patch, in pixels."""
    image_width: int = pydantic.Field(96, ge=8)
    """Width of the image tower, in channels."""
    image_layers: int = pydantic.Field(3, ge=1)
    """Blocks of the image tower."""
    text_layers: int = pydantic.Field(2, ge=1)
    """Blocks of the text tower."""
    decoder_layers: int = pydantic.Field(2, ge=1)
    """Blocks of the caption decoder; each also attends to the image."""
    image_queries: int = pydantic.Field(0, ge=0)
    """Tokens that the image is pooled to: the first is its feature, the decoder attends to the others. 0 = no pooling: the
    decoder attends to the patches themselves, and `image_width` must equal `width`."""


class CocaConfig(TaskConfig):
    """open_clip's CoCa: contrastive and caption loss on captioned images."""

    name: ClassVar[str] = "coca"

    model: str = "coca_ViT-L-14"
    """An open_clip architecture with a caption decoder (`coca_ViT-B-32`, `coca_ViT-L-14`, …) or `custom` (see `task.architecture`)."""
    architecture: CocaArchitecture = CocaArchitecture()
    """Sizes for `task.model=custom`."""
    pretrained: str = ""
    """Weights: empty = fresh; an open_clip tag such as `laion2b_s13b_b90k`; a hub name `org/repo`; a local folder with
    `open_clip_config.json` (which then also gives the architecture); or a weights file."""
    tokenizer: str = "open_clip"
    """`open_clip` (its BPE of 49,408), a hub name, a folder with a Hugging Face tokenizer, or `train:<vocabulary size>`
    to train one on the run's captions first."""
    image_size: int = pydantic.Field(224, ge=8)
    """Side of the square input, in pixels; positions of pretrained weights are interpolated to it."""
    context_length: int = pydantic.Field(76, ge=4)
    """Tokens of a caption, start and end tokens included."""
    caption_weight: float = pydantic.Field(2.0, ge=0)
    """Weight of the caption loss."""
    contrastive_weight: float = pydantic.Field(1.0, ge=0)
    """Weight of the contrastive loss; 0 leaves it out, and what only it trains is frozen."""
    resize: Literal["center_crop", "random_crop", "pad", "squash"] = "center_crop"
    """How images reach the square input."""
    flip: float = pydantic.Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip. Captions that name left and right need 0."""
    min_scale: float = pydantic.Field(1.0, gt=0, le=1)
    """Smallest share of the area that `random_crop` keeps."""
    freeze_image: bool = False
    """Train text tower and decoder only; the image tower keeps its weights."""
    freeze_text: bool = False
    """The text tower keeps its weights; image tower and decoder train."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> CocaConfig:
        if self.caption_weight == 0 and self.contrastive_weight == 0:
            raise ConfigError("task.caption_weight", 0, "above 0 where task.contrastive_weight is 0", "Nothing would be learned.")
        if self.tokenizer.startswith("train:") and not self.tokenizer.removeprefix("train:").isdigit():
            raise ConfigError("task.tokenizer", self.tokenizer, "train:<vocabulary size>", "Example: train:1024")
        if self.tokenizer.startswith("train:") and self.model != "custom":
            raise ConfigError(
                "task.tokenizer",
                self.tokenizer,
                f"open_clip or the folder that belongs to task.model={self.model}",
                "A tokenizer of one's own needs task.model=custom.",
            )
        if self.model == "custom":
            self._check_architecture()
        return self

    def _check_architecture(self) -> None:
        sizes = self.architecture
        if self.image_size % sizes.patch_size:
            raise ConfigError("task.image_size", self.image_size, f"a multiple of task.architecture.patch_size = {sizes.patch_size}")
        for key in ("width", "image_width"):
            if getattr(sizes, key) % sizes.heads:
                raise ConfigError(f"task.architecture.{key}", getattr(sizes, key), f"a multiple of task.architecture.heads = {sizes.heads}")
        if sizes.image_queries == 1:
            raise ConfigError(
                "task.architecture.image_queries", 1, "0 or at least 2", "The first is the image's feature, the decoder needs others."
            )
        if sizes.image_queries == 0 and sizes.image_width != sizes.width:
            remedy = "Without pooling the decoder attends to the patches; set task.architecture.image_queries to pool them."
            raise ConfigError("task.architecture.image_width", sizes.image_width, f"task.architecture.width = {sizes.width}", remedy)

    def needs(self) -> Needs:
        """Images and token ids of their captions."""
        image = ImageNeed(self.image_size, resize=self.resize, flip=self.flip, min_scale=self.min_scale)
        return Needs(image=image, tokens=TokenNeed(self.tokenizer, self.context_length))

    def check_data(self, facts: dict[str, Any]) -> None:
        """Refuse shards without images or captions."""
        for what, remedy in (
            ("images", "Check that the tars hold jpg, png or webp members."),
            ("captions", "Captions are `txt` members: `diptych pack` writes them."),
        ):
            if facts.get(what) == 0:
                raise ConfigError("data.shards", f"samples without {what}", f"samples with {what}", remedy)


def smoke() -> RunConfig:
    """A CoCa of 81 thousand parameters, for tests and first calls.

    Source: none. Command: diptych train coca --recipe smoke data.shards=SHARDS
    Hardware: one CPU core, seconds. Expected: it runs; the loss falls.
    """
    sizes = CocaArchitecture(
        width=32, heads=2, patch_size=8, image_width=32, image_layers=1, text_layers=1, decoder_layers=1, image_queries=5
    )
    return RunConfig(
        task=CocaConfig(model="custom", architecture=sizes, tokenizer="train:256", image_size=16, context_length=16),
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(steps=10, global_batch_size=8, precision="fp32", log_every=1),
        validation=ValidationConfig(samples=16),
    )


def demo() -> RunConfig:
    """A CoCa of 1.1 million parameters on the demo's generated scenes.

    Source: none; sized for a laptop, tuned on the scenes. Command: diptych demo, or
    diptych train coca --recipe demo data.shards=SHARDS workers=2
    Hardware: 2 CPU cores, less than 2 minutes. Expected: retrieval R@1 of 200 held-out scenes at least 0.7 (0.97 was seen),
    colour and shape of the first object right in at least half of the captions (nine in ten were).
    """
    return RunConfig(
        task=CocaConfig(model="custom", tokenizer="train:256", image_size=32, context_length=16),
        workers=2,
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(name="muon", lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=20, schedule="cosine", clip_norm=1.0),
        # At this width bf16 takes 2.5 times as long as fp32, with AMX too: what is converted costs more than what is multiplied.
        train=TrainConfig(steps=500, global_batch_size=64, precision="fp32"),
        validation=ValidationConfig(every_steps=125, samples=200, batch_size=200),
    )


def scenes() -> RunConfig:
    """A CoCa of 1.3 million parameters that says in words what a generated scene shows.

    Source: none; tuned on scenes of `diptych.datasets.scenes`, whose pictures have exactly one right caption each.
    Command: diptych train coca --recipe scenes data.shards=SHARDS
    Hardware: 2 CPU cores, 7 minutes. Expected, a goal that benchmarks/coca.py checks: exact match of greedy captions at least 0.6 on
    held-out scenes; 0.99 was seen, where AdamW had reached 0.40 in as many steps.
    """
    return RunConfig(
        task=CocaConfig(
            model="custom", architecture=CocaArchitecture(image_layers=4), tokenizer="train:256", image_size=64, context_length=18
        ),
        data=DataConfig(validation_share=0.05),
        optim=OptimConfig(name="muon", lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=50, schedule="cosine", clip_norm=1.0),
        train=TrainConfig(steps=1500, global_batch_size=64, precision="fp32"),
        validation=ValidationConfig(every_steps=250, samples=500, batch_size=100),
    )


def image_to_prompt() -> RunConfig:
    """Fine-tune CoCa ViT-L/14 to write the prompt of a generated image.

    Source: the image-to-prompt project's open_clip call (caption weight 1, contrastive weight 0, lr 1e-5, weight decay
    0.1, warm-up 10,000 steps, batch 16). Command: diptych train coca --recipe image_to_prompt data.shards=SHARDS
    Hardware: one GPU of 24 GB. Expected: caption token accuracy above that of the published weights on the prompts.
    """
    return RunConfig(
        task=CocaConfig(pretrained="laion2b_s13b_b90k", caption_weight=1.0, contrastive_weight=0.0),
        optim=OptimConfig(lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, warmup_steps=10_000, schedule="cosine"),
        train=TrainConfig(steps=100_000, global_batch_size=16, gradient_checkpointing=True),
        validation=ValidationConfig(every_steps=2_000, samples=2_000),
    )
