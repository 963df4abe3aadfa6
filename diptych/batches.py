"""The contract between the data plane and the training plane: what a batch holds, and what a task asks for.

`datasets` makes batches and knows no model; `trainers` consumes them and knows no shard. They meet here: `FIELDS`
names every key that a batch may carry with its dtype and shape, the `TypedDict`s below group the keys by kind of data,
and a task states its `Needs`. No torch, no Ray: the same module serves the command line, the readers and the loop.

Shape legend: B samples of one worker's share, H and W pixels, L tokens, D embedding dimensions, C channels and h and w
places of a latent, T tokens of an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import numpy as np  # only named in annotations: the command line needs none


@dataclass(frozen=True)
class Field:
    """One key of a batch. `shape` starts with `B`; letters are free sizes, integers are fixed."""

    dtype: str
    shape: tuple[str | int, ...]
    doc: str


FIELDS: dict[str, Field] = {
    "slot": Field("int64", ("B",), "position in the run's stream; -1 on padding"),
    "row": Field("int64", ("B",), "manifest row of the sample that fills the slot (a substitute's, if it was bad); -1 on padding"),
    "weight": Field("float32", ("B",), "1 for a sample, 0 for padding"),
    "bucket": Field("int64", ("B",), "which of `AspectBuckets.shapes` the picture or latent of the row has"),
    "image": Field("uint8", ("B", "H", "W", 3), "sRGB pixels"),
    "tokens": Field("int64", ("B", "L"), "token ids, padded with the tokenizer's pad id"),
    "token_mask": Field("bool", ("B", "L"), "True where `tokens` is text (start and end tokens included), not padding"),
    "image_embedding": Field("float32", ("B", "D"), "embedding of the image, joined by key"),
    "text_embedding": Field("float32", ("B", "D"), "embedding of the caption, joined by key"),
    "latent_mean": Field("float16", ("B", "C", "h", "w"), "mean of the VAE's posterior, unscaled, of one cached variant"),
    "latent_logvar": Field("float16", ("B", "C", "h", "w"), "log-variance of the VAE's posterior of the same variant"),
    "text_states": Field("float16", ("B", "L", "D"), "text encoder's states of the caption, from a cache"),
    "image_states": Field("float16", ("B", "T", "D"), "CLIP's states of one cached variant of the image"),
}

CACHES: dict[str, tuple[str, ...]] = {
    "latents": ("latent_mean", "latent_logvar", "bucket"),
    "text-states": ("text_states",),
    "image-states": ("image_states",),
}
"""The kinds of `diptych cache`, and the keys of a batch that each holds."""


@dataclass(frozen=True)
class Fault:
    """One bad sample or damaged place: a line of the ledger, and of what `index` prints."""

    shard: str
    """Name of the tar, relative to the folder of the shards."""
    key: str
    """Key of the sample, whole; where the header itself is unreadable, the last readable key before it."""
    kind: str
    """Stable short name such as `undecodable_image`; programs select on it."""
    detail: str
    """What exactly was found, for people."""
    slot: int = -1
    """Slot of the stream in which it was met; -1 outside a run."""


@dataclass
class StepBatch:
    """One worker's share of one step, as the stream hands it to the loop."""

    step: int
    """Optimizer step that the share belongs to."""
    arrays: dict[str, np.ndarray]
    """Keys of `Needs.keys`; B = ceil(global_batch_size / workers), padded to a multiple of the micro-batches.

    Not to be written to: they may be views of memory that read workers share.
    """
    faults: list[Fault] = field(default_factory=list)
    """Bad samples met in this share; their slots hold substitutes."""


class Slots(TypedDict):
    """What every batch carries."""

    slot: Any
    row: Any
    weight: Any


class TextBatch(Slots):
    """Captions or prompts alone (gpt2)."""

    tokens: Any
    token_mask: Any


class ImageTextBatch(TextBatch):
    """Images with their captions (coca, stable_diffusion)."""

    image: Any


class LatentTextBatch(Slots):
    """Cached latents with cached states of their captions (stable_diffusion without its frozen towers)."""

    latent_mean: Any
    latent_logvar: Any
    text_states: Any


class EmbeddingPairBatch(Slots):
    """Precomputed embeddings of both modalities (dalle2_prior)."""

    image_embedding: Any
    text_embedding: Any


class ImageTargetBatch(Slots):
    """Images with the embedding of their caption as the target (clip_vit)."""

    image: Any
    text_embedding: Any


class ImageEmbeddingBatch(Slots):
    """Images with their own embedding as the condition (dalle2_decoder)."""

    image: Any
    image_embedding: Any


@dataclass(frozen=True)
class AspectBuckets:
    """Shapes of about one area; each picture takes the one nearest to its own aspect (NovelAI 2022, kohya's `enable_bucket`).

    Rows of a batch are as long whatever their shapes, so that blocks, caches and substitutes know of none: a picture or a latent stands
    first in the row of the square, in reading order, and what follows means nothing. `bucket` tells which shape a row has.
    """

    size: int
    """Side of the square, in pixels; no shape has more pixels than it."""
    shapes: tuple[tuple[int, int], ...]
    """(height, width) in pixels, from the widest to the tallest."""

    @classmethod
    def of(cls, size: int, step: int, max_aspect: float) -> AspectBuckets:
        """The square of `size`, a multiple of `step`, and for each shorter side the longest other one, both multiples of `step`.

        At most 2 · size / step − 1 shapes, whose longer side is up to `max_aspect` times the shorter one.
        """
        shapes = {(size, size)}
        for short in range(step, size, step):
            long = size * size // short // step * step
            if long <= max_aspect * short:
                shapes |= {(short, long), (long, short)}
        return cls(size, tuple(sorted(shapes)))

    def nearest(self, width: int, height: int) -> int:
        """Which shape is nearest to the aspect of `width` × `height` pixels: the one that it exceeds, or falls short of, by the least factor."""

        def distance(number: int) -> float:
            high, wide = self.shapes[number]
            return max(width * high / (height * wide), height * wide / (width * high))

        return min(range(len(self.shapes)), key=distance)

    def tail(self, key: str, bucket: int, square: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a row of the batch's `key` in `bucket`, where it is `square` in the row of the square."""
        high, wide = self.shapes[bucket]
        sides = {"H": high, "W": wide, "h": high, "w": wide}
        letters = FIELDS[key].shape[1:]
        # A latent has fewer places than pixels, by the same factor along each side.
        return tuple(sides[letter] * side // self.size if letter in sides else side for letter, side in zip(letters, square, strict=True))


@dataclass(frozen=True)
class ImageNeed:
    """Decoded pixels at one size, or at the nearest of several shapes of that area.

    Augmentation is a function of (seed, slot) alone, so that every worker and every attempt sees the same pixels.
    """

    size: int
    """Side of the square image, in pixels."""
    resize: Literal["center_crop", "random_crop", "pad", "squash"] = "center_crop"
    """`center_crop` and `random_crop` cover the square, `pad` fits into it (white border), `squash` distorts."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    min_scale: float = 1.0
    """Smallest share of the area that `random_crop` keeps (1 = only the position is random)."""
    buckets: AspectBuckets | None = None
    """Shapes that take the place of the square; its `size` is the need's."""

    @classmethod
    def of_shape(cls, height: int, width: int) -> ImageNeed:
        """Every picture in one shape, covered from its middle."""
        size = max(height, width)
        return cls(size, buckets=AspectBuckets(size, ((height, width),)))

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of what a picture of `width` × `height` pixels becomes."""
        return self.buckets.shapes[self.buckets.nearest(width, height)] if self.buckets else (self.size, self.size)


@dataclass(frozen=True)
class TokenNeed:
    """Token ids of the caption."""

    tokenizer: str
    """`open_clip` (its BPE of 49,408), a hub name, or a folder with a Hugging Face tokenizer."""
    length: int
    """Tokens per row; longer texts are cut, and the last token kept is then the end token."""


@dataclass(frozen=True)
class EmbeddingNeed:
    """One precomputed vector per sample, joined by key."""

    dim: int | None
    """Expected dimension; None takes what the data has."""


@dataclass(frozen=True)
class CachedNeed:
    """Members computed once by `diptych cache` and joined by key from the folders in `data.caches`.

    A cache holds each sample in variants (crops, each also flipped). Which one fills a slot is a function of (seed, slot)
    alone, the same for all keys of the batch.
    """

    keys: tuple[str, ...]
    """Keys of the batch: any of those in `CACHES`."""
    flip: float = 0.0
    """Probability of the flipped variant; above 0 the cache must hold flips."""
    expected: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What a cache of each kind must have been made with, as `diptych.provenance` says it; keys left out are free."""


@dataclass(frozen=True)
class Needs:
    """What a task needs of every sample. Only the members behind these are read."""

    image: ImageNeed | None = None
    tokens: TokenNeed | None = None
    image_embedding: EmbeddingNeed | None = None
    text_embedding: EmbeddingNeed | None = None
    cached: CachedNeed | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the batch, in the order of `FIELDS`."""
        wanted = {"slot", "row", "weight"}
        wanted |= {"image"} if self.image else set()
        wanted |= {"bucket"} if self.image and self.image.buckets else set()
        wanted |= {"tokens", "token_mask"} if self.tokens else set()
        wanted |= {"image_embedding"} if self.image_embedding else set()
        wanted |= {"text_embedding"} if self.text_embedding else set()
        wanted |= set(self.cached.keys) if self.cached else set()
        return tuple(key for key in FIELDS if key in wanted)


def check_batch(batch: Mapping[str, np.ndarray], needs: Needs) -> None:
    """Raise `ValueError` unless `batch` has exactly the keys, dtypes and shapes that `needs` and `FIELDS` state.

    Arrays may be NumPy arrays; the free sizes (B, H, W, L, C, h, w, T, not D) must agree between keys.
    """
    if set(batch) != set(needs.keys):
        raise ValueError(f"batch has keys {sorted(batch)}, the task needs {sorted(needs.keys)}")
    sizes: dict[str, int] = {}
    if needs.image:
        sizes |= {"H": needs.image.size, "W": needs.image.size}
    if needs.tokens:
        sizes["L"] = needs.tokens.length
    for key in needs.keys:
        field, array = FIELDS[key], batch[key]
        if str(array.dtype) != field.dtype or array.ndim != len(field.shape):
            raise ValueError(f"{key}: got {array.dtype} {list(array.shape)}, expected {field.dtype} {list(field.shape)}")
        for letter, size in zip(field.shape, array.shape, strict=True):
            # D is not shared: embeddings and states of images and texts may differ.
            expected = letter if isinstance(letter, int) else size if letter == "D" else sizes.setdefault(letter, size)
            if expected != size:
                raise ValueError(f"{key}: got {list(array.shape)}, expected {letter} = {expected}")
