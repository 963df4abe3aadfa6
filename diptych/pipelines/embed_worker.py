"""What an actor does: read a partition's samples, make them ready in threads, run the model, write the partition.

`embed` and `cache` differ only in their `Work`: what is read of a sample, and what the model makes of it. Two partitions
are in flight in each actor, and batches are decoded ahead of the model, so that the device does not wait at their seams. A sample that nothing can be made of is a fault with its shard and key; every other one has its row.
"""

from __future__ import annotations

import abc
import itertools
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diptych.batches import Fault
from diptych.datasets import storage
from diptych.datasets.embed_layout import Layout
from diptych.datasets.images import open_picture
from diptych.datasets.keep import Selection
from diptych.datasets.manifest import Manifest
from diptych.datasets.survey import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from diptych.trainers.clip_embedder import Embedder
    from diptych.trainers.model_name import ModelName

PARTITIONS_IN_FLIGHT = 2
_BATCHES_AHEAD = 2
"""Decoded batches that wait for the model, beside the one of each decoding thread."""


class Work(abc.ABC):
    """A model and what it is fed. Small and picklable until `load`, which each actor calls once."""

    reads: tuple[str, ...]
    """Members of a sample: `image`, `text`. Samples without one are faults."""

    @abc.abstractmethod
    def load(self, device: str) -> None:
        """Load the model and see that it runs. Raises `ConfigError`."""

    @abc.abstractmethod
    def ready(self, data: bytes, row: int) -> np.ndarray:
        """uint8: an encoded picture of manifest row `row` made ready. Raises what decoding raises."""

    @abc.abstractmethod
    def encode(self, pixels: np.ndarray | None, captions: list[str]) -> dict[str, np.ndarray]:
        """float [B, …] by array of the layout, of B ≥ 1 samples whose pictures have one shape."""

    @abc.abstractmethod
    def empty(self) -> dict[str, np.ndarray]:
        """float [0, …] by array: what a partition without a good sample holds."""


@dataclass
class EmbedWork(Work):
    """Embeddings of both modalities, or of one."""

    model: ModelName
    reads: tuple[str, ...]
    precision: str
    _embedder: Embedder | None = None
    _dims: dict[str, int] = field(default_factory=dict)

    @property
    def embedder(self) -> Embedder:
        """The loaded model."""
        assert self._embedder is not None, "load comes first"
        return self._embedder

    def load(self, device: str) -> None:
        """See `Work.load`."""
        from diptych.trainers.clip_embedder import Embedder

        self._embedder = Embedder(self.model, device, self.precision)
        self._dims = self._embedder.warm_up(self.reads)

    def ready(self, data: bytes, row: int) -> np.ndarray:
        """uint8 [S, S, 3] as the model's library makes it."""
        return self.embedder.pixels(open_picture(data))

    def encode(self, pixels: np.ndarray | None, captions: list[str]) -> dict[str, np.ndarray]:
        """float32 [B, D] by modality."""
        vectors = {"image": self.embedder.images(pixels)} if pixels is not None else {}
        return vectors | ({"text": self.embedder.texts(captions)} if "text" in self.reads else {})

    def empty(self) -> dict[str, np.ndarray]:
        """See `Work.empty`."""
        return {name: np.zeros((0, dim), np.float32) for name, dim in self._dims.items()}


@dataclass(frozen=True)
class EmbedSpec:
    """What every actor needs to know; small and picklable."""

    manifest: Manifest
    selection: Selection
    layout: Layout
    work: Work
    batch_size: int
    device: str
    threads: int
    """Threads of an actor, for decoding and for the model each."""

    @property
    def samples(self) -> int:
        """Samples of the whole output."""
        return self.layout.samples

    def saved(self) -> EmbedSpec:
        """The same with the selection beside the manifest, so that every actor maps one file instead of unpickling its own rows."""
        path = os.path.join(self.manifest.folder, f"embed-{self.selection.digest[:16]}.npy")
        return replace(self, selection=self.selection.save(path))


class Stack(NamedTuple):
    """Ready pictures of one shape."""

    places: np.ndarray
    """int64 [b]: which of the batch's samples they are."""
    pixels: np.ndarray
    """uint8 [b, …], as `Work.ready` made them."""


class Batch(NamedTuple):
    """Samples that are ready for the model."""

    rows: np.ndarray
    """int64 [B]: manifest rows of the good samples."""
    keys: list[str]
    shards: list[str]
    captions: list[str | None]
    stacks: list[Stack] | None
    """Their pictures; None where none are read."""
    faults: list[Fault]


class EmbedWorker:
    """One model and its threads. Calls may overlap; the model serves one at a time."""

    def __init__(self, spec: EmbedSpec) -> None:
        import torch

        if spec.device == "cpu":
            torch.set_num_threads(spec.threads)
        self.spec, self.work = spec, spec.work
        self.work.load(spec.device)
        self.pool = ThreadPoolExecutor(spec.threads)
        self.turn = threading.Lock()

    def compute(self, partition: int) -> int:
        """Embed and write one partition; returns its number."""
        start, stop = self.spec.layout.span(partition)
        found = {name: [_to_half(nothing)] for name, nothing in self.work.empty().items()}
        columns: dict[str, list[str | None]] = {"image_path": [], "caption": [], "shard": []}
        faults: list[Fault] = []
        for batch, vectors in self.embed(self.spec.selection[np.arange(start, stop)]):
            halves = {name: _to_half(values) for name, values in vectors.items()}
            finite = np.ones(len(batch.rows), bool)
            for values in halves.values():
                finite &= np.isfinite(values.reshape(len(values), -1)).all(axis=1)
            faults += batch.faults
            for index in np.flatnonzero(~finite).tolist():
                faults.append(
                    Fault(batch.shards[index], batch.keys[index], "not_finite", "the model's output holds NaN or infinity in float16")
                )
            for name, column in (("image_path", batch.keys), ("caption", batch.captions), ("shard", batch.shards)):
                columns[name] += [value for value, good in zip(column, finite, strict=True) if good]
            for name, values in halves.items():
                found[name].append(values[finite])
        stacked = {name: np.concatenate(parts) for name, parts in found.items()}
        self.spec.layout.write(partition, stacked, columns, faults)
        return partition

    def embed(self, rows: np.ndarray) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """Batches of manifest `rows` with float32 [B, …] of each array, in order."""
        size = self.spec.batch_size
        pieces = [rows[first : first + size] for first in range(0, len(rows), size)]
        for batch in self._ahead(pieces):
            with self.turn:
                vectors = self._encode(batch) if len(batch.rows) else self.work.empty()
            yield batch, vectors

    def _encode(self, batch: Batch) -> dict[str, np.ndarray]:
        """float32 [B, …] by array, in the order of the samples."""
        captions = [caption or "" for caption in batch.captions]
        if batch.stacks is None:
            return self.work.encode(None, captions)
        made = [self.work.encode(stack.pixels, [captions[place] for place in stack.places.tolist()]) for stack in batch.stacks]
        order = np.argsort(np.concatenate([stack.places for stack in batch.stacks]))
        return {name: np.concatenate([part[name] for part in made])[order] for name in made[0]}

    def _ahead(self, pieces: Iterable[np.ndarray]) -> Iterator[Batch]:
        """`prepare` of every piece, in order, a bounded number of them ahead."""
        waiting: deque[Future[Batch]] = deque()
        source = iter(pieces)
        for piece in itertools.islice(source, self.spec.threads + _BATCHES_AHEAD):
            waiting.append(self.pool.submit(self.prepare, piece))
        while waiting:
            batch = waiting.popleft().result()
            for piece in itertools.islice(source, 1):
                waiting.append(self.pool.submit(self.prepare, piece))
            yield batch

    def prepare(self, rows: np.ndarray) -> Batch:
        """Read and decode. Raises `ReadError` where a read fails for good: only faults in the bytes leave a sample out."""
        manifest = self.spec.manifest
        table = manifest.rows(rows, ["key", "caption"])
        keys, captions = table["key"].to_pylist(), table["caption"].to_pylist()
        shards = [manifest.shard_names[number] for number in manifest.shard_of(rows).tolist()]
        bad: dict[int, tuple[str, str]] = {}
        if "text" in self.work.reads:
            bad |= {index: ("missing_member", "no caption") for index, caption in enumerate(captions) if caption is None}
        pixels: dict[int, np.ndarray] = {}
        if "image" in self.work.reads:
            for index, data in enumerate(_encoded_images(manifest, rows)):
                if data is None or not data:
                    bad.setdefault(index, ("missing_member", "no image") if data is None else ("empty_member", "its image has no bytes"))
                elif index not in bad:
                    try:
                        pixels[index] = self.work.ready(data, int(rows[index]))
                    except Exception as error:  # Decoders raise OSError, SyntaxError, struct.error, … on damaged bytes.
                        bad[index] = ("undecodable_image", f"{type(error).__name__}: {error}")
        good = [index for index in range(len(rows)) if index not in bad]
        return Batch(
            rows[good],
            [keys[index] for index in good],
            [shards[index] for index in good],
            [captions[index] for index in good],
            _stacks([pixels[index] for index in good]) if "image" in self.work.reads else None,
            [Fault(shards[index], keys[index], *bad[index]) for index in sorted(bad)],
        )


def _stacks(pictures: list[np.ndarray]) -> list[Stack]:
    """`pictures`, those of one shape together."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(pictures):
        places.setdefault(picture.shape, []).append(place)
    return [Stack(np.array(found, np.int64), np.stack([pictures[place] for place in found])) for found in places.values()]


def _to_half(values: np.ndarray) -> np.ndarray:
    """As it will be stored; what is too large becomes infinity, which is looked for."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _encoded_images(manifest: Manifest, rows: np.ndarray) -> list[bytes | None]:
    """The encoded image of every row, neighbours read together; None where a sample has none."""
    shards, offsets, sizes = manifest.members(rows, IMAGE_EXTENSIONS)
    found: list[bytes | None] = [None] * len(rows)
    for shard in np.unique(shards):
        chosen = np.flatnonzero((shards == shard) & (sizes >= 0))
        ranges = list(zip(offsets[chosen].tolist(), sizes[chosen].tolist(), strict=True))
        for index, data in zip(chosen.tolist(), storage.read_ranges(manifest.shard_url(int(shard)), ranges), strict=True):
            found[index] = data
    return found
