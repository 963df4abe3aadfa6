"""The manifest's columns as flat arrays on disk, memory-mapped: random rows cost no decompression and no memory.

Training asks for rows in shuffled order from hundreds of shards at once. Parquet would decompress a whole row group
for each; these arrays are read where they lie, and the page cache is shared by all processes of a machine. Texts are
one array of bytes and one of starts, as in Arrow, so that pyarrow takes rows from the mapped file without a copy.

Shape legend: N rows, M members of all rows.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

DTYPES = {
    "key_hash": "<u8",  # [N] blake2b-8 of the key's UTF-8 bytes, little-endian
    "key_start": "<i8",  # [N + 1]
    "key_text": "u1",
    "caption_start": "<i8",  # [N + 1]; a caption without bytes is null
    "caption_text": "u1",
    "width": "<i4",  # [N] pixels, -1 where unknown
    "height": "<i4",  # [N]
    "member_start": "<i8",  # [N + 1]
    "member_extension": "<i4",  # [M] index into the manifest's extensions
    "member_offset": "<i8",  # [M] bytes
    "member_size": "<i8",  # [M] bytes
}

SMALL_BYTES = 1 << 28
"""Bytes of columns that may stay mapped as a whole."""
ROWS_MAPPED = 512
"""Random rows after which larger columns are unmapped: about 250 MB of pages."""


class ColumnWriter:
    """Appends tables of rows (the manifest's schema) to the arrays in `folder`; memory does not grow with the rows."""

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        self.extensions: dict[str, int] = {}
        self._files: dict[str, IO[bytes]] = {name: open(Path(folder, f"{name}.bin"), "wb") for name in DTYPES}  # noqa: SIM115
        self._ends = {"key": 0, "caption": 0, "member": 0}
        for name in self._ends:
            self._write(f"{name}_start", np.zeros(1))

    def append(self, table: pa.Table) -> None:
        """Add the rows of one shard."""
        table = table.combine_chunks()
        self._write("key_hash", table["key_hash"].to_numpy())
        for name in ("width", "height"):
            self._write(name, table[name].fill_null(-1).to_numpy())
        for name in ("key", "caption"):
            texts = _one_chunk(table[name].fill_null("").cast(pa.large_string()))
            starts, text = _starts_and_bytes(texts)
            self._write_ragged(name, starts)
            self._write(f"{name}_text", text)
        members = _one_chunk(table["members"])
        starts = members.offsets.to_numpy()
        flat = members.flatten()
        extensions = flat.field("ext").dictionary_encode()
        codes = [self.extensions.setdefault(extension, len(self.extensions)) for extension in extensions.dictionary.to_pylist()]
        self._write_ragged("member", starts)
        self._write("member_extension", np.asarray(codes, np.int32)[extensions.indices.to_numpy()])
        self._write("member_offset", flat.field("offset").to_numpy())
        self._write("member_size", flat.field("size").to_numpy())

    def close(self) -> None:
        """Finish the files; may be called twice."""
        for file in self._files.values():
            file.close()

    def _write_ragged(self, name: str, starts: np.ndarray) -> None:
        self._write(f"{name}_start", starts[1:] - starts[0] + self._ends[name])
        self._ends[name] += int(starts[-1] - starts[0])

    def _write(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, DTYPES[name]).data)


class Columns:
    """The arrays that `ColumnWriter` wrote, memory-mapped and read-only. Safe to share between threads."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._maps = {name: _map(Path(folder, f"{name}.bin")) for name in DTYPES}
        self.arrays = {name: np.frombuffer(mapped, DTYPES[name]) for name, mapped in self._maps.items()}
        self._bytes = sum(len(mapped) for mapped in self._maps.values())
        self._touched = 0

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def touched(self, rows: int) -> None:
        """Count random rows read, and let go of mapped pages now and then.

        The kernel maps 64 kB around each; they are page cache and cost nothing, but they count as memory of this process,
        and Ray kills workers by that.
        """
        self._touched += rows
        if self._touched >= ROWS_MAPPED and self._bytes > SMALL_BYTES:
            self._touched = 0
            for mapped in self._maps.values():
                if isinstance(mapped, mmap.mmap):
                    mapped.madvise(mmap.MADV_DONTNEED)

    def texts(self, name: str) -> pa.LargeStringArray:
        """Column `key` or `caption` as an Arrow array over the mapped file."""
        starts, text = self[f"{name}_start"], self[f"{name}_text"]
        return pa.LargeStringArray.from_buffers(len(starts) - 1, pa.py_buffer(starts), pa.py_buffer(text))

    def members_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index [sum of counts] of every member of `rows` into the member arrays, counts [len(rows)])."""
        starts = self["member_start"][rows]
        counts = self["member_start"][rows + 1] - starts
        before = np.cumsum(counts) - counts
        return np.repeat(starts - before, counts) + np.arange(int(counts.sum())), counts

    def first_member(self, rows: np.ndarray, codes: Sequence[int]) -> np.ndarray:
        """int64 [len(rows)]: the member whose extension comes first in `codes`, as an index; -1 where a row has none of them."""
        if not len(rows) or not codes:
            return np.full(len(rows), -1, np.int64)
        flat, counts = self.members_of(rows)
        extensions = self["member_extension"][flat]
        rank = np.full(max(*codes, int(extensions.max(initial=0))) + 1, len(codes), np.int64)
        rank[list(codes)[::-1]] = np.arange(len(codes))[::-1]
        ranks = rank[extensions]
        # Rank and place in one number, so that one reduction finds the best member of each row.
        order = ranks * len(flat) + np.arange(len(flat))
        best = np.minimum.reduceat(order, np.cumsum(counts) - counts)
        return np.where(best < len(codes) * len(flat), flat[best % len(flat)], -1)


def _map(path: Path) -> mmap.mmap | bytes:
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _starts_and_bytes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    _, starts, text = texts.buffers()
    offsets = np.frombuffer(starts, np.int64, len(texts) + 1, texts.offset * 8)
    data = np.frombuffer(text, np.uint8) if text is not None and text.size else np.empty(0, np.uint8)
    return offsets, data[offsets[0] : offsets[-1]]
