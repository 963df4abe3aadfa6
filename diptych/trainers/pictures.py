"""What makes pictures, whatever the model: requests, settings, the protocol `Painter`, and what every painter needs.

A picture is a function of its request and the settings: its noise is drawn from the request's seed alone, so the same seed gives
the same picture in any batch. A mask says what to KEEP (as in dalle2-pytorch's `decoder.sample`; diffusers' pipelines mean the opposite).
Shape legend: B pictures, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pydantic
import torch
from torch import Tensor

from diptych.config import Config, ConfigError, Numbers
from diptych.trainers import randomness

Mode = Literal["text", "variation", "inpaint"]


class PaintError(RuntimeError):
    """The model made something that is no picture (NaN); the message names the seeds and the likely cause."""


@dataclass(frozen=True)
class PictureRequest:
    """One picture that somebody wants."""

    prompt: str = ""
    """What it shows; empty = nothing said (variation and inpaint of models that take pictures alone)."""
    seed: int = 0
    """Names the noise."""
    image: np.ndarray | None = None
    """uint8 [H, W, 3]: what to vary, or to paint into; of the painter's size."""
    mask: np.ndarray | None = None
    """bool [H, W]: True = keep this pixel of `image` exactly."""
    negative_prompt: str = ""
    """What guidance leads away from; empty = from a picture without a caption."""

    @property
    def mode(self) -> Mode:
        """`inpaint` with a mask, `variation` with an image alone, else `text`."""
        if self.mask is not None:
            return "inpaint"
        return "text" if self.image is None else "variation"


class PictureSettings(Config):
    """How pictures are sampled, the same for all requests of a call; zero and empty take the painter's own defaults."""

    steps: int = pydantic.Field(0, ge=0)
    """Denoising steps of each stage; 0 = the painter's default."""
    guidance: Numbers = ()
    """Classifier-free guidance, one number for all stages or one for each (separated by commas); 1 = the conditional model alone,
    empty = the painter's own."""
    sampler: str = ""
    """Sampler; empty = the painter's default. An unknown one is refused with those that there are."""
    size: int = pydantic.Field(0, ge=0)
    """Side of the picture, in pixels; 0 = what the model was trained at."""
    width: int = pydantic.Field(0, ge=0)
    """Width of the picture, in pixels; 0 = `size`."""
    height: int = pydantic.Field(0, ge=0)
    """Height of the picture, in pixels; 0 = `size`."""
    eta: float = pydantic.Field(0.0, ge=0, le=1)
    """Noise added in each DDIM step: 0 = none, 1 = as DDPM."""
    strength: float = pydantic.Field(0.8, gt=0, le=1)
    """Share of the way to pure noise that a variation starts from, where the painter starts from the picture itself."""

    def shape(self, trained: int) -> tuple[int, int]:
        """(height, width) in pixels of the pictures of a painter that was trained at `trained`."""
        size = self.size or trained
        return self.height or size, self.width or size


class Painter(Protocol):
    """Makes pictures. Holds its models, in evaluation mode."""

    modes: frozenset[Mode]
    """What it can do."""
    stages: tuple[str, ...]
    """Names of its stages that take guidance, in order: one slider each."""
    guidance: tuple[float, ...]
    """What each of `stages` takes where the settings name none."""
    size: int
    """Side of the pictures that it was trained at, in pixels."""

    def paint(self, requests: Sequence[PictureRequest], settings: PictureSettings) -> np.ndarray:
        """uint8 [B, H, W, 3]; kept pixels of an inpainted picture are those of its image, exactly.

        Raises `ConfigError` for a request or a setting that it cannot serve, `PaintError` for NaN.
        """


def check_requests(requests: Sequence[PictureRequest], modes: frozenset[Mode], shape: tuple[int, int]) -> None:
    """`ConfigError` for a mode that is not among `modes`, a mask without an image, and images and masks not of `shape` (height, width)."""
    for request in requests:
        if request.mode not in modes:
            raise ConfigError("--mask/--init-image", request.mode, ", ".join(sorted(modes)), "This model cannot do it.")
        if request.mask is not None and request.image is None:
            raise ConfigError("--mask", "a mask without an image", "a mask beside the image that it belongs to")
        for name, array, sides, dtype in (
            ("--init-image", request.image, (*shape, 3), "uint8"),
            ("--mask", request.mask, shape, "bool"),
        ):
            if array is not None and (array.shape != sides or array.dtype != dtype):
                received = f"{array.dtype} {list(array.shape)}"
                raise ConfigError(name, received, f"{dtype} {list(sides)}", "Image and mask need the size of the pictures that are made.")


def stage_guidance(settings: PictureSettings, stages: tuple[str, ...], default: tuple[float, ...]) -> tuple[float, ...]:
    """One number for each stage; `ConfigError` where there are neither one nor as many as `stages`."""
    values = settings.guidance or default
    if len(values) not in (1, len(stages)):
        raise ConfigError("guidance", list(values), f"one number, or one for each of {', '.join(stages)}")
    return values * len(stages) if len(values) == 1 else values


def seeded_noise(requests: Sequence[PictureRequest], purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32 `[B, *shape]`; row i is a function of the seed of request i and of `purpose`."""
    seeds = torch.tensor([request.seed for request in requests], dtype=torch.int64, device=device)
    return randomness.normal(0, f"paint/{purpose}", seeds, shape)


def to_uint8(pixels: Tensor, requests: Sequence[PictureRequest]) -> np.ndarray:
    """Float pixels `[B, 3, H, W]`, black 0 and white 1, → uint8 `[B, H, W, 3]`, clamped first; `PaintError` for NaN."""
    finite = torch.isfinite(pixels).flatten(1).all(dim=1)
    if not bool(finite.all()):
        seeds = [request.seed for request, fine in zip(requests, finite.tolist(), strict=True) if not fine]
        raise PaintError(
            f"{len(seeds)} of {len(requests)} pictures are NaN or infinite (seeds {seeds[:8]}): the weights are likely NaN (a run that diverged; "
            "take an earlier checkpoint), or half precision overflowed (paint in fp32 or bf16)"
        )
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def keep_pixels(painted: np.ndarray, requests: Sequence[PictureRequest]) -> np.ndarray:
    """uint8 `[B, H, W, 3]` with the kept pixels of each request's image in place."""
    kept = painted.copy()
    for picture, request in zip(kept, requests, strict=True):
        if request.mask is not None and request.image is not None:
            picture[request.mask] = request.image[request.mask]
    return kept
