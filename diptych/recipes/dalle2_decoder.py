"""The DALL-E 2 decoder: configuration and recipes.

A cascade of diffusion U-Nets turns a CLIP image embedding into a picture: the base makes a small one, upsamplers enlarge it
(Ramesh et al. 2022, arXiv:2204.06125, section 2.1). It learns from pictures and their embeddings. The model is dalle2-pytorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pydantic

from diptych.batches import CachedNeed, EmbeddingNeed, ImageNeed, Needs, TokenNeed
from diptych.config import (
    ConfigError,
    DataConfig,
    Flags,
    Integers,
    Numbers,
    OptimConfig,
    Paths,
    RunConfig,
    TaskConfig,
    TrainConfig,
    ValidationConfig,
    build,
)
from diptych.recipes._unets import UnetConfig

STAGES = ("base", "upsampler", "upsampler2")
"""Sections of the U-Nets, in order; as many are used as there are `task.image_sizes`."""
Schedule = Literal["cosine", "linear", "quadratic", "jsd", "sigmoid"]


class Dalle2DecoderConfig(TaskConfig):
    """dalle2-pytorch's `Decoder`: a base U-Net and upsamplers, on pictures and their image embeddings."""

    name: ClassVar[str] = "dalle2_decoder"

    pretrained: Paths = ()
    """Weights: empty = fresh; folders that `diptych export` wrote, checkpoints in dalle2-pytorch's layout, or on the hub `org/repo` or
    `org/repo/path/in/repo.pth`. Several may each hold some of the U-Nets. A `decoder_config.json` beside a single one gives the sizes."""
    image_embed_dim: int | None = pydantic.Field(None, ge=2)
    """Dimension of the image embeddings; empty = what the data has."""
    image_sizes: Integers = (64,)
    """Side of the picture that each U-Net makes, in pixels, ascending; their number says how many U-Nets there are."""
    base: UnetConfig = UnetConfig()
    """The first U-Net, conditioned on the embedding."""
    upsampler: UnetConfig = UnetConfig()
    """The second U-Net, conditioned on the picture before it."""
    upsampler2: UnetConfig = UnetConfig()
    """The third U-Net."""
    train_unets: Integers = ()
    """U-Nets that learn, from 1; empty = all. The others keep their weights, and their losses are not computed."""
    timesteps: int = pydantic.Field(1000, ge=2)
    """Diffusion timesteps."""
    beta_schedule: Paths = ()
    """Noise schedule of each U-Net (cosine, linear, quadratic, jsd, sigmoid); empty = cosine, and linear for the last upsampler."""
    loss_type: Literal["l1", "l2", "huber"] = "l2"
    """Distance between prediction and target."""
    predict_x_start: Flags = (False,)
    """Predict the picture, not the noise, in each U-Net; one value for all."""
    predict_v: Flags = (False,)
    """Predict the velocity, in each U-Net; takes precedence over `predict_x_start`."""
    learned_variance: Flags = (True,)
    """Learn the variance of a step too, in each U-Net; those beyond the last value do not."""
    learned_variance_constrain_frac: bool = False
    """Squash the learned variance between its bounds."""
    vb_loss_weight: float = pydantic.Field(0.001, ge=0)
    """Weight of the learned variance's loss."""
    p2_loss_weight_gamma: Numbers = (0.0,)
    """Exponent that turns the loss away from little noise, in each U-Net (arXiv:2204.00227); 0 = all timesteps count alike."""
    p2_loss_weight_k: float = pydantic.Field(1.0, gt=0)
    """Offset of that weighting."""
    image_cond_drop_prob: float = pydantic.Field(0.1, ge=0, lt=1)
    """Share of samples whose image embedding is withheld, for guidance."""
    text_cond_drop_prob: float = pydantic.Field(0.5, ge=0, lt=1)
    """Share of samples whose caption is withheld."""
    random_crop_sizes: Integers = ()
    """Side of the random crop that each U-Net learns from, in pixels; 0 = the whole picture. Empty = no crops."""
    use_blur_for_lowres_cond: Flags = (True,)
    """Blur the smaller picture that an upsampler enlarges, in each upsampler; one value for all."""
    blur_prob: float = pydantic.Field(0.5, ge=0, le=1)
    """Share of samples whose smaller picture is blurred."""
    blur_sigma: Numbers = (0.6,)
    """Standard deviation of the blur, in pixels; two values are the ends of a range drawn from."""
    blur_kernel_size: Integers = (3,)
    """Kernel of the blur, odd, in pixels; two values are the ends of a range drawn from."""
    use_noise_for_lowres_cond: Flags = (False,)
    """Add noise to the smaller picture and tell the upsampler how much, in each upsampler; one value for all."""
    lowres_noise_sample_level: float = pydantic.Field(0.2, ge=0, lt=1)
    """That noise when sampling, as a share of its 1000 levels."""
    lowres_downsample_first: bool = True
    """Shrink a training picture to the smaller size before it is blurred and enlarged."""
    use_dynamic_thres: bool = False
    """Clip predictions at a percentile, not at one (arXiv:2205.11487)."""
    dynamic_thres_percentile: float = pydantic.Field(0.95, gt=0, le=1)
    """That percentile, as a share."""
    sample_timesteps: Integers = (64,)
    """Denoising steps of a picture in each U-Net; one number for all. DDIM below `timesteps`."""
    ddim_sampling_eta: float = pydantic.Field(0.0, ge=0, le=1)
    """Fresh noise in each DDIM step; 0 = none."""
    cond_scale: Numbers = (1.0,)
    """Guidance of each U-Net when sampling; 1 = the conditional model alone."""
    text_tower: str = ""
    """CLIP whose text tower turns captions into token states: an open_clip NAME/TAG, a folder that `diptych export` wrote of a CoCa,
    or a Hugging Face CLIP by name or folder. Empty = cached states, where a U-Net attends to text."""
    tokenizer: str = "open_clip"
    """Tokenizer of `text_tower`: `open_clip`, a hub name, or a folder with a Hugging Face tokenizer."""
    text_length: int = pydantic.Field(77, ge=4)
    """Tokens of a caption."""
    text_embed_dim: int | None = pydantic.Field(None, ge=2)
    """Channels of the token states; empty = those of `text_tower`."""
    resize: Literal["center_crop", "random_crop", "pad", "squash"] = "center_crop"
    """How pictures reach the largest of `image_sizes`."""
    flip: float = pydantic.Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip. The embedding belongs to the picture as it is: 0 unless left and right do not matter."""
    min_scale: float = pydantic.Field(1.0, gt=0, le=1)
    """Smallest share of the area that `random_crop` keeps."""

    @property
    def unets(self) -> tuple[UnetConfig, ...]:
        """The sections that are used."""
        return tuple(getattr(self, name) for name in STAGES[: len(self.image_sizes)])

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers of the U-Nets that learn, from 1."""
        return self.train_unets or tuple(range(1, len(self.image_sizes) + 1))

    @property
    def reads_text(self) -> bool:
        """Whether a U-Net attends to token states."""
        return any(unet.cond_on_text_encodings for unet in self.unets)

    def of_stage(self, key: str, stage: int) -> Any:
        """The value of a per-U-Net key for U-Net `stage` (from 0): its own, or the one for all."""
        values: Sequence[Any] = getattr(self, key)
        return values[stage] if len(values) > 1 else values[0]

    @pydantic.model_validator(mode="after")
    def _check(self) -> Dalle2DecoderConfig:
        count, sizes = len(self.image_sizes), self.image_sizes
        if not 1 <= count <= len(STAGES) or list(sizes) != sorted(set(sizes)):
            raise ConfigError("task.image_sizes", sizes, f"1 to {len(STAGES)} different sizes, ascending")
        for key in ("predict_x_start", "predict_v", "p2_loss_weight_gamma", "sample_timesteps", "cond_scale"):
            _check_count(f"task.{key}", getattr(self, key), (1, count), "U-Nets")
        for key in ("beta_schedule", "random_crop_sizes"):
            _check_count(f"task.{key}", getattr(self, key), (0, count), "U-Nets")
        for key in ("use_blur_for_lowres_cond", "use_noise_for_lowres_cond"):
            _check_count(f"task.{key}", getattr(self, key), (1, max(1, count - 1)), "upsamplers")
        if len(self.learned_variance) > count:
            raise ConfigError("task.learned_variance", self.learned_variance, f"at most {count} values, one for each U-Net")
        for key in ("blur_sigma", "blur_kernel_size"):
            _check_count(f"task.{key}", getattr(self, key), (1, 2), "ends of a range")
        self._check_stages(count)
        return self

    def _check_stages(self, count: int) -> None:
        if not set(self.train_unets) <= set(range(1, count + 1)):
            raise ConfigError("task.train_unets", self.train_unets, f"numbers from 1 to {count}, the number of task.image_sizes")
        known = Schedule.__args__  # type: ignore[attr-defined]
        for schedule in self.beta_schedule:
            if schedule not in known:
                raise ConfigError("task.beta_schedule", schedule, ", ".join(known))
        if {"linear", "quadratic", "sigmoid"} & {*self.beta_schedule, *(["linear"] if count > 1 else [])} and self.timesteps <= 20:
            raise ConfigError("task.timesteps", self.timesteps, "more than 20 under a linear, quadratic or sigmoid schedule")
        for index, unet in enumerate(self.unets):
            side, factor = self.image_sizes[index], 2 ** (len(unet.dim_mults) - (0 if unet.memory_efficient else 1))
            if side % factor:
                raise ConfigError("task.image_sizes", self.image_sizes, f"multiples of {factor}, by which task.{STAGES[index]} shrinks")
            self._check_conditions(index, unet)
        for steps in self.sample_timesteps:
            if not 1 <= steps <= self.timesteps:
                raise ConfigError("task.sample_timesteps", steps, f"1 to task.timesteps = {self.timesteps}")
        if any(scale != 1 for scale in self.cond_scale) and not (self.image_cond_drop_prob or self.text_cond_drop_prob):
            raise ConfigError("task.cond_scale", self.cond_scale, "1 without condition dropout", "Set task.image_cond_drop_prob.")
        for kernel in self.blur_kernel_size:
            if kernel % 2 == 0:
                raise ConfigError("task.blur_kernel_size", self.blur_kernel_size, "odd numbers")

    def _check_conditions(self, index: int, unet: UnetConfig) -> None:
        stage = STAGES[index]
        if index == 0 and self.image_embed_dim == (unet.cond_dim or unet.dim):
            raise ConfigError(
                f"task.{stage}.cond_dim",
                self.image_embed_dim,
                "another number than the embedding's dimension",
                "dalle2-pytorch leaves the projection out where both are equal, and then every sample sees the embeddings of the batch.",
            )
        if index and not (self.of_stage("use_blur_for_lowres_cond", index - 1) or self.of_stage("use_noise_for_lowres_cond", index - 1)):
            raise ConfigError("task.use_blur_for_lowres_cond", False, "true unless task.use_noise_for_lowres_cond is true")
        if self.random_crop_sizes and index == 0 and self.random_crop_sizes[0]:
            raise ConfigError("task.random_crop_sizes", self.random_crop_sizes, "0 first: the base sees whole pictures")
        if self.random_crop_sizes and not 0 <= self.random_crop_sizes[index] <= self.image_sizes[index]:
            raise ConfigError("task.random_crop_sizes", self.random_crop_sizes, "at most task.image_sizes")

    def needs(self) -> Needs:
        """Pictures at the largest size and their embeddings; with text also token ids, or token states from a cache."""
        image = ImageNeed(self.image_sizes[-1], resize=self.resize, flip=self.flip, min_scale=self.min_scale)
        tokens = TokenNeed(self.tokenizer, self.text_length) if self.reads_text and self.text_tower else None
        cached = CachedNeed(("text_states",)) if self.reads_text and not self.text_tower else None
        return Needs(image=image, tokens=tokens, image_embedding=EmbeddingNeed(self.image_embed_dim), cached=cached)

    def resolve(self, facts: dict[str, Any]) -> Dalle2DecoderConfig:
        """With the dimensions of the data, where `image_embed_dim` and `text_embed_dim` are empty."""
        dims = {"image_embed_dim": facts.get("image_dim"), "text_embed_dim": (facts.get("text_states_shape") or (None,))[-1]}
        found = {key: dim for key, dim in dims.items() if getattr(self, key) is None and dim is not None}
        return build(Dalle2DecoderConfig, dict(self) | found, "task") if found else self

    def check_data(self, facts: dict[str, Any]) -> None:
        """Refuse shards without pictures, missing embeddings, and a dimension that differs from `image_embed_dim`."""
        if facts.get("images") == 0:
            raise ConfigError("data.shards", "samples without images", "samples with images", "Check that the tars hold jpg, png or webp.")
        dim = facts.get("image_dim")
        if dim is None:
            raise ConfigError(
                "data.embeddings", "no image embeddings", "a folder with img_emb", "`diptych embed SHARDS OUT` computes them."
            )
        if self.image_embed_dim not in (None, dim):
            raise ConfigError(
                "task.image_embed_dim",
                self.image_embed_dim,
                f"{dim}, the dimension of the embeddings",
                "Leave it empty to take what the data has.",
            )


def _check_count(key: str, values: Sequence[Any], allowed: tuple[int, int], of: str) -> None:
    if len(values) not in allowed:
        raise ConfigError(key, values, f"{allowed[0]} or {allowed[1]} values ({of})")


def smoke() -> RunConfig:
    """A base and an upsampler of 0.2 million parameters together, at 8 and 16 pixels, for tests and first calls.

    Source: none. Command: diptych train dalle2_decoder --recipe smoke data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: one CPU core, seconds. Expected: it runs; the loss falls.
    """
    unet = UnetConfig(
        dim=8, dim_mults=(1, 2), num_resnet_blocks=(1,), cond_dim=12, attn_heads=2, attn_dim_head=8, init_cross_embed_kernel_sizes=(3, 7)
    )
    return RunConfig(
        task=Dalle2DecoderConfig(
            image_sizes=(8, 16),
            base=unet,
            upsampler=unet.model_copy(update={"memory_efficient": True}),
            timesteps=100,
            sample_timesteps=(4,),
            use_noise_for_lowres_cond=(True,),
        ),
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, clip_norm=0.5, ema_decay=0.99),
        train=TrainConfig(steps=10, global_batch_size=8, precision="fp32", log_every=1),
        validation=ValidationConfig(samples=16),
    )


def scenes() -> RunConfig:
    """A base U-Net at 32 pixels on the demo's scenes and CoCa embeddings (96 dimensions).

    Source: none; sized for a laptop. Command: diptych train dalle2_decoder --recipe scenes data.shards=SHARDS
    data.embeddings=EMBEDDINGS workers=2
    Hardware: 2 CPU cores with AMX, 19 minutes of processor time. Expected (benchmarks/pictures_dalle2.py): a captioner trained apart matches
    94 % of pictures of held-out captions to their caption, 1 of 100.
    """
    # Blocks work at half the resolution and below: at full resolution a CPU spends its time on memory.
    unet = UnetConfig(
        dim=16,
        dim_mults=(2, 4),
        num_resnet_blocks=(1,),
        resnet_groups=(4,),
        cond_dim=64,
        attn_heads=4,
        attn_dim_head=16,
        memory_efficient=True,
        init_cross_embed_kernel_sizes=(3, 7),
    )
    return RunConfig(
        task=Dalle2DecoderConfig(
            image_sizes=(32,),
            base=unet,
            predict_v=(True,),
            learned_variance=(False,),
            sample_timesteps=(32,),
            cond_scale=(2.0,),
        ),
        workers=2,
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(
            name="muon", lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, schedule="cosine", clip_norm=0.5, ema_decay=0.995
        ),
        train=TrainConfig(steps=2_000, global_batch_size=32),
        validation=ValidationConfig(every_steps=500, samples=200, batch_size=200),
    )


def base() -> RunConfig:
    """A base and an upsampler for embeddings of one's own, 64 then 128 pixels.

    Source: dalle2-pytorch's defaults (lr 1e-4, weight decay 0.01, clipping 0.5, EMA 0.999; betas 0.9 and 0.99) on U-Nets of the
    size of its example configuration. Command: diptych train dalle2_decoder --recipe base data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: one GPU of 24 GB. Expected: `val/unet1` and `val/unet2` fall until the data is learned by heart.
    """
    upsampler = UnetConfig(dim=64, dim_mults=(1, 2, 4, 8), cond_dim=128, memory_efficient=True)
    return RunConfig(
        task=Dalle2DecoderConfig(
            image_sizes=(64, 128), base=UnetConfig(dim=128, dim_mults=(1, 2, 4, 8), cond_dim=128), upsampler=upsampler
        ),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, clip_norm=0.5, ema_decay=0.999),
        train=TrainConfig(steps=100_000, global_batch_size=64),
        validation=ValidationConfig(every_steps=5_000, samples=1_024),
    )


def published() -> RunConfig:
    """Fine-tune LAION's published base decoder for CLIP ViT-L/14 embeddings (768 dimensions), 64 pixels.

    Source: hub laion/DALLE2-PyTorch, decoder/v1.0.2/latest.pth, and its decoder_config.json (dim 320, four stages, four blocks each,
    captions' token states). It was trained with both conditions; captions come from CLIP's own text tower.
    Command: diptych train dalle2_decoder --recipe published data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: one GPU of 40 GB. Expected: `val/unet1` does not rise above that of the published weights.
    """
    unet = UnetConfig(
        dim=320,
        dim_mults=(1, 2, 3, 4),
        num_resnet_blocks=(4,),
        cond_dim=512,
        cond_on_text_encodings=True,
        self_attn=(False, True, True, True),
        sparse_attn=True,
        attn_heads=8,
        attn_dim_head=64,
        memory_efficient=True,
    )
    return RunConfig(
        task=Dalle2DecoderConfig(
            pretrained=("laion/DALLE2-PyTorch/decoder/v1.0.2/latest.pth",),
            image_embed_dim=768,
            image_sizes=(64,),
            base=unet,
            text_tower="ViT-L-14/openai",
            text_embed_dim=768,
        ),
        optim=OptimConfig(lr=1e-5, betas=(0.9, 0.99), weight_decay=0.01, clip_norm=0.5, ema_decay=0.999),
        train=TrainConfig(steps=20_000, global_batch_size=64, gradient_checkpointing=True),
        validation=ValidationConfig(every_steps=1_000, samples=2_048),
    )
