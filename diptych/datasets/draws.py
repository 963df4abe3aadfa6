"""Counted draws in NumPy: random bits as a function of a key and a counter, so that there is no generator and no state.

The mixing is splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). It
is written out here because the streams of NumPy's generators may change between releases, and an order must not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np

LISTED = 1 << 20
"""Longest permutation that is made as a whole. It is part of every order: another number would send a run's slots to other samples."""

_ROUNDS = 8

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def key_of(*parts: int | str) -> int:
    """A 64-bit key of `parts` (integers and strings); different parts give unrelated keys."""
    text = "\x1f".join(part if isinstance(part, str) else f"\x1e{int(part)}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def bits(key: int, counters: np.ndarray) -> np.ndarray:
    """uint64, shape of `counters` (int64 or uint64): random bits of each counter under `key`."""
    x = counters.astype(np.uint64)
    with np.errstate(over="ignore"):
        x *= _GAMMA
        x += np.uint64(key)
        for shift, factor in ((30, _MIX1), (27, _MIX2)):
            x ^= x >> np.uint64(shift)
            x *= factor
        x ^= x >> np.uint64(31)
        # A second round with the key, because counters and keys that differ in few bits would otherwise give related bits.
        x ^= np.uint64(key)
        for shift, factor in ((30, _MIX1), (27, _MIX2)):
            x ^= x >> np.uint64(shift)
            x *= factor
        x ^= x >> np.uint64(31)
    return x


def permutation(key: int, length: int) -> np.ndarray:
    """int64 [length]: a random permutation of 0…length−1."""
    index_bits = np.uint64(max(length - 1, 1).bit_length())
    # The index in the low bits makes every value unique, so the result is the same whatever the sorting algorithm.
    values = bits(key, np.arange(length, dtype=np.uint64)) >> index_bits << index_bits
    values |= np.arange(length, dtype=np.uint64)
    values.sort()
    return (values & ((np.uint64(1) << index_bits) - np.uint64(1))).astype(np.int64)


class Permutation:
    """A random permutation of 0…length−1 that costs the same to ask for whatever the length.

    Up to `LISTED` it is `permutation`'s list. Beyond that a value is computed from its place and the reverse: places are pairs of two digits,
    to each of which a hash of the other is added in turn, a Feistel network of mixed radix (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002). The pairs are a few more than `length`; a place that is sent beyond is sent on until it is within.
    """

    def __init__(self, key: int, length: int) -> None:
        self.length = length
        self._list = permutation(key, length) if length <= LISTED else None
        root = math.isqrt(max(length - 1, 0)) + 1
        self._radices = np.uint64(root), np.uint64(-(-length // root))
        self._rounds = [key_of(key, "round", number) for number in range(_ROUNDS)]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """int64, shape of `places` (int64, each in 0…length−1): the values there."""
        return self._list[places] if self._list is not None else self._walk(places, self._encipher)

    def place_of(self, value: int) -> int:
        """Where `value` is."""
        if self._list is not None:
            return int(np.flatnonzero(self._list == value)[0])
        return int(self._walk(np.array([value]), self._decipher)[0])

    def _walk(self, numbers: np.ndarray, send: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        found = send(numbers.astype(np.uint64))
        while (beyond := found >= self.length).any():
            found[beyond] = send(found[beyond])
        return found.astype(np.int64)

    def _encipher(self, numbers: np.ndarray) -> np.ndarray:
        digits = list(np.divmod(numbers, self._radices[1]))
        for number, key in enumerate(self._rounds):
            side = number % 2
            digits[side] = (digits[side] + self._shift(key, digits[1 - side], side)) % self._radices[side]
        return digits[0] * self._radices[1] + digits[1]

    def _decipher(self, numbers: np.ndarray) -> np.ndarray:
        digits = list(np.divmod(numbers, self._radices[1]))
        for number, key in reversed(list(enumerate(self._rounds))):
            side = number % 2
            digits[side] = (digits[side] + self._radices[side] - self._shift(key, digits[1 - side], side)) % self._radices[side]
        return digits[0] * self._radices[1] + digits[1]

    def _shift(self, key: int, other: np.ndarray, side: int) -> np.ndarray:
        return bits(key, other) % self._radices[side]


def below(key: int, counters: np.ndarray, limit: int) -> np.ndarray:
    """int64, shape of `counters`: uniform in [0, limit), limit at most 2^53."""
    return np.minimum((uniform(key, counters) * limit).astype(np.int64), limit - 1)


def uniform(key: int, counters: np.ndarray) -> np.ndarray:
    """float64, shape of `counters`: uniform in [0, 1), multiples of 2^-53."""
    return (bits(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
