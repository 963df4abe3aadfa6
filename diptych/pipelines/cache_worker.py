"""What an actor of `diptych cache` makes of samples: latents, text states, image states, as `embed_worker` writes them.

Shape legend: B samples, V variants (crops, each followed by its mirror image if there are flips), H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diptych.batches import ImageNeed
from diptych.datasets import images
from diptych.pipelines.embed_worker import Work

if TYPE_CHECKING:
    from diptych.trainers.latent_encoder import FrozenEncoder


@dataclass
class PictureWork(Work):
    """A frozen encoder of pictures, in all variants: a VAE's latents, or CLIP's states at `layer`."""

    model: str
    kind: str
    """`latents` or `image-states`."""
    need: ImageNeed
    seed: int
    crops: int
    flips: bool
    decoder: images.Decoder
    precision: str
    batch_size: int
    """Pictures of one forward pass."""
    layer: int = -1
    reads: tuple[str, ...] = ("image",)
    _encoder: FrozenEncoder | None = None

    def load(self, device: str) -> None:
        """See `Work.load`."""
        from diptych.trainers.latent_encoder import FrozenEncoder

        self._encoder = FrozenEncoder(self.model, "vae" if self.kind == "latents" else "image_encoder", device, self.precision)

    def ready(self, data: bytes, row: int) -> np.ndarray:
        """uint8 [V, H, W, 3]"""
        return images.decode_variants(data, self.need, self.seed, row, self.crops, self.flips, self.decoder)

    def encode(self, pixels: np.ndarray | None, captions: list[str]) -> dict[str, np.ndarray]:
        """float32 [B, V, …] by key of the batch; with buckets in rows of the square, as `AspectBuckets` lays them out."""
        assert pixels is not None
        samples, variants = pixels.shape[:2]
        flat = pixels.reshape(samples * variants, *pixels.shape[2:])
        parts = [self._forward(flat[first : first + self.batch_size]) for first in range(0, len(flat), self.batch_size)]
        made = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        if self.need.buckets is not None:
            bucket = self.need.buckets.shapes.index(flat.shape[1:3])
            made = {key: self._in_row(values, flat.shape[1]) for key, values in made.items()}
            made["bucket"] = np.full(len(flat), bucket, np.float32)
        return {key: values.reshape(samples, variants, *values.shape[1:]) for key, values in made.items()}

    def _in_row(self, latents: np.ndarray, height: int) -> np.ndarray:
        """[N, C, h, w] of pictures of `height` pixels → [N, C, s, s] with the values first, zeros behind."""
        count, channels, high = latents.shape[:3]
        side = self.need.size * high // height
        rows = np.zeros((count, channels, side, side), latents.dtype)
        flat = latents.reshape(count, -1)
        rows.reshape(count, -1)[:, : flat.shape[1]] = flat
        return rows

    def empty(self) -> dict[str, np.ndarray]:
        """See `Work.empty`."""
        variants = self.crops * (1 + self.flips)
        return {
            key: values[:0] for key, values in self.encode(np.zeros((1, variants, self.need.size, self.need.size, 3), np.uint8), []).items()
        }

    def _forward(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        assert self._encoder is not None
        return self._encoder.latents(pixels) if self.kind == "latents" else self._encoder.image_states(pixels, self.layer)


@dataclass
class TextStatesWork(Work):
    """A text encoder's states of captions."""

    model: str
    tokenizer: str
    length: int
    precision: str
    reads: tuple[str, ...] = ("text",)
    _encoder: FrozenEncoder | None = None

    def load(self, device: str) -> None:
        """See `Work.load`."""
        from diptych.trainers.latent_encoder import FrozenEncoder

        self._encoder = FrozenEncoder(self.model, "text_encoder", device, self.precision)

    def ready(self, data: bytes, row: int) -> np.ndarray:
        """Nothing: no picture is read."""
        raise AssertionError("captions need no picture")

    def encode(self, pixels: np.ndarray | None, captions: list[str]) -> dict[str, np.ndarray]:
        """float32 [B, 1, L, D]: the tokens that training would see, encoded."""
        from diptych.datasets.tokens import load_tokenizer

        assert self._encoder is not None
        tokens, _ = load_tokenizer(self.tokenizer).encode(captions, self.length)
        return {key: values[:, None] for key, values in self._encoder.text_states(tokens).items()}

    def empty(self) -> dict[str, np.ndarray]:
        """See `Work.empty`."""
        return {key: values[:0] for key, values in self.encode(None, [""]).items()}
