"""A sorted set of row numbers at a bit each, with the two questions that a selection is asked: which is the i-th, and how many come before.

An array of the numbers takes eight bytes each, 40 GB for five thousand million. Here a block is 512 rows: the number of chosen rows before it, then
their bits, side by side, so that either question touches one place of a file that is mapped (the layout of rank9; S. Vigna, Broadword
Implementation of Rank/Select Queries, 2008).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 512
"""Rows of a block: its bits are eight words."""
_WIDTH = 1 + BLOCK // 64
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint8)
"""uint8 [256]: set bits of each byte."""
_AT_ONCE = 1 << 14
"""Questions that are answered together, at about 300 bytes of memory each."""
_BLOCKS_AT_ONCE = 1 << 8


class Bitmap:
    """Chosen rows out of [0, total). `blocks` is int64 [total // 512 + 1, 9], also a memory map: (chosen before, eight words of bits)."""

    def __init__(self, blocks: np.ndarray) -> None:
        assert blocks.dtype == np.int64
        assert blocks.shape[1] == _WIDTH
        self.blocks = blocks

    @staticmethod
    def is_of(array: np.ndarray) -> bool:
        """Whether the array is a bitmap's `blocks`, and not row numbers."""
        return array.ndim == 2 and array.shape[1] == _WIDTH

    @classmethod
    def empty(cls, total: int) -> Bitmap:
        """None of `total` rows; `put` chooses some, and `seal` ends that."""
        return cls(np.zeros((total // BLOCK + 1, _WIDTH), np.int64))

    def put(self, start: int, chosen: np.ndarray) -> None:
        """Choose among the rows from `start`, a multiple of 512, as `chosen` (bool [R]) says."""
        assert start % BLOCK == 0
        rows = np.zeros(-(-len(chosen) // BLOCK) * BLOCK, bool)
        rows[: len(chosen)] = chosen
        part = self.blocks[start // BLOCK :][: len(rows) // BLOCK]
        part[:, 0] = rows.reshape(-1, BLOCK).sum(axis=1)
        part[:, 1:] = np.packbits(rows, bitorder="little").view(np.int64).reshape(-1, _WIDTH - 1)

    def seal(self) -> int:
        """Count what was put; returns the number of chosen rows. Once, and before any question."""
        counts = self.blocks[:, 0].copy()
        ends = np.cumsum(counts)
        self.blocks[:, 0] = ends - counts
        return int(ends[-1])

    def __len__(self) -> int:
        return int(self.blocks[-1, 0]) + int(_ONES[self._bytes(slice(-1, None))].sum())

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """int64, of the shape of `index`: the chosen rows at these places of their ascending order (0 … len − 1)."""
        index = np.asarray(index, np.int64)
        flat, rows = index.reshape(-1), np.empty(index.size, np.int64)
        for start in range(0, len(flat), _AT_ONCE):
            rows[start : start + _AT_ONCE] = self._at(flat[start : start + _AT_ONCE])
        return rows.reshape(index.shape)

    def before(self, rows: np.ndarray) -> np.ndarray:
        """int64 [R]: how many chosen rows are smaller than each of `rows` (int64 [R], 0 … total)."""
        blocks, offsets = np.divmod(np.asarray(rows, np.int64), BLOCK)
        found = self.blocks[blocks, 0]
        for start in range(0, len(found), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            bits = np.unpackbits(self._bytes(blocks[part]), axis=1, bitorder="little")
            found[part] += (bits & (np.arange(BLOCK) < offsets[part, None])).sum(axis=1, dtype=np.int64)
        return found

    def chunks(self) -> Iterator[np.ndarray]:
        """All chosen rows, ascending, as int64 arrays of at most 131,072."""
        for start in range(0, len(self.blocks), _BLOCKS_AT_ONCE):
            bits = np.unpackbits(self._bytes(slice(start, start + _BLOCKS_AT_ONCE)), bitorder="little")
            yield np.flatnonzero(bits) + start * BLOCK

    def _bytes(self, blocks: slice | np.ndarray) -> np.ndarray:
        """uint8 [n, 64]: the bits of these blocks."""
        return np.ascontiguousarray(self.blocks[blocks, 1:]).view(np.uint8)

    def _at(self, index: np.ndarray) -> np.ndarray:
        blocks = np.searchsorted(self.blocks[:, 0], index, side="right") - 1
        within = (index - self.blocks[blocks, 0])[:, None]
        data = self._bytes(blocks)
        ends = np.cumsum(_ONES[data], axis=1, dtype=np.int16)
        at = (ends <= within).sum(axis=1)
        byte = data[np.arange(len(at)), at]
        within = within[:, 0] - (ends[np.arange(len(at)), at] - _ONES[byte])
        bits = np.cumsum(np.unpackbits(byte[:, None], axis=1, bitorder="little"), axis=1, dtype=np.uint8)
        return blocks * BLOCK + at * 8 + (bits <= within[:, None]).sum(axis=1)
