"""Memory that is used again: the pages of fresh memory cost more than what is read or decoded into them."""

from __future__ import annotations

import weakref

import numpy as np

_KEPT = 2
"""Pieces that wait for their next use: what one thread needs while another's is still in use."""


class SpareMemory:
    """Pieces of memory of about one size, such as the blocks of a stream. May be used by many threads."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, size: int) -> np.ndarray:
        """uint8 [size] that holds anything; its memory is used again once no array, buffer or tensor views it any more."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = bytearray()
        # A few rows that somebody keeps must not keep the memory of a whole block.
        if not size <= len(memory) <= 2 * size:
            memory = bytearray(size)
        whole = np.frombuffer(memory, np.uint8)
        weakref.finalize(whole, self._give_back, memory).atexit = False
        return whole[:size]

    def _give_back(self, memory: bytearray) -> None:
        if len(self._free) < _KEPT:
            self._free.append(memory)
