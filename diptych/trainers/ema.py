"""Averaged weights: an exponential moving average in fp32, warmed up so that short runs gain too.

The decay at update t is min(decay, (1 + t) / (10 + t)), as TensorFlow's and diffusers' averages do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def warmed_decay(decay: float, update: int) -> float:
    """Decay of update number `update` (from 0)."""
    return min(decay, (1 + update) / (10 + update))


class Ema:
    """Averages of `live` tensors (parameters, or a worker's partitions of them), in fp32 beside them."""

    def __init__(self, live: Sequence[Tensor], decay: float) -> None:
        self.live = list(live)
        self.decay = decay
        self.average = [tensor.detach().to(torch.float32, copy=True) for tensor in self.live]

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Move the averages towards the live tensors after optimizer step `update` (from 0)."""
        share = 1.0 - warmed_decay(self.decay, update)
        torch._foreach_lerp_(self.average, [tensor.detach().float() for tensor in self.live], share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and live values, bit for bit (the live tensors are fp32); a second call restores them."""
        for live, average in zip(self.live, self.average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The live tensors hold the averages inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
