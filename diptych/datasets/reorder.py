"""clip-retrieval's embeddings → DALLE2-pytorch's layout: one file per shard, row = the index digits of the key.

Two passes with bounded memory: the keys of all partitions are sorted on disk (`reorder_index`), then each shard's rows
are gathered from the partitions by ranged reads and its file is renamed into place, so that a file that is there is whole.
Rows without an embedding are zeros, which DALLE2-pytorch's loader takes as "none", and each is listed with its reason.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diptych.datasets import folders, ranged, storage
from diptych.datasets.npy import NpyFile, NpyWriter, open_npy
from diptych.datasets.reorder_index import NOWHERE, ROW_BITS, PlaceIndex, ShardRows

MODALITIES = ("img_emb", "text_emb")
WINDOW_BYTES = 16 << 20
"""Bytes of output that are gathered at once, and that one ranged read may take, per thread."""

_SHARDS_TOGETHER = 4
"""Neighbouring shards that one thread gathers one after the other, most of them from the same rows."""

_PARQUET_BUFFER_BYTES = 1 << 20
"""Metadata is read by pieces of it, not by whole columns of a row group, which may have millions of rows."""

SHARD_DIGITS = 5
"""Least digits of the shard in a file's name; more if there are more shards."""


@dataclass(frozen=True)
class Partition:
    """One of clip-retrieval's partitions."""

    metadata: str
    """URL of `metadata_{p}.parquet`."""
    embeddings: dict[str, NpyFile]
    """`img_emb` and `text_emb`, those that there are."""


@dataclass(frozen=True)
class Source:
    """A folder in clip-retrieval's layout."""

    partitions: list[Partition]
    shapes: dict[str, tuple[int, np.dtype]]
    """Modality → (dimension, dtype)."""

    @property
    def rows(self) -> int:
        """Embeddings in all partitions."""
        return sum(next(iter(part.embeddings.values())).rows for part in self.partitions)


@dataclass
class ShardResult:
    """What became of one shard."""

    name: str
    rows: int
    filled: int
    gaps: np.ndarray
    """Indices without an embedding, int64."""
    bad: dict[str, np.ndarray] = field(default_factory=dict)
    """Modality → indices whose embedding was zero or not finite, int64; zeros were written."""
    reused: bool = False
    """The files stood there already, from a run before."""


def open_source(folder: str) -> Source:
    """Read the headers of a folder in clip-retrieval's layout.

    Raises `ValueError` where a partition lacks its metadata, sizes disagree, or an array is not float [rows, dim].
    """
    metadata = {_partition(url): url for url in folders.list_files(storage.join(folder, "metadata"), ".parquet")}
    arrays = {kind: {_partition(url): url for url in folders.list_files(storage.join(folder, kind), ".npy")} for kind in MODALITIES}
    arrays = {kind: files for kind, files in arrays.items() if files}
    if not metadata or not arrays:
        raise ValueError(
            f"{folder} is not in clip-retrieval's layout: expected metadata/metadata_*.parquet and img_emb/*.npy or text_emb/*.npy. "
            "`diptych embed` and `clip-retrieval inference --enable_metadata True` write it."
        )
    for kind, files in arrays.items():
        if files.keys() != metadata.keys():
            lacking = sorted(files.keys() ^ metadata.keys())
            raise ValueError(f"{folder}: partitions {lacking[:5]} stand only in one of {kind} and metadata; finish the embedding first")
    partitions = [
        Partition(metadata[number], {kind: open_npy(files[number]) for kind, files in arrays.items()}) for number in sorted(metadata)
    ]
    shapes = {}
    for kind in arrays:
        found = {(part.embeddings[kind].dim, part.embeddings[kind].dtype) for part in partitions if part.embeddings[kind].rows}
        if len(found) != 1:
            raise ValueError(f"{folder}/{kind}: partitions differ in dimension or type: {sorted(map(str, found))}")
        shapes[kind] = found.pop()
    return Source(partitions, shapes)


def _partition(url: str) -> int:
    digits = url.rpartition("/")[2].partition(".")[0].rpartition("_")[2]
    if not digits.isdigit():
        raise ValueError(f"{url}: expected a name that ends with the partition's number, such as img_emb_0.npy")
    return int(digits)


def build_index(source: Source, shards: Sequence[ShardRows], width: int, folder: Path) -> PlaceIndex:
    """Sort the keys of all partitions into `folder`; `unplaced` of the result says what has no place."""
    index = PlaceIndex(folder, shards, width)
    for number, part in enumerate(source.partitions):
        with _system_memory(), folders.open_input(part.metadata) as stream:
            metadata = _open_metadata(part.metadata, stream)
            expected = next(iter(part.embeddings.values())).rows
            sizes = {kind: array.rows for kind, array in part.embeddings.items()} | {"metadata": metadata.metadata.num_rows}
            if set(sizes.values()) != {expected}:
                raise ValueError(f"{part.metadata}: rows disagree: {sizes}; embed that partition again")
            if expected == 0:
                continue
            column = "image_path" if "image_path" in metadata.schema_arrow.names else "key"
            if column not in metadata.schema_arrow.names:
                raise ValueError(f"{part.metadata} has neither column image_path nor key; found {metadata.schema_arrow.names}")
            index.add_partition(number, metadata, column)
    index.sort()
    return index


@contextmanager
def _system_memory() -> Iterator[None]:
    """Arrow's own allocator keeps what one thread allocates and another frees: 15 MB more after a million keys."""
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)


def _open_metadata(url: str, stream: object) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream, pre_buffer=False, buffer_size=_PARQUET_BUFFER_BYTES)
    except pa.ArrowException as error:
        raise ValueError(f"{url} cannot be read as Parquet ({error}); embed that partition again") from None


def write_shards(source: Source, index: PlaceIndex, out: str, may_reuse: bool = False, jobs: int = 2) -> Iterator[ShardResult]:
    """Write every shard's files below `out`/img_emb and `out`/text_emb; results come in the order of the shards.

    A shard without a single embedding gets no files: DALLE2-pytorch passes over its tar. `may_reuse` says that files which
    stand there are of these very inputs and need not be written again.
    """
    digits = max(SHARD_DIGITS, *(len(str(shard.number)) for shard in index.shards))
    for kind in source.shapes:
        folders.make_folder(storage.join(out, kind))

    buffers: queue.SimpleQueue[_Buffers] = queue.SimpleQueue()
    for _ in range(jobs):
        buffers.put(_Buffers(source))

    def several(items: Sequence[tuple[ShardRows, np.ndarray]]) -> list[ShardResult]:
        results, filled = [], []
        for shard, sources in items:
            taken = sources != NOWHERE
            result = ShardResult(shard.name, shard.rows, int(np.count_nonzero(taken)), np.flatnonzero(~taken))
            results.append(result)
            if result.filled:
                paths = {kind: storage.join(out, kind, f"{kind}_{shard.number:0{digits}d}.npy") for kind in source.shapes}
                result.reused = may_reuse and all(_is_whole(path, shard.rows) for path in paths.values())
                filled.append((sources, taken, paths, result))
        own = buffers.get()
        for kind in source.shapes:  # outermost, so that what was read of one modality is still there for the next shard
            arrays = [part.embeddings[kind] for part in source.partitions]
            for sources, taken, paths, result in filled:
                bad = _scan_zeros(paths[kind], taken) if result.reused else _write_shard(arrays, sources, own, paths[kind])
                if len(bad):
                    result.bad[kind] = bad
        buffers.put(own)
        return results

    # Few shards are dealt one by one, so that every thread has its share.
    together = max(1, min(_SHARDS_TOGETHER, len(index.shards) // (4 * jobs)))
    shards = index.by_shard()
    with ThreadPoolExecutor(jobs) as pool:
        for results in _in_order(pool, several, iter(lambda: list(itertools.islice(shards, together)), []), 2 * jobs):
            yield from results


class _Buffers:
    """Memory of one thread that gathers: the pages of fresh memory would cost as much as what is copied into them."""

    def __init__(self, source: Source) -> None:
        size = max(WINDOW_BYTES, *(dim * dtype.itemsize for dim, dtype in source.shapes.values()))
        self._read, self._block = np.empty(size, np.uint8), np.empty(size, np.uint8)
        self._held, self._start, self._stop = "", 0, 0

    def read(self, array: NpyFile, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of `array`, until the next call. What the last call read of them is not read again.

        Loader workers that take turns spread each shard over as many shards' rows as there are workers.
        """
        held = array.url == self._held and self._start <= start and 2 * (min(stop, self._stop) - start) >= stop - start
        if not held or (stop - self._start) * array.row_bytes > len(self._read):
            self._held, self._start, self._stop = array.url, start, start
        rows = self._rows(self._read, array, max(stop, self._stop) - self._start)
        if stop > self._stop:
            array.read_into(self._stop, rows[self._stop - self._start :])
            self._stop = stop
        return rows[start - self._start : stop - self._start]

    def block(self, array: NpyFile, rows: int) -> np.ndarray:
        """Room for rows like those of `array`, until the next call; holds anything."""
        return self._rows(self._block, array, rows)

    def _rows(self, memory: np.ndarray, array: NpyFile, rows: int) -> np.ndarray:
        return memory[: rows * array.row_bytes].view(array.dtype).reshape(rows, array.dim)


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[list[tuple[ShardRows, np.ndarray]]], list[ShardResult]],
    items: Iterator[list[tuple[ShardRows, np.ndarray]]],
    ahead: int,
) -> Iterator[list[ShardResult]]:
    pending = []
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) >= ahead:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


def _write_shard(arrays: Sequence[NpyFile], sources: np.ndarray, buffers: _Buffers, path: str) -> np.ndarray:
    """Gather one shard's rows and write its file; returns the indices whose embedding is unusable."""
    array, rows = arrays[0], len(sources)
    window = max(1, WINDOW_BYTES // array.row_bytes)
    unusable = []
    with NpyWriter(path, array.dtype, rows, array.dim) as writer:
        for start in range(0, rows, window):
            part = sources[start : start + window]
            block = _gather(arrays, part, buffers)
            bad = np.flatnonzero(~_usable(block) & (part != NOWHERE))
            block[bad] = 0
            unusable.append(bad + start)
            writer.write(block)
    return np.concatenate(unusable) if unusable else np.empty(0, np.int64)


def _gather(arrays: Sequence[NpyFile], sources: np.ndarray, buffers: _Buffers) -> np.ndarray:
    """The rows at `sources`, and zeros where there is none."""
    block = buffers.block(arrays[0], len(sources))
    most = max(1, WINDOW_BYTES // arrays[0].row_bytes)
    # As unsigned integers, gaps are the largest numbers.
    first, last = int(sources.view(np.uint64).min()), int(sources.max())
    if first <= last < first + most:  # the usual case: all of it in one read. Partitions differ by 2^40, so it is of one.
        file, start = divmod(first, 1 << ROW_BITS)
        np.take(buffers.read(arrays[file], start, start + last - first + 1), sources - first, axis=0, out=block, mode="clip")
        block[sources == NOWHERE] = 0
        return block
    block[:] = 0
    index = np.flatnonzero(sources != NOWHERE)
    index = index[np.argsort(sources[index])]
    source = sources[index]
    gap = max(1, ranged.LOCAL_GAP // arrays[0].row_bytes)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(source) > gap) + 1, [len(source)]))
    for start, stop in itertools.pairwise(starts.tolist()):
        while start < stop:
            end = start + int(np.searchsorted(source[start:stop], source[start] + most))
            file, first = divmod(int(source[start]), 1 << ROW_BITS)
            wanted = source[start:end] - source[start]
            block[index[start:end]] = buffers.read(arrays[file], first, first + int(wanted[-1]) + 1)[wanted]
            start = end
    return block


def _usable(rows: np.ndarray) -> np.ndarray:
    """Which rows are finite and not all zero, bool [n]. On the bits, because float16 arithmetic is slow on CPUs."""
    signed, unsigned = rows.view(rows.dtype.str.replace("f", "i")), rows.view(rows.dtype.str.replace("f", "u"))
    usable = signed[:, 0] != 0
    suspects = np.flatnonzero(~usable | (signed[:, 0] == np.iinfo(signed.dtype).min))  # that number is the float -0.0
    usable[suspects] = rows[suspects].any(axis=1)
    info = np.finfo(rows.dtype)
    infinity = ((1 << info.iexp) - 1) << info.nmant
    # Read as integers, infinities and NaN are the largest numbers: positive ones if signed, negative ones if unsigned.
    if signed.max(initial=0) >= infinity or unsigned.max(initial=0) >= infinity + (1 << (8 * rows.dtype.itemsize - 1)):
        usable &= np.isfinite(rows).all(axis=1)
    return usable


def _is_whole(path: str, rows: int) -> bool:
    try:
        return open_npy(path).rows == rows
    except (FileNotFoundError, ValueError):
        return False


def _scan_zeros(path: str, taken: np.ndarray) -> np.ndarray:
    array = open_npy(path)
    window = max(1, WINDOW_BYTES // array.row_bytes)
    found = [array.read(start, min(start + window, array.rows)) for start in range(0, array.rows, window)]
    usable = np.concatenate([_usable(rows) for rows in found]) if found else np.empty(0, bool)
    return np.flatnonzero(taken & ~usable)
