"""The parts of Stable Diffusion: from a pipeline of diffusers' layout, or built small with fresh weights; checked to belong together.

Source: diffusers (UNet2DConditionModel, AutoencoderKL, schedulers) and transformers (CLIPTextModel).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from diptych import provenance
from diptych.config import ConfigError
from diptych.recipes.stable_diffusion import StableDiffusionConfig
from diptych.vocabulary import Vocabulary

_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "_class_name": "DDIMScheduler",
}
"""Stable Diffusion's own noise schedule, for fresh models."""


@dataclass
class SdParts:
    """What a run holds. Under `train=vae` there is a VAE alone, and the others are None."""

    vae: AutoencoderKL
    unet: Any
    """UNet2DConditionModel"""
    text_encoder: Any
    """CLIPTextModel"""
    scheduler: dict[str, Any]
    """The scheduler's configuration as the pipeline has it, with its class and with what the U-Net predicts."""

    @property
    def noise_schedule(self) -> DDPMScheduler:
        """What training adds noise with."""
        return DDPMScheduler.from_config({key: value for key, value in self.scheduler.items() if key != "_class_name"})


def build_parts(config: StableDiffusionConfig, vocabulary: Vocabulary | None, seed: int) -> SdParts:
    """Load or make the parts that `config` asks for; fresh weights are a function of `seed`.

    Raises `ConfigError` where weights are missing, are not finite, are others than the run began with, or do not belong together.
    """
    for key, source in (("pretrained", config.pretrained), ("vae", config.vae)):
        known = getattr(config, f"{key}_identity")
        if source and known and provenance.model_identity(source) != known:
            raise ConfigError(f"task.{key}", source, f"the weights that the run began with ({known[:19]}…)", "The folder holds others now.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Each part has its own stream, so that another VAE leaves the U-Net's fresh weights as they were.
        vae = _pretrained(AutoencoderKL, config.vae or config.pretrained, "vae") if config.vae_source else _fresh_vae(config)
        if config.train == "vae":
            return SdParts(vae, None, None, dict(_SCHEDULE))
        assert vocabulary is not None
        torch.manual_seed(seed + 1)
        if config.pretrained:
            unet = _pretrained(UNet2DConditionModel, config.pretrained, "unet")
            text_encoder = _pretrained(CLIPTextModel, config.pretrained, "text_encoder")
            scheduler = _scheduler(config.pretrained)
        else:
            text_encoder = _fresh_text_encoder(config, vocabulary)
            unet = _fresh_unet(config, vae)
            scheduler = dict(_SCHEDULE)
    if config.prediction != "auto":
        scheduler["prediction_type"] = config.prediction
    parts = SdParts(vae, unet, text_encoder, scheduler)
    _check(config, parts, vocabulary)
    if config.attention == "eager":
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    return parts


def _pretrained(cls: Any, source: str, part: str) -> Any:
    """`part` of a pipeline's folder or hub name, or the folder of the part itself, in fp32."""
    folder = Path(source)
    inside = not folder.is_dir() or (folder / part).is_dir()
    options: dict[str, Any] = {"subfolder": part} if inside else {}
    try:
        model = cls.from_pretrained(source, use_safetensors=True, torch_dtype=torch.float32, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        key = "task.vae" if part == "vae" else "task.pretrained"
        raise ConfigError(key, source, f"a folder or hub name with {part}/ in diffusers' layout (safetensors)", reason) from error
    bad = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if bad:
        raise ConfigError(
            "task.pretrained",
            source,
            f"finite weights; {part}.{bad[0]} and {len(bad) - 1} others hold NaN",
            "The run that made it diverged.",
        )
    return model


def _scheduler(source: str) -> dict[str, Any]:
    try:
        loaded = DDPMScheduler.load_config(source, subfolder="scheduler")
    except OSError as error:
        raise ConfigError("task.pretrained", source, "a pipeline with scheduler/scheduler_config.json", str(error)) from error
    found = dict(loaded[0] if isinstance(loaded, tuple) else loaded)
    if found.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise ConfigError("task.prediction", found["prediction_type"], "epsilon or v_prediction", "Set task.prediction.")
    return {"prediction_type": "epsilon"} | found


def _fresh_vae(config: StableDiffusionConfig) -> AutoencoderKL:
    sizes = config.architecture
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae_channels,
        layers_per_block=sizes.vae_layers,
        latent_channels=sizes.latent_channels,
        norm_num_groups=8,
        sample_size=config.image_size,
        # Its loss keeps latents at unit variance.
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def _fresh_text_encoder(config: StableDiffusionConfig, vocabulary: Vocabulary) -> CLIPTextModel:
    sizes = config.architecture
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary.size,
            hidden_size=sizes.text_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            max_position_embeddings=config.context_length,
            projection_dim=sizes.text_width,
            pad_token_id=vocabulary.pad,
            bos_token_id=vocabulary.start,
            eos_token_id=vocabulary.end,
        )
    )


def _fresh_unet(config: StableDiffusionConfig, vae: AutoencoderKL) -> UNet2DConditionModel:
    sizes = config.architecture
    levels = len(sizes.channels)
    return UNet2DConditionModel(
        sample_size=config.image_size // vae_factor(vae),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=sizes.channels,
        layers_per_block=sizes.layers,
        # diffusers calls the number of heads so.
        attention_head_dim=sizes.heads,
        cross_attention_dim=sizes.text_width,
        norm_num_groups=8,
    )


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent, along a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def side_multiple(vae: AutoencoderKL, unet: UNet2DConditionModel) -> int:
    """Pixels that both sides of a picture are a multiple of: what VAE and U-Net divide by."""
    return vae_factor(vae) * int(2 ** (len(unet.config.block_out_channels) - 1))


def _check(config: StableDiffusionConfig, parts: SdParts, vocabulary: Vocabulary) -> None:
    """Refuse parts that do not belong together."""
    unet, text_encoder, vae = parts.unet, parts.text_encoder, parts.vae
    if unet.config.in_channels != vae.config.latent_channels:
        received = f"a U-Net of {unet.config.in_channels} input channels with a VAE of {vae.config.latent_channels}"
        raise ConfigError(
            "task.pretrained", received, "equal channels", "Inpainting and upscaling checkpoints have more: take the text-to-image one."
        )
    width = text_encoder.config.hidden_size
    if unet.config.cross_attention_dim != width:
        received = f"a U-Net for states of {unet.config.cross_attention_dim} with a text encoder of {width}"
        raise ConfigError("task.pretrained", received, "equal widths", "SDXL and others with two text encoders are not of this layout.")
    if vocabulary.size > text_encoder.config.vocab_size:
        raise ConfigError("task.tokenizer", f"{vocabulary.size} ids", f"at most the text encoder's {text_encoder.config.vocab_size}")
    if config.context_length > text_encoder.config.max_position_embeddings:
        raise ConfigError("task.context_length", config.context_length, f"at most {text_encoder.config.max_position_embeddings}")
    config.check_multiple(side_multiple(vae, unet))


def freeze_but(config: StableDiffusionConfig, parts: SdParts) -> None:
    """Leave what `config.train` names trainable; adapters are added apart."""
    learning: dict[str, list[nn.Module | None]] = {
        "vae": [parts.vae],
        "unet": [parts.unet],
        "unet_text": [parts.unet, parts.text_encoder],
        "lora": [],
    }
    for part in (parts.vae, parts.unet, parts.text_encoder):
        if part is not None:
            part.requires_grad_(any(part is one for one in learning[config.train]))


def pixels(image: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` → float32 `[B, 3, H, W]` in [-1, 1], as diffusers' scripts scale it."""
    return image.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


def vae_terms(vae: AutoencoderKL, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Loss terms `[B]` of a VAE on uint8 `[B, H, W, 3]`: reconstruction (squared and absolute), KL, and latents of unit variance.

    The published VAEs add a perceptual and an adversarial loss (Esser et al. 2021, arXiv:2012.09841), which need other networks.
    """
    target = pixels(image)
    posterior = vae.encode(target).latent_dist
    mean, deviation = posterior.mean.float(), posterior.std.float()
    made = vae.decode(mean + deviation * noise).sample.float()
    error = made - target
    kl = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log())
    return {
        "reconstruction": (error**2 + 0.5 * error.abs()).flatten(1).mean(dim=1),
        "kl": kl.flatten(1).sum(dim=1) / error[0].numel(),
        "variance": ((mean**2).flatten(1).mean(dim=1) - 1) ** 2,
    }
