"""Counted draws in NumPy: random bits as a function of a key and a counter, so that there is no generator and no state.

The mixing is splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). It
is written out here because the streams of NumPy's generators may change between releases, and an order must not.
"""

from __future__ import annotations

import hashlib

import numpy as np

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


def below(key: int, counters: np.ndarray, limit: int) -> np.ndarray:
    """int64, shape of `counters`: uniform in [0, limit), limit at most 2^53."""
    return np.minimum((uniform(key, counters) * limit).astype(np.int64), limit - 1)


def uniform(key: int, counters: np.ndarray) -> np.ndarray:
    """float64, shape of `counters`: uniform in [0, 1), multiples of 2^-53."""
    return (bits(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
