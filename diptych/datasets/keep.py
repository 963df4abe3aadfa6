"""Keep-lists and splits: which rows of a manifest a run uses.

Tars are never rewritten. A keep-list is a Parquet of (shard, key) with the digest of the data it was made from; lists
combine by and, or and minus. The validation split looks at the hash of the key mixed with `split_seed` alone, so one
tar still gives a validation set, and adding shards never moves a sample from one side to the other.

Shape legend: N rows of the manifest, K rows selected.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diptych.config import ConfigError
from diptych.datasets import storage
from diptych.datasets.bitmap import Bitmap
from diptych.datasets.manifest import Manifest

KEEP_SCHEMA = pa.schema([("shard", pa.string()), ("key", pa.string())])
CHUNK_ROWS = 1 << 17
"""Rows that are split together."""
ARRAY_BYTES = 1 << 27
"""An array of row numbers up to this size is kept as one: a row is found in it faster than in a bitmap, which takes a microsecond."""


@dataclass(frozen=True)
class Selection:
    """Sorted rows of a manifest. Once saved it is pickled as a path, so that workers map the file instead of copying rows."""

    rows: np.ndarray | Bitmap | None
    """int64 [K], sorted, each once, or for very many a bitmap; None = every row, which costs no memory."""
    samples: int
    """K."""
    digest: str
    """Identity of (manifest, rows); checkpoints and caches carry it."""
    path: str = ""
    """The `.npy` that `save` wrote; empty until then, and for every row."""

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """int64: the manifest rows at positions `index` of the selection."""
        return np.asarray(index, np.int64) if self.rows is None else self.rows[index]

    def before(self, rows: np.ndarray) -> np.ndarray:
        """int64 [R]: how many selected rows are smaller than each of the manifest rows `rows` (int64 [R])."""
        if self.rows is None:
            return rows
        return self.rows.before(rows) if isinstance(self.rows, Bitmap) else np.searchsorted(self.rows, rows)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path:
            return (Selection.load, (self.path, self.samples, self.digest))
        return (Selection, (self.rows, self.samples, self.digest))

    def save(self, path: str | os.PathLike[str]) -> Selection:
        """Write the rows to a local `.npy` and return the same selection, memory-mapped from there."""
        if self.rows is None:
            return self
        buffer = io.BytesIO()
        np.save(buffer, self.rows.blocks if isinstance(self.rows, Bitmap) else self.rows)
        storage.write_bytes(os.fspath(path), buffer.getbuffer())
        return Selection.load(os.path.abspath(path), self.samples, self.digest)

    @classmethod
    def load(cls, path: str, samples: int, digest: str) -> Selection:
        """Map what `save` wrote; `samples` and `digest` are those of the saved selection. Raises `ConfigError` if they differ."""
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        rows = Bitmap(stored) if Bitmap.is_of(stored) else stored
        if len(rows) != samples or stored.dtype != np.int64:
            raise ConfigError(
                "selection", f"{path}: {stored.dtype} {list(stored.shape)}", f"int64 [{samples}]", "Start the run again to write it."
            )
        return cls(rows, samples, digest, path)


def write_keep(path: str, manifest: Manifest, rows: np.ndarray) -> None:
    """Write the keep-list of these manifest rows, atomically."""
    table = keep_table(manifest, rows)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(path, buffer.getvalue())


def keep_table(manifest: Manifest, rows: np.ndarray) -> pa.Table:
    """(shard, key) of these rows, in the manifest's order, with the data's digest in the metadata."""
    rows = np.unique(np.asarray(rows, np.int64))
    names = pa.array(manifest.shard_names, pa.string()).take(pa.array(manifest.shard_of(rows)))
    table = pa.Table.from_arrays([names, manifest.rows(rows, ["key"])["key"]], schema=KEEP_SCHEMA)
    return table.replace_schema_metadata({"digest": manifest.digest})


def read_keep(path: str, manifest: Manifest) -> np.ndarray:
    """int64, sorted: the rows of `manifest` that the list keeps.

    A list made from other data is refused if it names a sample that this manifest does not have: shards were added
    where it only names fewer. Raises `ConfigError`.
    """
    try:
        # Read by this thread alone: pyarrow's own would still hold Python's bytes at exit, and abort the process.
        table = pq.ParquetFile(io.BytesIO(storage.read_bytes(path)), pre_buffer=False).read(use_threads=False)
    except FileNotFoundError:
        raise ConfigError("data.keep", path, "keep-lists that exist", "`diptych filter` and `diptych dedup` write them.") from None
    except pa.ArrowException as error:
        raise ConfigError("data.keep", path, "a Parquet with the columns shard and key", str(error)) from None
    if not set(KEEP_SCHEMA.names) <= set(table.schema.names):
        raise ConfigError("data.keep", f"{path} with {table.schema.names}", "a Parquet with the columns shard and key")
    rows, missing = rows_of(manifest, table)
    if missing is not None:
        made_from = (table.schema.metadata or {}).get(b"digest", b"unknown data").decode()
        allowed = f"samples of the data {manifest.digest[:12]}…; the list was made from {made_from[:12]}…"
        raise ConfigError("data.keep", f"{path}: {missing[0]}/{missing[1]}", allowed, "Make the list again from these shards.")
    return rows


def rows_of(manifest: Manifest, table: pa.Table) -> tuple[np.ndarray, tuple[str, str] | None]:
    """(sorted rows of the table's (shard, key) pairs, the first pair that the manifest lacks)."""
    numbers = {name: index for index, name in enumerate(manifest.shard_names)}
    keys = manifest.columns.texts("key")
    found: list[np.ndarray] = []
    encoded = table["shard"].combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    wanted_keys = table["key"].combine_chunks().cast(pa.large_string())
    for code, shard in enumerate(encoded.dictionary.to_pylist()):
        wanted = wanted_keys.take(pa.array(order[ends[code] : ends[code + 1]]))
        if shard not in numbers:
            return np.empty(0, np.int64), (shard, wanted[0].as_py())
        start, end = manifest.shard_starts[numbers[shard] : numbers[shard] + 2]
        places = pc.index_in(wanted, keys.slice(start, end - start))
        if places.null_count:
            return np.empty(0, np.int64), (shard, wanted.filter(pc.is_null(places))[0].as_py())
        found.append(places.to_numpy().astype(np.int64) + start)
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64), None


def combine(paths: Sequence[str], how: Literal["and", "or", "minus"], manifest: Manifest) -> np.ndarray:
    """int64, sorted: rows kept by all lists (`and`), by any (`or`), or by the first and none of the others (`minus`)."""
    if not paths:
        raise ConfigError("keep-lists", list(paths), "one or more paths")
    operations: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "and": functools.partial(np.intersect1d, assume_unique=True),
        "or": np.union1d,
        "minus": functools.partial(np.setdiff1d, assume_unique=True),
    }
    if how not in operations:
        raise ConfigError("how", how, ", ".join(operations))
    return functools.reduce(operations[how], (read_keep(path, manifest) for path in paths))


def select(manifest: Manifest, keep: Sequence[str], validation_share: float, split_seed: int) -> tuple[Selection, Selection]:
    """(training rows, validation rows): those that every keep-list keeps, split by the hash of their key.

    Raises `ConfigError` if nothing is left to train on, or if a validation set was asked for and none came out.
    """
    kept = combine(keep, "and", manifest) if keep else None
    total = manifest.samples if kept is None else len(kept)
    if not total:
        remedy = "The keep-lists have no sample in common." if keep else "`diptych index` says what was found in the shards."
        raise ConfigError("data.shards", manifest.root, "shards with at least one sample", remedy)
    if not validation_share:
        return _selection(manifest, kept, total), _selection(manifest, np.empty(0, np.int64), 0)
    sides = _split(manifest, kept, validation_share, split_seed)
    counts = [side.seal() for side in sides]
    if not counts[0]:
        remedy = "Lower it, or use more data."
        raise ConfigError("data.validation_share", validation_share, f"a share that leaves some of the {total} samples to train on", remedy)
    return _selection(manifest, sides[0], counts[0]), _selection(manifest, sides[1], counts[1])


def _split(manifest: Manifest, kept: np.ndarray | None, validation_share: float, split_seed: int) -> tuple[Bitmap, Bitmap]:
    """(to train on, held out), not sealed yet. A piece of the manifest at a time, so that memory is two bits a row."""
    train, held_out = Bitmap.empty(manifest.samples), Bitmap.empty(manifest.samples)
    for start in range(0, manifest.samples, CHUNK_ROWS):
        held = in_validation(manifest.columns["key_hash"][start : start + CHUNK_ROWS], validation_share, split_seed)
        among = np.ones(len(held), bool)
        if kept is not None:
            among[:] = False
            among[kept[slice(*np.searchsorted(kept, (start, start + len(held))))] - start] = True
        train.put(start, among & ~held)
        held_out.put(start, among & held)
    return train, held_out


def in_validation(key_hash: np.ndarray, validation_share: float, split_seed: int) -> np.ndarray:
    """Which samples are held out, as bool [K]. A function of the key's hash, the share and the seed; growing the share only adds."""
    seed = np.uint64(int.from_bytes(hashlib.blake2b(b"split %d" % split_seed, digest_size=8).digest(), "little"))
    mixed = np.asarray(key_hash, np.uint64) ^ seed
    # The finaliser of SplitMix64 (Steele, Lea, Flood 2014): an exclusive or alone would only permute the two sides.
    with np.errstate(over="ignore"):
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) < validation_share * 2.0**53


def _chunks(rows: np.ndarray | Bitmap) -> Iterator[np.ndarray]:
    """The rows, ascending, in pieces."""
    if isinstance(rows, Bitmap):
        return rows.chunks()
    return (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS))


def _selection(manifest: Manifest, rows: np.ndarray | Bitmap | None, samples: int) -> Selection:
    if samples == manifest.samples:
        rows = None
    if isinstance(rows, Bitmap) and 8 * samples <= max(ARRAY_BYTES, rows.blocks.nbytes):
        rows = np.concatenate(list(rows.chunks()))
    # Over the numbers and not over how they are held: it stands in checkpoints and caches.
    digest = hashlib.sha256(f"{manifest.digest} {samples}\n".encode())
    for chunk in [] if rows is None else _chunks(rows):
        digest.update(np.ascontiguousarray(chunk, "<i8").data)
    return Selection(rows, samples, digest.hexdigest())
