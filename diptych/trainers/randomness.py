"""Counted randomness: draws that are a function of (seed, purpose, slot, element) and of nothing else.

There is no generator and so no state to save: the same sample gets the same noise whatever the worker, the micro-batch
or the attempt it falls into. The mixing is splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", 2014), in int64 arithmetic that wraps around, on any device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2^64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def _key(seed: int, purpose: str) -> int:
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _bits(seed: int, purpose: str, slots: Tensor, count: int) -> Tensor:
    """`[B, count]` int64 of random bits for `slots` `[B]`."""
    base = _mix(slots.to(torch.int64) * _signed(_GAMMA) + _signed(_key(seed, purpose)))
    elements = torch.arange(1, count + 1, device=slots.device, dtype=torch.int64) * _signed(_GAMMA)
    return _mix(base[:, None] + elements[None, :])


def uniform(seed: int, purpose: str, slots: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """`[B, *shape]` float32 in [0, 1), multiples of 2^-24; `slots` is `[B]`, and names the device."""
    bits = _bits(seed, purpose, slots, math.prod(shape))
    return (_shift(bits, 40).to(torch.float32) * 2.0**-24).reshape(slots.shape[0], *shape)


def normal(seed: int, purpose: str, slots: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """`[B, *shape]` float32, standard normal, by Box and Muller's transform of pairs of elements."""
    count = math.prod(shape)
    bits = _bits(seed, purpose, slots, (count + 1) // 2)
    # The upper half is in (0, 1], so that its logarithm is finite; the tail reaches 6.6 standard deviations.
    radius = torch.sqrt(-2.0 * torch.log(((_shift(bits, 32) + 1).to(torch.float64) * 2.0**-32).to(torch.float32)))
    angle = (bits & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :count].reshape(slots.shape[0], *shape)


def integers(seed: int, purpose: str, slots: Tensor, shape: Sequence[int], low: int, high: int) -> Tensor:
    """`[B, *shape]` int64, uniform in [low, high); the range is at most 2^31."""
    if not 0 < high - low <= 1 << 31:
        raise ValueError(f"integers: [{low}, {high}) must hold between 1 and 2^31 numbers")
    bits = _bits(seed, purpose, slots, math.prod(shape))
    return (low + ((_shift(bits, 32) * (high - low)) >> 32)).reshape(slots.shape[0], *shape)


def bernoulli(seed: int, purpose: str, slots: Tensor, shape: Sequence[int], probability: float) -> Tensor:
    """`[B, *shape]` bool, True with `probability`."""
    return uniform(seed, purpose, slots, shape) < probability


def step_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of layer dropout in one forward pass; the same in every attempt and in both passes of a gathered step."""
    x = _key(seed, "step")
    for part in (step, micro_step, rank):
        x = _mix_int((x + (part + 1) * _GAMMA) & _MASK)
    return x >> 1


def seed_layers(seed: int, device: torch.device) -> None:
    """Seed the generators that layers on `device` draw from, the CPU's and its own, as `torch.manual_seed` does.

    That one also asks every backend that is not in use, and keeps the stack for each: half a millisecond a step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)
