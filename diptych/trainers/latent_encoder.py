"""Frozen encoders of text-to-image models: a VAE's posterior, a text encoder's states, CLIP's states of pictures.

The same functions serve `diptych cache` and tasks that encode in each step, so that cached members equal what would be computed.
Sources: diffusers (AutoencoderKL), transformers (CLIPTextModel, CLIPVisionModel).
Shape legend: B rows, H, W and S pixels (S of a square), C channels and h, w places of a latent, L tokens, T places of CLIP's states, D their width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diptych.config import ConfigError
from diptych.trainers.precision import resolve_precision
from diptych.trainers.sd_model import pixels

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

Part = Literal["vae", "text_encoder", "image_encoder"]
ALLOWED = "a pipeline's folder or hub name in diffusers' layout, or the folder of the part itself"


class Posterior(NamedTuple):
    """What a VAE says of pictures, unscaled."""

    mean: Tensor
    """float `[B, C, h, w]`"""
    logvar: Tensor
    """float `[B, C, h, w]`"""


def encode_posterior(vae: AutoencoderKL, image: Tensor) -> Posterior:
    """The VAE's posterior of uint8 `[B, H, W, 3]`."""
    found = vae.encode(pixels(image)).latent_dist
    return Posterior(found.mean, found.logvar)


def encode_states(text_encoder: CLIPTextModel, tokens: Tensor) -> Tensor:
    """Last states `[B, L, D]` of token ids `[B, L]`, unmasked as Stable Diffusion takes them."""
    return text_encoder(tokens, return_dict=False)[0]


def describe(model: str, part: Part) -> dict[str, Any]:
    """The part's configuration, without its weights. Raises `ConfigError` if there is none."""

    def load(where: dict[str, str]) -> dict[str, Any]:
        if part == "vae":
            from diffusers import AutoencoderKL

            return dict(AutoencoderKL.load_config(model, **where))
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(model, **where)
        inner = {"text_encoder": "text_config", "image_encoder": "vision_config"}[part]
        return getattr(config, inner, config).to_dict()

    return _loaded(load, model, part)


def load_part(model: str, part: Part) -> nn.Module:
    """The part in fp32, in evaluation mode and frozen. Raises `ConfigError` where it cannot be loaded or holds NaN."""
    import diffusers
    import transformers

    cls: Any = {
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "image_encoder": transformers.CLIPVisionModel,
    }[part]
    found: nn.Module = _loaded(lambda where: cls.from_pretrained(model, torch_dtype=torch.float32, **where), model, part)
    bad = [name for name, weight in found.named_parameters() if not bool(torch.isfinite(weight).all())]
    if bad:
        raise ConfigError("--model", model, f"finite weights; {part}.{bad[0]} holds NaN or infinity")
    return found.eval().requires_grad_(False)


def _loaded(load: Callable[[dict[str, str]], Any], model: str, part: Part) -> Any:
    """`load` with where the part stands in `model`: a subfolder of a pipeline, or `model` itself."""
    places: list[dict[str, str]] = (
        [{"subfolder": part}, {}] if not os.path.isdir(model) else [{"subfolder": part} if os.path.isdir(f"{model}/{part}") else {}]
    )
    reasons = []
    for where in places:
        try:
            return load(where)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reasons.append((str(error).strip() or type(error).__name__).splitlines()[0])
    raise ConfigError("--model", model, ALLOWED, f"Its {part} cannot be loaded: {reasons[-1]}")


class FrozenEncoder:
    """One part of a model, on a device. Arrays in and out."""

    def __init__(self, model: str, part: Part, device: str = "cpu", precision: str = "fp32") -> None:
        self.device = torch.device(device)
        self.precision = resolve_precision(precision, self.device)
        self.model: Any = load_part(model, part).to(self.device)
        if part == "image_encoder":
            self.mean, self.std = (_per_channel(values, self.device) for values in _normalisation(model))

    @torch.inference_mode()
    def latents(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 `[B, H, W, 3]` → float32 `latent_mean`, `latent_logvar` `[B, C, h, w]`."""
        with self.precision.autocast():
            found = encode_posterior(self.model, torch.from_numpy(image).to(self.device))
        return {"latent_mean": _array(found.mean), "latent_logvar": _array(found.logvar)}

    @torch.inference_mode()
    def text_states(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """int64 `[B, L]` → float32 `text_states` `[B, L, D]`."""
        with self.precision.autocast():
            return {"text_states": _array(encode_states(self.model, torch.from_numpy(tokens).to(self.device)))}

    @torch.inference_mode()
    def image_states(self, image: np.ndarray, layer: int = -1) -> dict[str, np.ndarray]:
        """uint8 `[B, S, S, 3]` → float32 `image_states` `[B, T, D]`: what leaves block `layer` (0 = enters the first, -1 = leaves the last)."""
        batch = torch.from_numpy(image).to(self.device).permute(0, 3, 1, 2).float().div_(255)
        side = self.model.config.image_size
        with self.precision.autocast():
            found = self.model(
                (batch - self.mean) / self.std, output_hidden_states=True, interpolate_pos_encoding=image.shape[1] != side
            ).hidden_states[layer]
        return {"image_states": _array(found)}


def _normalisation(model: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of the model's image processor; CLIP's where it has none."""
    from transformers import AutoImageProcessor
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    for where in ({"subfolder": "feature_extractor"}, {}):
        try:
            found = AutoImageProcessor.from_pretrained(model, **where)
        except (OSError, ValueError):
            continue
        return tuple(found.image_mean), tuple(found.image_std)
    return tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)


def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _array(found: Tensor) -> np.ndarray:
    return found.float().cpu().numpy()
