"""Manifest rows → arrays: only the members that are needed, read by range and decoded.

A bad sample is a fault beside the arrays and leaves its rows zero; the stream puts a substitute there. A read that fails
after its retries is raised instead, so that a flaky network never changes which samples a run sees.

Shape legend: B rows, D dimensions, L tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from diptych.batches import FIELDS, EmbeddingNeed, Fault, ImageNeed, Needs, TokenNeed
from diptych.config import ConfigError, DataConfig
from diptych.datasets import images, storage
from diptych.datasets.cached import CacheJoin, read_cached
from diptych.datasets.embeddings import EmbeddingJoin
from diptych.datasets.manifest import Manifest
from diptych.datasets.spare import SpareMemory
from diptych.datasets.survey import IMAGE_EXTENSIONS
from diptych.datasets.tokens import load_tokenizer

READ_AHEAD_BYTES = 1 << 24
"""Encoded bytes that are in memory at once: what bounds a read worker where pictures are much larger than their target."""
REMOTE_READS = 16
"""Ranged GETs in flight: their latency is what a remote read waits for. Locally threads cost more than they hide."""


@dataclass(frozen=True)
class SampleSource:
    """Where samples are read from; small, hashable and picklable. Opened at first use, once per process."""

    manifest: str
    """Folder of the manifest."""
    root: str
    """Where the shards lie."""
    join: str = ""
    """Folder of the saved `EmbeddingJoin`; empty where no embeddings are needed."""
    retries: int = storage.READ_RETRIES
    """Repetitions of one read after a transient error."""
    decoder: images.Decoder = "pil"
    caches: tuple[str, ...] = ()
    """Folders of the saved `CacheJoin`s."""
    digest: str = ""
    """Of the manifest, so that a restarted worker never reads the rows of data that changed meanwhile."""

    @classmethod
    def of(cls, manifest: Manifest, joined: EmbeddingJoin | None, data: DataConfig, caches: Sequence[CacheJoin] = ()) -> SampleSource:
        """The source of an open manifest and saved joins. The decoder is chosen here, so that all workers have the same."""
        saved = [each.saved for each in (*([joined] if joined is not None else []), *caches)]
        assert all(saved), "save the joins first: readers load them from their folders"
        join = saved.pop(0) if joined is not None else ""
        decoder = images.choose_decoder(data.decoder)
        return cls(manifest.folder, manifest.root, join, data.read_retries, decoder, tuple(saved), manifest.digest)

    def opened(self) -> OpenSource:
        """The open source of this process."""
        return _open(self)


class OpenSource(NamedTuple):
    """What `SampleSource` names, opened."""

    manifest: Manifest
    join: EmbeddingJoin | None
    caches: tuple[CacheJoin, ...] = ()


@functools.lru_cache(maxsize=4)
def _open(source: SampleSource) -> OpenSource:
    manifest = Manifest.load(source.manifest, source.root, source.digest)
    join = EmbeddingJoin.load(Path(source.join)) if source.join else None
    return OpenSource(manifest, join, tuple(CacheJoin.load(Path(folder)) for folder in source.caches))


class Samples(NamedTuple):
    """What `read_rows` returns."""

    arrays: dict[str, np.ndarray]
    """Keys of `Needs.keys` but `weight`; zeros at bad rows."""
    faults: list[tuple[int, Fault]]
    """`(index into the rows, fault)`: one per bad sample, in the order of the rows."""
    bytes_read: int
    """Bytes of the members read from the shards."""


class _Places(NamedTuple):
    """Where the image of every row stands."""

    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


_pixels = SpareMemory()


class _Found:
    """The first fault of every bad row."""

    def __init__(self, rows: np.ndarray, slots: np.ndarray) -> None:
        self.rows, self.slots = rows, slots
        self.by_index: dict[int, tuple[str, str]] = {}

    def add(self, index: int, kind: str, detail: str) -> None:
        self.by_index.setdefault(index, (kind, detail))

    def faults(self, manifest: Manifest) -> list[tuple[int, Fault]]:
        if not self.by_index:
            return []
        order = sorted(self.by_index)
        table = manifest.rows(self.rows[order], ["shard", "key"])
        places = zip(order, table["shard"].to_pylist(), table["key"].to_pylist(), strict=True)
        return [
            (index, Fault(manifest.shard_names[shard], key, *self.by_index[index], slot=int(self.slots[index])))
            for index, shard, key in places
        ]


def read_rows(source: SampleSource, rows: np.ndarray, slots: np.ndarray, needs: Needs, seed: int) -> Samples:
    """Read and decode manifest `rows` (int64 [B]) for `slots` (int64 [B], which crops and flips depend on).

    Raises `ReadError` where a read fails for good, `ConfigError` where the source lacks what `needs` asks for.
    """
    manifest, join, caches = source.opened()
    found = _Found(rows, slots)
    arrays = {"slot": np.array(slots, np.int64), "row": np.array(rows, np.int64)}
    # What is cheap comes first: a sample that is bad already is not decoded.
    for key, need in (("image_embedding", needs.image_embedding), ("text_embedding", needs.text_embedding)):
        if need is not None:
            arrays[key] = _read_embeddings(join, key.removesuffix("_embedding"), need, source.retries, found)
    if needs.cached is not None:
        cached = read_cached(caches, needs.cached, found.rows, found.slots, seed, source.retries)
        arrays |= cached.arrays
        for index, kind, detail in cached.faults:
            found.add(index, kind, detail)
    if needs.tokens is not None:
        arrays["tokens"], arrays["token_mask"] = _read_tokens(manifest, needs.tokens, found)
    bytes_read = 0
    if needs.image is not None:
        pictures, bytes_read = _read_images(source, manifest, needs.image, seed, found)
        arrays |= pictures
    for index in found.by_index:
        for key, array in arrays.items():
            if key not in ("slot", "row"):
                array[index] = 0
    return Samples({key: arrays[key] for key in FIELDS if key in arrays}, found.faults(manifest), bytes_read)


def row_bytes(needs: Needs, source: OpenSource) -> int:
    """Bytes of one decoded row."""
    total = sum(np.dtype(FIELDS[key].dtype).itemsize for key in ("slot", "row", "weight"))
    total += 3 * needs.image.size**2 + 8 * (needs.image.buckets is not None) if needs.image else 0
    total += 9 * needs.tokens.length if needs.tokens else 0
    kinds = [kind for kind in ("image", "text") if getattr(needs, f"{kind}_embedding") is not None]
    total += sum(4 * source.join.dim(kind) for kind in kinds if source.join is not None and kind in source.join.which)
    keys = needs.cached.keys if needs.cached else ()
    cached = [(key, cache.shape(key)) for cache in source.caches for key in cache.which if key in keys]
    return total + sum(np.dtype(FIELDS[key].dtype).itemsize * math.prod(shape) for key, shape in cached)


def _read_embeddings(join: EmbeddingJoin | None, which: str, need: EmbeddingNeed, retries: int, found: _Found) -> np.ndarray:
    if join is None or which not in join.which:
        raise ConfigError("data.embeddings", "no join", f"embeddings of kind {which}, which the task needs")
    if need.dim not in (None, join.dim(which)):
        raise ConfigError(
            "data.embeddings", f"{which} embeddings of dimension {join.dim(which)}", f"dimension {need.dim}, as the task needs"
        )
    vectors, bad = join.read(found.rows, which, retries)
    for index, kind, detail in bad:
        found.add(index, kind, detail)
    return vectors


def _read_tokens(manifest: Manifest, need: TokenNeed, found: _Found) -> tuple[np.ndarray, np.ndarray]:
    captions = manifest.rows(found.rows, ["caption"])["caption"]
    for index in np.flatnonzero(pc.is_null(captions).to_numpy()).tolist():
        found.add(index, "missing_member", "no caption: its text member is missing, empty or not UTF-8")
    for index in np.flatnonzero(pc.equal(pc.utf8_trim_whitespace(captions), "").fill_null(False).to_numpy()).tolist():
        found.add(index, "blank_caption", "its caption is white space alone")
    return load_tokenizer(need.tokenizer).encode(captions.fill_null("").to_pylist(), need.length)


def _read_images(
    source: SampleSource, manifest: Manifest, need: ImageNeed, seed: int, found: _Found
) -> tuple[dict[str, np.ndarray], int]:  # fmt: skip
    """`image`, with buckets also `bucket`; and the bytes read."""
    # Every row is written below, or zeroed as a bad one: to zero all of them beforehand took 3 % of a read worker.
    pixels = _pixels.take(3 * len(found.rows) * need.size**2).reshape(-1, need.size, need.size, 3)
    bucket = np.zeros(len(found.rows), np.int64)
    places = _Places(*manifest.members(found.rows, IMAGE_EXTENSIONS))
    sizes = places.sizes
    for index in np.flatnonzero(sizes < 0).tolist():
        found.add(index, "missing_member", "no image: none of its members is one")
    for index in np.flatnonzero(sizes == 0).tolist():
        found.add(index, "empty_member", "its image has no bytes")
    for index in np.flatnonzero(sizes > images.MAX_BYTES).tolist():
        found.add(index, "oversized_member", f"its image has {sizes[index]} bytes, at most {images.MAX_BYTES} are read")
    good = np.array([index for index in range(len(sizes)) if index not in found.by_index], np.int64)
    drawn = images.image_draws(seed, found.slots)
    # By place in the shards, so that neighbours are read together; the arrays keep the order of the slots.
    good = good[np.lexsort((places.offsets[good], places.shards[good]))]
    for part in _parts(good, sizes):
        for index, data in _read_members(manifest, part, places, source.retries):
            try:
                picture = images.decode_image(data, need, drawn[index], source.decoder)
            except images.BadImageError as error:
                found.add(index, "undecodable_image", str(error))
                continue
            row = pixels[index].reshape(-1)
            row[: picture.size].reshape(picture.shape)[:] = picture
            row[picture.size :] = 0
            bucket[index] = need.buckets.shapes.index(picture.shape[:2]) if need.buckets else 0
    return {"image": pixels} | ({"bucket": bucket} if need.buckets else {}), int(sizes[good].sum())


def _parts(order: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive pieces of `order` with at most `READ_AHEAD_BYTES` each, or one member."""
    if len(order):
        number = np.cumsum(sizes[order]) // READ_AHEAD_BYTES
        yield from np.split(order, np.flatnonzero(np.diff(number)) + 1)


def _read_members(manifest: Manifest, part: np.ndarray, places: _Places, retries: int) -> Iterator[tuple[int, bytes]]:
    """`(index, bytes)` of every member in `part`, which is sorted by shard."""
    groups = np.split(part, np.flatnonzero(np.diff(places.shards[part])) + 1)

    def read(group: np.ndarray) -> Iterator[tuple[int, bytes]]:
        ranges = list(zip(places.offsets[group].tolist(), places.sizes[group].tolist(), strict=True))
        for place, data in storage.iter_ranges(manifest.shard_url(int(places.shards[group[0]])), ranges, retries=retries):
            yield int(group[place]), data

    if storage.is_local(manifest.root):
        for group in groups:
            yield from read(group)
        return
    # Ranges far apart are separate requests, so a group that spans many is cut for the pool.
    groups = [piece for group in groups for piece in np.array_split(group, min(len(group), REMOTE_READS))]
    with ThreadPoolExecutor(REMOTE_READS) as pool:
        for found in pool.map(lambda group: list(read(group)), groups):
            yield from found
