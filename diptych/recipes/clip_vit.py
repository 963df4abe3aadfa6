"""Image to prompt embedding: configuration and recipes.

A vision transformer learns to predict the sentence embedding of the prompt that an image was made from (384 dimensions
for all-MiniLM-L6-v2). Targets are text embeddings joined by key, as `diptych embed` writes them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic

from diptych.batches import EmbeddingNeed, ImageNeed, Needs
from diptych.config import Config, ConfigError, DataConfig, OptimConfig, RunConfig, TaskConfig, TrainConfig, ValidationConfig


class VisionArchitecture(Config):
    """Sizes of a CLIP vision tower of one's own, used where `task.model` is empty."""

    layers: int = pydantic.Field(6, ge=1)
    """Transformer blocks."""
    width: int = pydantic.Field(192, ge=8)
    """Width of the residual stream, in channels."""
    heads: int = pydantic.Field(6, ge=1)
    """Attention heads."""
    patch_size: int = pydantic.Field(8, ge=1)
    """Side of an image patch, in pixels."""


class ClipVitConfig(TaskConfig):
    """Vision transformer + linear projection to sentence embeddings."""

    name: ClassVar[str] = "clip_vit"

    library: Literal["clip", "timm"] = "clip"
    """`clip` = transformers' CLIP vision tower and its pooled output; `timm` = a timm model and its own head."""
    model: str = "openai/clip-vit-large-patch14"
    """clip: hub name or folder of a CLIP (image tower alone or whole), or empty = fresh, of `task.architecture`.
    timm: a model name with or without a tag (see `task.pretrained`), a hub name `org/name`, or a folder."""
    pretrained: bool = True
    """timm: take the published weights of `task.model`; false = fresh. Folders and hub names always bring theirs."""
    architecture: VisionArchitecture = VisionArchitecture()
    """Sizes of a fresh CLIP vision tower."""
    image_size: int = pydantic.Field(224, ge=8)
    """Side of the square input, in pixels; positions of pretrained weights are interpolated to it."""
    embed_dim: int | None = pydantic.Field(None, ge=1)
    """Dimension of the targets; empty = what the data has (384 for all-MiniLM-L6-v2)."""
    loss: Literal["cosine", "cosine_embedding"] = "cosine"
    """`cosine` = −mean cosine; `cosine_embedding` = mean of 1 − cosine, torch's `CosineEmbeddingLoss`. Gradients are the same."""
    unfreeze_from: int = pydantic.Field(0, ge=0)
    """First block that is trained, counted from 0; what lies before it keeps its weights. 0 trains all, embeddings included. The
    projection is always trained."""
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Dropout before the projection."""
    resize: Literal["center_crop", "random_crop", "pad", "squash"] = "center_crop"
    """How images reach the square input."""
    flip: float = pydantic.Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip. Prompts that name left and right need 0."""
    min_scale: float = pydantic.Field(1.0, gt=0, le=1)
    """Smallest share of the area that `random_crop` keeps."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> ClipVitConfig:
        if self.library == "timm" and not self.model:
            raise ConfigError("task.model", "", "a timm model name, a hub name or a folder", "Example: vit_large_patch16_224")
        if self.library == "clip" and not self.model:
            sizes = self.architecture
            if self.image_size % sizes.patch_size:
                raise ConfigError("task.image_size", self.image_size, f"a multiple of task.architecture.patch_size = {sizes.patch_size}")
            if sizes.width % sizes.heads:
                raise ConfigError("task.architecture.width", sizes.width, f"a multiple of task.architecture.heads = {sizes.heads}")
        return self

    def needs(self) -> Needs:
        """Images and the embeddings of their captions."""
        image = ImageNeed(self.image_size, resize=self.resize, flip=self.flip, min_scale=self.min_scale)
        return Needs(image=image, text_embedding=EmbeddingNeed(self.embed_dim))

    def resolve(self, facts: dict[str, Any]) -> ClipVitConfig:
        """With the dimension of the data, where `embed_dim` is empty."""
        if self.embed_dim is not None or facts.get("text_dim") is None:
            return self
        return self.model_copy(update={"embed_dim": facts["text_dim"]})

    def check_data(self, facts: dict[str, Any]) -> None:
        """Refuse shards without images and targets of another dimension."""
        if facts.get("images") == 0:
            raise ConfigError(
                "data.shards", "samples without images", "samples with images", "Check that the tars hold jpg, png or webp members."
            )
        found = facts.get("text_dim")
        if found is not None and self.embed_dim not in (None, found):
            raise ConfigError("task.embed_dim", self.embed_dim, f"{found}, the dimension of the text embeddings in data.embeddings")


def smoke() -> RunConfig:
    """A vision tower of 0.1 million parameters, for tests and first calls.

    Source: none. Command: diptych train clip_vit --recipe smoke data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: one CPU core, seconds. Expected: it runs; the loss falls.
    """
    sizes = VisionArchitecture(layers=2, width=32, heads=2, patch_size=8)
    return RunConfig(
        task=ClipVitConfig(model="", architecture=sizes, image_size=32),
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(steps=10, global_batch_size=8, precision="fp32", log_every=1),
        validation=ValidationConfig(samples=16),
    )


def scenes() -> RunConfig:
    """A vision tower of 1 million parameters on the demo's generated scenes with real sentence embeddings.

    Source: none; sized for a laptop. Command: diptych train clip_vit --recipe scenes data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: a minute of one CPU core. Expected: validation cosine at least 0.1 above that of the mean target.
    """
    sizes = VisionArchitecture(layers=4, width=128, heads=4, patch_size=8)
    return RunConfig(
        task=ClipVitConfig(model="", architecture=sizes, image_size=32),
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=50, schedule="cosine", min_lr=1e-6, clip_norm=1.0),
        train=TrainConfig(steps=400, global_batch_size=64, precision="fp32"),
        validation=ValidationConfig(every_steps=100, samples=300, batch_size=100),
    )


def image_to_prompt() -> RunConfig:
    """Fine-tune CLIP ViT-L/14's last blocks to predict the prompt's embedding.

    Source: the image-to-prompt project: CLIP's pooled output (1024) → linear → 384, −mean cosine, AdamW at 1e-4 with cosine
    annealing to 1e-6, training from block 21 on. Its dropout of 0.25 was declared and never used, so it is 0 here.
    Command: diptych train clip_vit --recipe image_to_prompt data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: one GPU of 16 GB. Expected: mean cosine well above that of always predicting the mean target.
    """
    return RunConfig(
        task=ClipVitConfig(embed_dim=384, unfreeze_from=21),
        optim=OptimConfig(lr=1e-4, schedule="cosine", min_lr=1e-6),
        train=TrainConfig(steps=20_000, global_batch_size=64, monitor="val/cosine", monitor_mode="max"),
        validation=ValidationConfig(every_steps=1_000, samples=4_096),
    )


def timm_vit() -> RunConfig:
    """The same with a timm ViT-L/16, training from block 18 on with `CosineEmbeddingLoss`.

    Source: the image-to-prompt project's second network.
    Command: diptych train clip_vit --recipe timm_vit data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: one GPU of 16 GB. Expected: mean cosine well above that of always predicting the mean target.
    """
    return RunConfig(
        task=ClipVitConfig(library="timm", model="vit_large_patch16_224", embed_dim=384, unfreeze_from=18, loss="cosine_embedding"),
        optim=OptimConfig(lr=1e-4, schedule="cosine", min_lr=1e-6),
        train=TrainConfig(steps=20_000, global_batch_size=64, monitor="val/cosine", monitor_mode="max"),
        validation=ValidationConfig(every_steps=1_000, samples=4_096),
    )
