"""A painter without weights: the colours that the prompt names, in stripes, with noise of the request's seed. For tests of what surrounds one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diptych.config import ConfigError
from diptych.datasets.scenes import COLOURS
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


class StripePainter:
    """Paints nothing (NaN) where the prompt says `nan`, and black where it says `black`. Notes each call in the folder `log`, if given."""

    modes: frozenset[Mode] = frozenset(("text", "variation", "inpaint"))
    stages: tuple[str, ...] = ("prior", "decoder")
    guidance: tuple[float, ...] = (1.0, 1.0)
    size = 32

    def __init__(self, log: str = "") -> None:
        self.log = log

    def paint(self, requests: Sequence[PictureRequest], settings: PictureSettings) -> np.ndarray:
        import torch

        height, width = shape = settings.shape(self.size)
        check_requests(requests, self.modes, shape)
        guidance = stage_guidance(settings, self.stages, self.guidance)
        if settings.sampler not in ("", "stripes"):
            raise ConfigError("sampler", settings.sampler, "stripes")
        noise = 0.02 * guidance[0] * seeded_noise(requests, "stripes", (3, height, width))
        for row, request in zip(noise, requests, strict=True):
            colours = [COLOURS[word] for word in request.prompt.lower().replace(",", " ").split() if word in COLOURS] or [(128, 128, 128)]
            for column in range(width):
                row[:, :, column] += torch.tensor(colours[column * len(colours) // width])[:, None] / 255
            if "black" in request.prompt:
                row.zero_()
            if "nan" in request.prompt:
                row.fill_(float("nan"))
        painted = keep_pixels(to_uint8(noise, requests), requests)
        if self.log:
            with Path(self.log).open("a") as file:
                file.writelines(f"{request.prompt}\t{request.seed}\n" for request in requests)
        return painted
