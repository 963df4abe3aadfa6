"""Pictures from Stable Diffusion: text to image, variation of a picture, inpainting, by diffusers' schedulers.

For the same starting noise a picture is that of diffusers' `StableDiffusionPipeline`. A variation starts on the way to noise, as its
image-to-image pipeline does; inpainting puts the noised original back into the kept cells of the latents after each step, as its inpainting
pipeline does with a U-Net of four channels, and the kept pixels themselves into the picture.
Shape legend: B pictures, L tokens, D width of the text encoder, C channels and h, w places of the latents.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.config import ConfigError
from diptych.trainers.pictures import (
    Mode,
    PictureRequest,
    PictureSettings,
    check_requests,
    keep_pixels,
    seeded_noise,
    stage_guidance,
    to_uint8,
)
from diptych.trainers.sd_lora import adapters_off
from diptych.trainers.sd_model import pixels, side_multiple, vae_factor

if TYPE_CHECKING:
    from diptych.trainers.tasks.stable_diffusion import StableDiffusionTask

log = logging.getLogger(__name__)

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Samplers by short name; diffusers' class names serve too."""
_STEPS = 30


class SdPainter:
    """See `pictures.Painter`. Holds a task in evaluation mode; with `base`, adapters are off."""

    modes: frozenset[Mode] = frozenset(("text", "variation", "inpaint"))
    stages: tuple[str, ...] = ("unet",)

    def __init__(self, task: StableDiffusionTask, base: bool = False, autocast: AbstractContextManager[Any] | None = None) -> None:
        """`autocast` is entered around each call (`Precision.autocast()`), by default nothing: fp32."""
        if task.parts.unet is None:
            raise ConfigError("RUN", "a VAE", "a run that trained more than task.train=vae", "A VAE alone makes no pictures.")
        self.task, self.parts, self.base, self.autocast = task, task.parts, base, autocast
        self.guidance: tuple[float, ...] = (task.config.show_guidance,)
        self.size: int = task.config.image_size
        self.device = next(task.parts.unet.parameters()).device

    @torch.no_grad()
    def paint(self, requests: Sequence[PictureRequest], settings: PictureSettings) -> np.ndarray:
        """See `Painter.paint`. A prompt longer than the text encoder takes is cut, and the log says so."""
        shape = settings.shape(self.size)
        multiple = side_multiple(self.parts.vae, self.parts.unet)
        for key, side in zip(("height", "width"), shape, strict=True):
            if side % multiple:
                raise ConfigError(key if getattr(settings, key) else "size", side, f"a multiple of {multiple}")
        check_requests(requests, self.modes, shape)
        if len({request.mode for request in requests}) > 1:
            # The three start at different places of the schedule.
            return self._one_by_one(requests, settings, shape)
        scheduler = make_scheduler(self.parts.scheduler, settings.sampler)
        (guidance,) = stage_guidance(settings, self.stages, self.guidance)
        with self.autocast or nullcontext(), adapters_off(self.parts) if self.base else nullcontext():
            latents = self._sample(requests, settings, scheduler, guidance, shape)
            decoded = self.parts.vae.decode(latents / self.parts.vae.config.scaling_factor).sample.float()
        return keep_pixels(to_uint8(decoded / 2 + 0.5, requests), requests)

    def _one_by_one(self, requests: Sequence[PictureRequest], settings: PictureSettings, shape: tuple[int, int]) -> np.ndarray:
        made = np.zeros((len(requests), *shape, 3), np.uint8)
        for mode in ("text", "variation", "inpaint"):
            places = [index for index, request in enumerate(requests) if request.mode == mode]
            if places:
                made[places] = self.paint([requests[index] for index in places], settings)
        return made

    def _sample(
        self, requests: Sequence[PictureRequest], settings: PictureSettings, scheduler: Any, guidance: float, shape: tuple[int, int]
    ) -> Tensor:
        """Denoised latents `[B, C, h, w]` of pictures of `shape` (height, width)."""
        vae, mode = self.parts.vae, requests[0].mode
        places = (vae.config.latent_channels, *(side // vae_factor(vae) for side in shape))
        noise = seeded_noise(requests, "start", places, self.device)
        scheduler.set_timesteps(settings.steps or _STEPS, device=self.device)
        timesteps = scheduler.timesteps
        original = kept = None
        if mode == "text":
            latents = noise * scheduler.init_noise_sigma
        else:
            original = self._encode(requests, noise.shape)
            if mode == "variation":
                timesteps = _late_part(scheduler, settings)
            latents = scheduler.add_noise(original, noise, timesteps[:1].repeat(len(requests)))
            if mode == "inpaint":
                kept = self._kept_cells(requests, places)
                latents = noise * scheduler.init_noise_sigma
        states = self._states(requests, guidance)
        step_options = _step_options(scheduler, requests, settings.eta, self.device)
        for index, time in enumerate(timesteps):
            predicted = self._predict(scheduler.scale_model_input(latents, time), time, states, guidance)
            latents = scheduler.step(predicted, time, latents, **step_options).prev_sample
            if kept is not None and original is not None:
                following = timesteps[index + 1 : index + 2]
                back = scheduler.add_noise(original, noise, following.repeat(len(requests))) if len(following) else original
                latents = torch.where(kept, back, latents)
        return latents

    def _predict(self, latents: Tensor, time: Tensor, states: Tensor, guidance: float) -> Tensor:
        """The U-Net's prediction, guided away from what it predicts without the caption; 1 = the conditional model alone."""
        if guidance == 1:
            return self.parts.unet(latents, time, encoder_hidden_states=states).sample.float()
        both = self.parts.unet(torch.cat([latents] * 2), time, encoder_hidden_states=states).sample.float()
        without, given = both.chunk(2)
        return without + guidance * (given - without)

    def _states(self, requests: Sequence[PictureRequest], guidance: float) -> Tensor:
        """`[B, L, D]` of the prompts; with guidance `[2B, L, D]`, those to lead away from first."""
        prompts = [request.prompt for request in requests]
        if guidance == 1:
            return self.task.encode_texts(prompts)
        return torch.cat([self.task.encode_texts([request.negative_prompt for request in requests]), self.task.encode_texts(prompts)])

    def _encode(self, requests: Sequence[PictureRequest], shape: torch.Size) -> Tensor:
        """Scaled latents of the requests' images, drawn from the VAE's posterior by the request's seed."""
        images = torch.from_numpy(np.stack([request.image for request in requests if request.image is not None])).to(self.device)
        posterior = self.parts.vae.encode(pixels(images)).latent_dist
        drawn = posterior.mean.float() + posterior.std.float() * seeded_noise(requests, "posterior", shape[1:], self.device)
        return drawn * self.parts.vae.config.scaling_factor

    def _kept_cells(self, requests: Sequence[PictureRequest], shape: tuple[int, ...]) -> Tensor:
        """bool `[B, 1, h, w]`: cells of the latents all of whose pixels are kept."""
        masks = torch.from_numpy(np.stack([request.mask for request in requests if request.mask is not None])).to(self.device)
        factor = masks.shape[-1] // shape[-1]
        return F.max_pool2d((~masks)[:, None].float(), factor) == 0


def make_scheduler(config: dict[str, Any], sampler: str) -> Any:
    """diffusers' scheduler `sampler` (empty = the pipeline's own) with the pipeline's noise schedule; `ConfigError` for an unknown one."""
    name = SAMPLERS.get(sampler, sampler or config.get("_class_name", "DDIMScheduler"))
    known = {kind.__name__ for kind in diffusers.DDIMScheduler.from_config(_settings(config)).compatibles} | {"DDIMScheduler"}
    if name not in known:
        remedy = "diffusers' class names serve too."
        raise ConfigError("sampler", sampler, ", ".join(SAMPLERS), remedy)
    return getattr(diffusers, name).from_config(_settings(config))


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_class_name"}


def _late_part(scheduler: Any, settings: PictureSettings) -> Tensor:
    """The timesteps that are left when a share `strength` of them is to be run, as diffusers' image-to-image pipeline counts them."""
    steps = settings.steps or _STEPS
    start = max(steps - max(int(steps * settings.strength), 1), 0) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return scheduler.timesteps[start:]


def _step_options(scheduler: Any, requests: Sequence[PictureRequest], eta: float, device: torch.device) -> dict[str, Any]:
    """What this scheduler's `step` takes: eta, and a generator for each picture, seeded by its request."""
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if "eta" in known:
        options["eta"] = eta
    if "generator" in known:
        options["generator"] = [torch.Generator(device).manual_seed(request.seed) for request in requests]
    return options
