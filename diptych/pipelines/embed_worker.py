"""What an embedding actor does: read a partition's samples, decode them in threads, run the model, write the partition.

Two partitions are in flight in each actor, and batches are decoded ahead of the model, so that the device does not wait
at their seams. A sample that cannot be embedded is a fault with its shard and key; every other one has its row.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diptych.batches import Fault
from diptych.datasets import storage
from diptych.datasets.embed_layout import Layout
from diptych.datasets.images import open_picture
from diptych.datasets.keep import Selection
from diptych.datasets.manifest import Manifest
from diptych.datasets.survey import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from diptych.trainers.clip_embedder import ModelName

PARTITIONS_IN_FLIGHT = 2
_BATCHES_AHEAD = 2
"""Decoded batches that wait for the model, beside the one of each decoding thread."""


@dataclass(frozen=True)
class EmbedSpec:
    """What every actor needs to know; small and picklable."""

    manifest: Manifest
    selection: Selection
    layout: Layout
    model: ModelName
    modalities: tuple[str, ...]
    batch_size: int
    precision: str
    device: str
    threads: int
    """Threads of an actor, for decoding and for the model each."""


class Batch(NamedTuple):
    """Samples that are ready for the model."""

    rows: np.ndarray
    """int64 [B]: manifest rows of the good samples."""
    keys: list[str]
    shards: list[str]
    captions: list[str | None]
    pixels: np.ndarray | None
    """uint8 [B, S, S, 3]"""
    faults: list[Fault]


class EmbedWorker:
    """One model and its threads. Calls may overlap; the model serves one at a time."""

    def __init__(self, spec: EmbedSpec) -> None:
        import torch

        from diptych.trainers.clip_embedder import Embedder

        if spec.device == "cpu":
            torch.set_num_threads(spec.threads)
        self.spec = spec
        self.embedder = Embedder(spec.model, spec.device, spec.precision)
        self.dims = self.embedder.warm_up(spec.modalities)
        self.pool = ThreadPoolExecutor(spec.threads)
        self.turn = threading.Lock()

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Embed and write the partition `task["partition"]`; a row of Ray Data in and out."""
        partition = int(task["partition"])
        start, stop = self.spec.layout.span(partition)
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.spec.modalities}
        columns: dict[str, list[str | None]] = {"image_path": [], "caption": [], "shard": []}
        faults: list[Fault] = []
        for batch, vectors in self.embed(self.spec.selection[np.arange(start, stop)]):
            faults += batch.faults
            columns["image_path"] += batch.keys
            columns["caption"] += batch.captions
            columns["shard"] += batch.shards
            for name, values in vectors.items():
                found[name].append(values)
        stacked = {name: np.concatenate(parts) for name, parts in found.items()}
        self.spec.layout.write(partition, stacked, columns, faults)
        return {"partition": partition}

    def embed(self, rows: np.ndarray) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """Batches of manifest `rows` with float32 [B, D] of each modality, in order."""
        size = self.spec.batch_size
        pieces = [rows[first : first + size] for first in range(0, len(rows), size)]
        for batch in self._ahead(pieces):
            with self.turn:
                vectors = {}
                if not len(batch.rows):
                    vectors = {name: np.zeros((0, dim), np.float32) for name, dim in self.dims.items()}
                elif batch.pixels is not None:
                    vectors["image"] = self.embedder.images(batch.pixels)
                if len(batch.rows) and "text" in self.spec.modalities:
                    vectors["text"] = self.embedder.texts([caption or "" for caption in batch.captions])
            yield batch, vectors

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
        if "text" in self.spec.modalities:
            bad |= {index: ("missing_member", "no caption") for index, caption in enumerate(captions) if caption is None}
        pixels: dict[int, np.ndarray] = {}
        if "image" in self.spec.modalities:
            for index, data in enumerate(_encoded_images(manifest, rows)):
                if data is None or not data:
                    bad.setdefault(index, ("missing_member", "no image") if data is None else ("empty_member", "its image has no bytes"))
                elif index not in bad:
                    try:
                        pixels[index] = self.embedder.pixels(open_picture(data))
                    except Exception as error:  # Decoders raise OSError, SyntaxError, struct.error, … on damaged bytes.
                        bad[index] = ("undecodable_image", f"{type(error).__name__}: {error}")
        good = [index for index in range(len(rows)) if index not in bad]
        stacked = None
        if "image" in self.spec.modalities:
            stacked = np.stack([pixels[index] for index in good]) if good else np.zeros((0, 1, 1, 3), np.uint8)
        return Batch(
            rows[good],
            [keys[index] for index in good],
            [shards[index] for index in good],
            [captions[index] for index in good],
            stacked,
            [Fault(shards[index], keys[index], *bad[index]) for index in sorted(bad)],
        )


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
