"""Stable Diffusion 1.x and 2.x: configuration and recipes.

A U-Net learns to denoise the latents of pictures, told by the states of their captions (Rombach et al. 2022, arXiv:2112.10752). The parts are
diffusers': fine-tuned from a pipeline's folder or hub name, whole or through LoRA, or built small and trained from scratch.
"""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar, Literal

import pydantic

from diptych import provenance
from diptych.batches import AspectBuckets, CachedNeed, ImageNeed, Needs, TokenNeed
from diptych.config import (
    Config,
    ConfigError,
    DataConfig,
    Integers,
    OptimConfig,
    Paths,
    RunConfig,
    TaskConfig,
    TrainConfig,
    ValidationConfig,
)


class SdArchitecture(Config):
    """Sizes of a model of one's own, used without `task.pretrained`."""

    channels: Integers = (64, 128)
    """Channels of each level of the U-Net, from the finest."""
    layers: int = pydantic.Field(2, ge=1)
    """Residual blocks of each level."""
    heads: int = pydantic.Field(4, ge=1)
    """Attention heads of each level."""
    vae_channels: Integers = (32, 64, 64)
    """Channels of each level of the VAE; n levels make latents of 1 / 2^(n-1) of the picture's side."""
    vae_layers: int = pydantic.Field(1, ge=1)
    """Residual blocks of each level of the VAE."""
    latent_channels: int = pydantic.Field(4, ge=1)
    """Channels of the latents."""
    text_width: int = pydantic.Field(96, ge=8)
    """Width of the text encoder."""
    text_layers: int = pydantic.Field(2, ge=1)
    """Blocks of the text encoder."""
    text_heads: int = pydantic.Field(4, ge=1)
    """Attention heads of the text encoder."""


class LoraConfig(Config):
    """Low-rank adapters, used with `task.train=lora` (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = pydantic.Field(4, ge=1)
    """Rank of the adapters."""
    alpha: float = pydantic.Field(0.0, ge=0)
    """Scale of the adapters, over the rank; 0 = the rank, a scale of one."""
    targets: Paths = ("to_k", "to_q", "to_v", "to_out.0")
    """Names of the U-Net's modules that get an adapter."""
    text_targets: Paths = ()
    """Names of the text encoder's modules that get one, such as q_proj,k_proj,v_proj,out_proj; empty = none."""
    start: str = ""
    """A `pytorch_lora_weights.safetensors`, or a folder that holds one, to go on from; its rank must be `rank`."""


class StableDiffusionConfig(TaskConfig):
    """diffusers' Stable Diffusion on captioned images, or on their cached latents and text states."""

    name: ClassVar[str] = "stable_diffusion"

    pretrained: str = ""
    """A pipeline of the layout of SD 1.x or 2.x (unet, vae, text_encoder, tokenizer, scheduler): its folder or its hub name; empty = fresh."""
    pretrained_identity: str = ""
    """What `pretrained` was when the run was made (filled in); frozen weights are not in checkpoints, so a run refuses others."""
    architecture: SdArchitecture = SdArchitecture()
    """Sizes for an empty `task.pretrained`."""
    vae: str = ""
    """Another VAE: its folder or hub name, or an exported run of `train=vae`; empty = the pipeline's, or a fresh one."""
    vae_identity: str = ""
    """What `vae` was when the run was made (filled in)."""
    train: Literal["unet", "unet_text", "lora", "vae"] = "unet"
    """What learns: the U-Net, the U-Net and the text encoder, adapters on a frozen model, or the VAE alone (pictures, no captions)."""
    lora: LoraConfig = LoraConfig()
    """Adapters, for `train=lora`."""
    tokenizer: str = ""
    """Empty = the pipeline's; a folder or hub name; or `train:<vocabulary size>` to train one on the run's captions (fresh models only)."""
    context_length: int = pydantic.Field(77, ge=4)
    """Tokens of a caption, start, end and padding included."""
    image_size: int = pydantic.Field(512, ge=8)
    """Side of the square picture, in pixels; a multiple of what the VAE and the U-Net divide by."""
    aspect_buckets: bool = False
    """Each picture is resized and cropped to the nearest in aspect of several shapes of at most `image_size`² pixels, not to the square."""
    bucket_reso_steps: int = pydantic.Field(64, ge=1)
    """Sides of the shapes, and `image_size`, are multiples of this, in pixels, itself one of what the VAE and the U-Net divide by."""
    max_aspect: float = pydantic.Field(2.0, ge=1)
    """Longer side of a shape over its shorter one, at most."""
    resize: Literal["center_crop", "random_crop", "pad", "squash"] = "center_crop"
    """How images reach the shape of the input."""
    flip: float = pydantic.Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip. Captions that name left and right need 0."""
    min_scale: float = pydantic.Field(1.0, gt=0, le=1)
    """Smallest share of the area that `random_crop` keeps."""
    cached: Paths = ()
    """What is read from `data.caches` instead of computed: latents, text-states, or both separated by a comma."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the U-Net predicts; `auto` = what its scheduler says (epsilon for fresh models)."""
    snr_gamma: float = pydantic.Field(0.0, ge=0)
    """Min-SNR weighting of timesteps (arXiv:2303.09556), 5 as published; 0 = none."""
    noise_offset: float = pydantic.Field(0.0, ge=0)
    """Noise added to whole channels, so that dark and bright pictures can be learned; 0.1 is common."""
    input_perturbation: float = pydantic.Field(0.0, ge=0)
    """Noise added to the noise of the input but not to the target (arXiv:2301.11706), 0.1 as published."""
    caption_drop: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of samples that see the empty caption, for guidance; 0.1 is common for models trained from scratch."""
    kl_weight: float = pydantic.Field(1e-5, ge=0)
    """Weight of the divergence of the latents from normal, for `train=vae`."""
    show_prompts: tuple[str, ...] = ()
    """Prompts of the validation's pictures, as a JSON list; empty = the first held-out captions."""
    show_count: int = pydantic.Field(4, ge=0)
    """Prompts (rows) and seeds (columns) of the validation's grids; 0 = no pictures."""
    show_steps: int = pydantic.Field(25, ge=1)
    """Denoising steps of the validation's pictures."""
    show_guidance: float = pydantic.Field(7.5, ge=1)
    """Guidance of the validation's pictures, and of others that name none."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention of the U-Net: torch's fused one, or plain matrix products."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> StableDiffusionConfig:
        self._check_start()
        unknown = sorted(set(self.cached) - {"latents", "text-states"})
        if unknown:
            raise ConfigError("task.cached", ",".join(self.cached), "latents, text-states, or both")
        if "text-states" in self.cached and (self.train == "unet_text" or self.lora.text_targets):
            raise ConfigError("task.cached", "text-states", "latents where the text encoder learns", "Its states change with every step.")
        if "latents" in self.cached and self.train == "vae":
            raise ConfigError("task.cached", "latents", "nothing under task.train=vae", "The VAE learns from pictures.")
        if self.cached and not self.pretrained and "text-states" in self.cached:
            raise ConfigError("task.cached", "text-states", "latents where the text encoder is fresh", "Set task.pretrained.")
        if "latents" in self.cached and not (self.pretrained or self.vae):
            raise ConfigError("task.cached", "latents", "a VAE that has learned", "Set task.pretrained or task.vae.")
        if self.aspect_buckets and self.train == "vae":
            raise ConfigError("task.aspect_buckets", True, "false under task.train=vae", "Crops of any size teach a VAE all shapes.")
        if self.aspect_buckets and self.image_size % self.bucket_reso_steps:
            raise ConfigError("task.bucket_reso_steps", self.bucket_reso_steps, f"a divisor of task.image_size = {self.image_size}")
        if self.shape_buckets and len(self.shape_buckets.shapes) == 1:
            remedy = "Raise it or task.image_size, or lower task.bucket_reso_steps."
            raise ConfigError("task.max_aspect", self.max_aspect, "an aspect that leaves more shapes than the square", remedy)
        return self

    def _check_start(self) -> None:
        if not self.pretrained:
            if self.train == "lora":
                raise ConfigError("task.train", "lora", "unet, unet_text or vae without task.pretrained", "Adapters need weights to adapt.")
            spec = self.tokenizer
            if self.train != "vae" and (not spec or (spec.startswith("train:") and not spec.removeprefix("train:").isdigit())):
                raise ConfigError(
                    "task.tokenizer", spec, "train:<vocabulary size>, a folder or a hub name for a fresh model", "Example: train:256"
                )
            multiple = self.vae_factor * 2 ** (len(self.architecture.channels) - 1)
            self.check_multiple(multiple)
        elif self.tokenizer.startswith("train:"):
            raise ConfigError("task.tokenizer", self.tokenizer, "the tokenizer of task.pretrained", "Leave it empty.")
        for key in ("channels", "vae_channels"):
            if not all(width > 0 and width % 8 == 0 for width in getattr(self.architecture, key)):
                raise ConfigError(f"task.architecture.{key}", list(getattr(self.architecture, key)), "multiples of 8")
        if self.architecture.text_width % self.architecture.text_heads:
            raise ConfigError("task.architecture.text_width", self.architecture.text_width, "a multiple of task.architecture.text_heads")
        if any(width % self.architecture.heads for width in self.architecture.channels):
            raise ConfigError("task.architecture.heads", self.architecture.heads, "a divisor of each of task.architecture.channels")

    def check_multiple(self, multiple: int) -> None:
        """Refuse sides that are no multiples of the pixels by which VAE and U-Net divide them."""
        if self.image_size % multiple:
            raise ConfigError("task.image_size", self.image_size, f"a multiple of {multiple} for this VAE and U-Net")
        if self.aspect_buckets and self.bucket_reso_steps % multiple:
            raise ConfigError("task.bucket_reso_steps", self.bucket_reso_steps, f"a multiple of {multiple} for this VAE and U-Net")

    @property
    def shape_buckets(self) -> AspectBuckets | None:
        """The shapes that `aspect_buckets` asks for."""
        return AspectBuckets.of(self.image_size, self.bucket_reso_steps, self.max_aspect) if self.aspect_buckets else None

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along a side, of a fresh VAE."""
        return int(math.pow(2, len(self.architecture.vae_channels) - 1))

    @property
    def vae_source(self) -> str:
        """Where the VAE comes from; empty = fresh."""
        return provenance.component(self.vae, "vae") if self.vae else self.pretrained and provenance.component(self.pretrained, "vae")

    @property
    def tokenizer_source(self) -> str:
        """The tokenizer by name, as `batches.TokenNeed` takes it."""
        inside = provenance.component(self.pretrained, "tokenizer")
        # On the hub it is a folder of the pipeline's repository.
        return self.tokenizer or (inside if os.path.isdir(inside) else f"{self.pretrained}/tokenizer")

    def needs(self) -> Needs:
        """Pictures or their latents, and token ids of the captions or the states of the text encoder."""
        image = ImageNeed(self.image_size, resize=self.resize, flip=self.flip, min_scale=self.min_scale, buckets=self.shape_buckets)
        if self.train == "vae":
            return Needs(image=image)
        keys: tuple[str, ...] = ()
        expected: dict[str, dict[str, Any]] = {}
        if "latents" in self.cached:
            keys += ("latent_mean", "latent_logvar", *(("bucket",) if self.aspect_buckets else ()))
            model = self.vae or self.pretrained
            expected["latents"] = provenance.latents(model, self.image_size, self.resize, self.min_scale, self.shape_buckets)
        if "text-states" in self.cached:
            keys += ("text_states",)
            expected["text-states"] = provenance.text_states(self.pretrained)
        return Needs(
            image=None if "latents" in self.cached else image,
            tokens=None if "text-states" in self.cached else TokenNeed(self.tokenizer_source, self.context_length),
            cached=CachedNeed(keys, flip=self.flip if "latents" in self.cached else 0.0, expected=expected) if keys else None,
        )

    def resolve(self, facts: dict[str, Any]) -> StableDiffusionConfig:
        """With the identities of the weights that the run starts from."""
        found = {
            key: provenance.model_identity(value)
            for key, value in (("pretrained_identity", self.pretrained), ("vae_identity", self.vae))
            if value and not getattr(self, key)
        }
        return self.model_copy(update=found)

    def check_data(self, facts: dict[str, Any]) -> None:
        """Refuse shards without images or captions."""
        wanted = {"images": "Check that the tars hold jpg, png or webp members.", "captions": "Captions are `txt` members: `diptych pack`."}
        for what, remedy in wanted.items():
            if facts.get(what) == 0 and not (what == "captions" and self.train == "vae"):
                raise ConfigError("data.shards", f"samples without {what}", f"samples with {what}", remedy)


def smoke() -> RunConfig:
    """A model of a hundred thousand parameters with a VAE of random weights, for tests and first calls.

    Source: none. Command: diptych train stable_diffusion --recipe smoke data.shards=SHARDS
    Hardware: one CPU core, seconds. Expected: it runs; the loss falls.
    """
    sizes = SdArchitecture(
        channels=(16, 32), layers=1, heads=2, vae_channels=(8, 16), latent_channels=4, text_width=16, text_layers=1, text_heads=2
    )
    return RunConfig(
        task=StableDiffusionConfig(
            architecture=sizes,
            train="unet_text",
            tokenizer="train:256",
            context_length=16,
            image_size=16,
            caption_drop=0.1,
            snr_gamma=5.0,
            show_count=2,
            show_steps=2,
        ),
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(lr=1e-3, ema_decay=0.99),
        train=TrainConfig(steps=10, global_batch_size=8, precision="fp32", log_every=1),
        validation=ValidationConfig(samples=16),
    )


_SCENES = SdArchitecture(channels=(64, 128), layers=1, vae_channels=(16, 32, 64), latent_channels=8)


def scenes_vae() -> RunConfig:
    """A VAE of 0.65 million parameters for pictures of 32 pixels, latents of 8 × 8 × 8: the first half of `scenes`.

    Source: none; sized for a laptop. Command: diptych train stable_diffusion --recipe scenes_vae data.shards=SHARDS name=vae, then
    diptych export vae exported/vae
    Hardware: 2 CPU cores with AMX, 4 minutes of processor time. Expected: a held-out reconstruction error of about 0.025; look at the pictures beside
    their reconstructions.
    """
    return RunConfig(
        task=StableDiffusionConfig(train="vae", architecture=_SCENES, image_size=32),
        data=DataConfig(validation_share=0.05),
        optim=OptimConfig(name="muon", lr=5e-3, warmup_steps=20, schedule="cosine", clip_norm=1.0, weight_decay=0.0),
        train=TrainConfig(steps=600, global_batch_size=32),
        validation=ValidationConfig(samples=64),
    )


def scenes() -> RunConfig:
    """A text-to-image model of 4.5 million parameters that learns the demo's scenes from scratch, on the VAE of `scenes_vae`.

    Source: none; sized for a laptop. Command: diptych train stable_diffusion --recipe scenes data.shards=SHARDS task.vae=exported/vae
    Hardware: 2 CPU cores with AMX, 26 minutes of processor time with its VAE. Expected (benchmarks/pictures_sd.py): a captioner trained apart
    matches 98 % of pictures of held-out captions to their caption, 1 of 100; the least that counts is 20 times chance.
    """
    return RunConfig(
        task=StableDiffusionConfig(
            train="unet_text",
            architecture=_SCENES,
            tokenizer="train:256",
            context_length=20,
            image_size=32,
            prediction="v_prediction",
            # On CPUs the backward pass of the fused attention takes longer than all the rest.
            attention="eager",
            caption_drop=0.1,
            show_steps=20,
            show_guidance=3.0,
        ),
        data=DataConfig(validation_share=0.05),
        optim=OptimConfig(name="muon", lr=3e-3, warmup_steps=50, schedule="cosine", clip_norm=1.0, ema_decay=0.99),
        train=TrainConfig(steps=1_500, global_batch_size=64, log_every=25),
        validation=ValidationConfig(every_steps=250, samples=128, batch_size=64),
    )


def lora_reports() -> RunConfig:
    """LoRA on SD v1-4, for pictures that go with short reports.

    Source: the text-to-image project on reports, through diffusers' LoRA script: resolution 128, random flip, batch 1, lr 1e-4 constant, rank 4,
    fp16, seed 42; 30 steps at guidance 7.5 to look at. Its 3 epochs are `train.steps` here: three times the samples.
    Command: diptych train stable_diffusion --recipe lora_reports data.shards=SHARDS
    Hardware: one GPU of 8 GB. Expected: pictures in the manner of the training set; CLIP score above the base's.
    """
    return RunConfig(
        task=StableDiffusionConfig(
            pretrained="CompVis/stable-diffusion-v1-4", train="lora", image_size=128, flip=0.5, show_steps=30, show_guidance=7.5
        ),
        seed=42,
        optim=OptimConfig(lr=1e-4, weight_decay=1e-2, clip_norm=1.0),
        train=TrainConfig(steps=3_000, global_batch_size=1, precision="fp16"),
        validation=ValidationConfig(every_steps=500, samples=64, batch_size=8),
    )


def thumbs_up() -> RunConfig:
    """Fine-tune the whole U-Net of SD v1-5 on a hundred pictures of one gesture.

    Source: the thumbs-up project, through diffusers' script: resolution 512, centre crop, random flip, batch 1 × accumulation 4, gradient
    checkpointing, fp16, EMA, lr 1e-5 (its grid: 1e-5 and 1e-3, 400 to 8,000 steps; 1e-3 diverged).
    Command: diptych train stable_diffusion --recipe thumbs_up data.shards=SHARDS
    Hardware: one GPU of 24 GB. Expected: the gesture in the pictures of prompts with the trigger words, from 400 steps on.
    """
    return RunConfig(
        task=StableDiffusionConfig(
            pretrained="stable-diffusion-v1-5/stable-diffusion-v1-5", train="unet", image_size=512, flip=0.5, show_count=5, show_steps=30
        ),
        optim=OptimConfig(lr=1e-5, weight_decay=1e-2, clip_norm=1.0, ema_decay=0.9999),
        train=TrainConfig(steps=2_000, global_batch_size=4, micro_batches=4, precision="fp16", gradient_checkpointing=True),
        validation=ValidationConfig(every_steps=400, samples=32),
    )
