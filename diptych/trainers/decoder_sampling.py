"""Pictures from dalle2-pytorch's decoder, as its own sampling loops, with the noise given.

Shape legend: B rows, S pixels of a square picture, L tokens, D dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diptych.config import ConfigError
from diptych.trainers.decoder_loss import NOISE_LEVELS

if TYPE_CHECKING:
    from dalle2_pytorch import Decoder

Noise = Callable[[str, tuple[int, ...]], Tensor]
"""`noise(purpose, shape)` → `[B, *shape]` standard normal numbers that belong to the rows."""
RESAMPLE = 5
"""Times that each step of inpainting is repeated (RePaint, arXiv:2201.09865); the peer's default."""


@dataclass(frozen=True)
class Inpaint:
    """What is painted into."""

    image: Tensor
    """`[B, 3, H, W]` in [0, 1]."""
    keep: Tensor
    """bool `[B, 1, H, W]`: True = the pixel stays."""
    resample: int = RESAMPLE
    """Times that each step is repeated."""


@dataclass(frozen=True)
class Sampling:
    """How each U-Net is sampled; one entry per U-Net."""

    steps: Sequence[int]
    """Denoising steps; DDIM below the model's timesteps, else ancestral."""
    cond_scale: Sequence[float]
    """Guidance; 1 = the conditional model alone."""
    eta: float
    """Fresh noise in each DDIM step."""


def sample_decoder(
    decoder: Decoder, image_embed: Tensor, text_encodings: Tensor | None, noise: Noise, sampling: Sampling, inpaint: Inpaint | None = None
) -> Tensor:
    """Pictures `[B, 3, S, S]`, around [0, 1] and not clamped, for embeddings `[B, D]` and token states `[B, L, D]`.

    Raises `ConfigError` if a U-Net has no weights, or guidance is asked of one that learned without condition dropout.
    """
    if any(scale != 1 for scale in sampling.cond_scale) and not decoder.can_classifier_guidance:
        raise ConfigError("guidance", list(sampling.cond_scale), "1: the decoder learned without condition dropout")
    picture: Tensor | None = None
    for index, unet in enumerate(decoder.unets):
        if isinstance(unet, nn.Identity):
            raise ConfigError("RUN", f"a decoder without U-Net {index + 1}", "one with all of them", "Name the others in task.pretrained.")
        stage = _Stage(decoder, index, image_embed, text_encodings, noise, sampling, inpaint)
        picture = stage.sample(picture)
    assert picture is not None
    return picture


class _Stage:
    """One U-Net's denoising."""

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        image_embed: Tensor,
        text_encodings: Tensor | None,
        noise: Noise,
        sampling: Sampling,
        inpaint: Inpaint | None,
    ) -> None:
        self.decoder, self.index, self.inpaint = decoder, index, inpaint
        self.unet, self.scheduler = decoder.unets[index], decoder.noise_schedulers[index]
        self.shape = (3, decoder.image_sizes[index], decoder.image_sizes[index])
        self.steps, self.eta = sampling.steps[index], sampling.eta
        # Without a condition there is nothing to guide to, and a second pass would predict the same.
        self.scale = sampling.cond_scale[index] if self.unet.cond_on_image_embeds or self.unet.cond_on_text_encodings else 1.0
        self.draw, self.device = noise, image_embed.device
        self.options = {"image_embed": image_embed, "text_encodings": text_encodings if self.unet.cond_on_text_encodings else None}
        self.former: Tensor | None = None
        self.known, self.keep = self._known()

    def noise(self, what: str) -> Tensor:
        return self.draw(f"unet{self.index + 1}/{what}", self.shape)

    def _known(self) -> tuple[Tensor | None, Tensor | None]:
        from dalle2_pytorch.dalle2_pytorch import resize_image_to

        if self.inpaint is None:
            return None, None
        known = resize_image_to(self.decoder.normalize_img(self.inpaint.image), self.shape[-1], nearest=True)
        return known, resize_image_to(self.inpaint.keep.float(), self.shape[-1], nearest=True).bool()

    def sample(self, smaller: Tensor | None) -> Tensor:
        """The picture `[B, 3, S, S]` of this stage; `smaller` is that of the stage before."""
        self.options |= self._lowres(smaller)
        picture = self.noise("start")
        if self.steps < self.scheduler.num_timesteps:
            times = torch.linspace(0.0, self.scheduler.num_timesteps, self.steps + 2)[:-1].int().tolist()[::-1]
            pairs = [(time, following) for time, following in itertools.pairwise(times) if time > following]
            last = 0
        else:
            pairs = [(time, time - 1) for time in range(self.scheduler.num_timesteps - 1, -1, -1)]
            last = -1
        repeats = self.inpaint.resample if self.inpaint else 1
        for time, following in pairs:
            for repeat in range(repeats - 1, -1, -1):
                picture = self._keep(picture, time, repeat)
                picture = self._ddim(picture, time, following, repeat) if last == 0 else self._ancestral(picture, time, repeat)
                if repeat and following != last:
                    picture = self._back(picture, following, time, repeat)
        if self.known is not None and self.keep is not None:
            picture = torch.where(self.keep, self.known, picture)
        return self.decoder.unnormalize_img(picture)

    def _lowres(self, smaller: Tensor | None) -> dict[str, Tensor | None]:
        from dalle2_pytorch.dalle2_pytorch import resize_image_to

        if smaller is None:
            return {"lowres_cond_img": None, "lowres_noise_level": None}
        decoder, conditioner = self.decoder, self.decoder.lowres_conds[self.index]
        small = resize_image_to(smaller, self.shape[-1], clamp_range=decoder.input_image_range, nearest=True)
        small, level = decoder.normalize_img(small), None
        if conditioner.use_noise:
            level = self._times(small, int(decoder.lowres_noise_sample_level * NOISE_LEVELS))
            small = conditioner.noise_scheduler.q_sample(small, t=level, noise=self.noise("lowres"))
        return {"lowres_cond_img": small, "lowres_noise_level": level}

    def _times(self, like: Tensor, time: int) -> Tensor:
        return torch.full((len(like),), time, device=self.device, dtype=torch.long)

    def _keep(self, picture: Tensor, time: int, repeat: int) -> Tensor:
        """Known pixels at the noise of `time` (RePaint)."""
        if self.known is None or self.keep is None:
            return picture
        noised = self.scheduler.q_sample(self.known, t=self._times(picture, time), noise=self.noise(f"known{time}.{repeat}"))
        return torch.where(self.keep, noised, picture)

    def _back(self, picture: Tensor, following: int, time: int, repeat: int) -> Tensor:
        """From the noise of `following` back to that of `time`, to be denoised once more."""
        times = [self._times(picture, value) for value in (following, time)]
        return self.scheduler.q_sample_from_to(picture, *times, noise=self.noise(f"back{time}.{repeat}"))

    def _predict(self, picture: Tensor, time: int) -> Tensor:
        former = self.former if self.unet.self_cond else None
        options = {**self.options, "self_cond": former, "cond_scale": self.scale}
        return self.unet.forward_with_cond_scale(picture, self._times(picture, time), **options).float()

    def _ddim(self, picture: Tensor, time: int, following: int, repeat: int) -> Tensor:
        """Song et al. 2020, arXiv:2010.02502."""
        decoder, scheduler, index = self.decoder, self.scheduler, self.index
        times = self._times(picture, time)
        predicted, _ = decoder.parse_unet_output(decoder.learned_variance[index], self._predict(picture, time))
        if decoder.predict_v[index]:
            start = scheduler.predict_start_from_v(picture, t=times, v=predicted)
        elif decoder.predict_x_start[index]:
            start = predicted
        else:
            start = scheduler.predict_start_from_noise(picture, t=times, noise=predicted)
        start = self.former = decoder.dynamic_threshold(start)
        direction = scheduler.predict_noise_from_start(picture, t=times, x0=start)
        now, then = scheduler.alphas_cumprod[time], scheduler.alphas_cumprod[following]
        random_part = self.eta * ((1 - now / then) * (1 - then) / (1 - now)).sqrt()
        kept_part = (1 - then - random_part**2).sqrt()
        picture = start * then.sqrt() + kept_part * direction
        return picture + random_part * self.noise(f"step{time}.{repeat}") if self.eta and following else picture

    def _ancestral(self, picture: Tensor, time: int, repeat: int) -> Tensor:
        """Ho et al. 2020, arXiv:2006.11239."""
        decoder, index = self.decoder, self.index
        mean, _, log_variance, self.former = decoder.p_mean_variance(
            self.unet,
            picture,
            self._times(picture, time),
            image_embed=None,
            noise_scheduler=self.scheduler,
            predict_x_start=decoder.predict_x_start[index],
            predict_v=decoder.predict_v[index],
            learned_variance=decoder.learned_variance[index],
            model_output=self._predict(picture, time),
        )
        return mean + (0.5 * log_variance).exp() * self.noise(f"step{time}.{repeat}") if time else mean
