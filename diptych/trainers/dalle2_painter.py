"""Pictures from a DALL-E 2: caption → text embedding → prior → image embedding → decoder, and what starts from a picture.

A dream takes the best of several image embeddings, by their cosine with the caption's. A variation decodes the embedding of a picture,
half-way to the caption's where one is given. Inpainting keeps what the mask keeps (RePaint, in each stage).
Shape legend: B pictures, N candidates, D dimensions of the embeddings, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diptych.config import ConfigError
from diptych.recipes.dalle2_decoder import STAGES
from diptych.trainers.clip_embedder import Embedder
from diptych.trainers.decoder_sampling import Inpaint, Sampling, sample_decoder
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
from diptych.trainers.prior_model import choose_nearest, sample_prior

if TYPE_CHECKING:
    from diptych.trainers.tasks.dalle2_decoder import Dalle2DecoderTask
    from diptych.trainers.tasks.dalle2_prior import Dalle2PriorTask

Tokenize = Callable[[str, Sequence[str], int], tuple[np.ndarray, np.ndarray]]
"""`(tokenizer, texts, length)` → (int64 `[B, length]`, bool `[B, length]`), as the data plane tokenizes captions."""
CANDIDATES = 4
"""Image embeddings that the prior proposes for a caption."""


class Dalle2Painter:
    """See `pictures.Painter`. Holds tasks in evaluation mode on one device; without a prior it varies and inpaints alone."""

    def __init__(
        self,
        prior: Dalle2PriorTask | None,
        decoder: Dalle2DecoderTask,
        embedder: Embedder,
        tokenize: Tokenize | None = None,
        candidates: int = CANDIDATES,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> None:
        """`embedder` is the CLIP whose embeddings both learned from; `tokenize` is needed where one of them reads token states.

        `autocast` is entered around each call, by default nothing: fp32. Raises `ConfigError` where dimensions disagree.
        """
        self.prior, self.decoder, self.embedder, self.tokenize = prior, decoder, embedder, tokenize
        self.candidates, self.autocast = candidates, autocast
        self.modes: frozenset[Mode] = frozenset(("text", "variation", "inpaint") if prior else ("variation", "inpaint"))
        self.stages: tuple[str, ...] = (*(("prior",) if prior else ()), *STAGES[: len(decoder.config.image_sizes)])
        own = (decoder.config.of_stage("cond_scale", stage) for stage in range(len(decoder.config.image_sizes)))
        self.guidance: tuple[float, ...] = (*((prior.config.cond_scale,) if prior else ()), *own)
        self.size: int = decoder.config.image_sizes[-1]
        self.device = next(decoder.parameters()).device
        self._check_dimensions()

    def _check_dimensions(self) -> None:
        found = self.embedder.warm_up(("image", "text"))
        wanted = {"the decoder": self.decoder.config.image_embed_dim, "the prior": self.prior.prior.image_embed_dim if self.prior else None}
        for what, dim in wanted.items():
            if dim not in (None, found["image"]):
                raise ConfigError("--clip", f"embeddings of {found['image']} dimensions", f"{dim}, which {what} learned from")

    @torch.no_grad()
    def paint(self, requests: Sequence[PictureRequest], settings: PictureSettings) -> np.ndarray:
        """See `Painter.paint`."""
        height, width = settings.shape(self.size)
        if not height == width == self.size:
            raise ConfigError("size", f"{width} × {height}", f"{self.size}, the size that the last U-Net makes")
        check_requests(requests, self.modes, (self.size, self.size))
        _check_words(requests, self.prior is not None)
        # Inpainting repeats its steps: apart, so that a picture does not depend on what it is made with.
        made = np.zeros((len(requests), self.size, self.size, 3), np.uint8)
        for inpaint in (False, True):
            places = [index for index, request in enumerate(requests) if (request.mask is not None) == inpaint]
            if places:
                made[places] = self._paint([requests[index] for index in places], settings)
        return keep_pixels(made, requests)

    def _paint(self, requests: list[PictureRequest], settings: PictureSettings) -> np.ndarray:
        guidance = stage_guidance(settings, self.stages, self.guidance)
        with self.autocast or nullcontext():
            embedding = self._image_embeddings(requests, settings, guidance)
            states = self._states(self.decoder, requests) if self.decoder.config.reads_text else None

            def noise(purpose: str, shape: tuple[int, ...]) -> Tensor:
                return seeded_noise(requests, f"decoder/{purpose}", shape, self.device)

            config, stages = self.decoder.config, range(len(self.decoder.config.image_sizes))
            steps = [_steps(settings, config.of_stage("sample_timesteps", stage), config.timesteps) for stage in stages]
            sampling = Sampling(steps, guidance[-len(stages) :], settings.eta or config.ddim_sampling_eta)
            pixels = sample_decoder(self.decoder.decoder, embedding, states, noise, sampling, self._inpaint(requests))
        return to_uint8(pixels, requests)

    def _inpaint(self, requests: Sequence[PictureRequest]) -> Inpaint | None:
        if requests[0].mask is None:
            return None
        image = np.stack([request.image for request in requests if request.image is not None])
        keep = np.stack([request.mask for request in requests if request.mask is not None])
        return Inpaint(
            torch.from_numpy(image).to(self.device).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(keep).to(self.device)[:, None]
        )

    def _image_embeddings(self, requests: Sequence[PictureRequest], settings: PictureSettings, guidance: tuple[float, ...]) -> Tensor:
        """`[B, D]`: of the caption by the prior, of the picture by the CLIP, or half-way between both; inpainting takes the caption's."""
        found = torch.zeros(len(requests), int(self.decoder.config.image_embed_dim or 0), device=self.device)
        said = [index for index, request in enumerate(requests) if request.prompt]
        seen = [index for index, request in enumerate(requests) if not request.prompt or request.mode == "variation"]
        if said:
            found[said] = self._dreamt([requests[index] for index in said], settings, guidance[0])
        if seen:
            pictures = [self.embedder.pixels(Image.fromarray(image)) for index in seen if (image := requests[index].image) is not None]
            embedded = torch.from_numpy(self.embedder.images(np.stack(pictures))).to(self.device)
            blended = torch.tensor([bool(requests[index].prompt) for index in seen], device=self.device)[:, None]
            halfway = F.normalize(F.normalize(found[seen], dim=-1) + embedded, dim=-1)
            found[seen] = torch.where(blended, halfway, embedded)
        return found

    def _dreamt(self, requests: Sequence[PictureRequest], settings: PictureSettings, scale: float) -> Tensor:
        """Image embeddings `[B, D]`: of several that the prior proposes the one nearest to the caption's."""
        task = self.prior
        assert task is not None
        text = torch.from_numpy(self.embedder.texts([request.prompt for request in requests])).to(self.device)
        states = self._states(task, requests) if task.config.condition_on_text_encodings else None
        steps = _steps(settings, task.config.sample_timesteps, task.config.timesteps)
        proposed = []
        for number in range(self.candidates):

            def noise(what: str, number: int = number) -> Tensor:
                return seeded_noise(requests, f"prior{number}/{what}", (text.shape[1],), self.device)

            proposed.append(sample_prior(task.prior, text, noise, steps, scale, states))
        return choose_nearest(torch.stack(proposed, dim=1), text)

    def _states(self, task: Dalle2PriorTask | Dalle2DecoderTask, requests: Sequence[PictureRequest]) -> Tensor:
        """Token states `[B, L, D]` of the prompts, which `task` reads."""
        config = task.config
        if task.tower is None or self.tokenize is None:
            remedy = f"Name the CLIP whose cached states {config.name} learned from."
            raise ConfigError("task.text_tower", config.text_tower, "a CLIP whose text tower reads the prompts", remedy)
        tokens, mask = self.tokenize(config.tokenizer, [request.prompt for request in requests], config.text_length)
        return task.tower.states(torch.from_numpy(tokens).to(self.device), torch.from_numpy(mask).to(self.device))


def _steps(settings: PictureSettings, default: int, timesteps: int) -> int:
    if settings.sampler not in ("", "ddim", "ddpm"):
        raise ConfigError("sampler", settings.sampler, "ddim, or ddpm for all of the model's timesteps")
    if settings.steps > timesteps:
        raise ConfigError("steps", settings.steps, f"at most {timesteps}, the timesteps of the model")
    return timesteps if settings.sampler == "ddpm" else settings.steps or default


def _check_words(requests: Sequence[PictureRequest], dreams: bool) -> None:
    for request in requests:
        if request.negative_prompt:
            raise ConfigError("negative_prompt", request.negative_prompt, "empty", "DALL-E 2's guidance leads away from no condition.")
        if request.mode == "text" and not request.prompt:
            raise ConfigError("prompt", "", "a text, or an image to vary")
        if request.prompt and not dreams:
            raise ConfigError("prompt", request.prompt, "empty without a prior", "Name the run of a prior beside the decoder's.")
