"""The workers of a run, and the few collectives that the training plane uses.

Everything works with one process and no process group too, so that the loop has no special case for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Place of this worker among all, and its device."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> World:
        """The default process group's rank and size; a world of one where there is none."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add `tensor` up over all workers, in place; every worker gets the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """`[B, …]` of each worker → `[size * B, …]` in order of rank. B must agree."""
        if self.size == 1:
            return tensor
        # gloo carries no bool.
        wire = tensor.contiguous().to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        parts = [torch.empty_like(wire) for _ in range(self.size)]
        dist.all_gather(parts, wire)
        return torch.cat(parts).to(tensor.dtype)

    def gather_objects(self, value: Any) -> list[Any]:
        """One small object of each worker, in order of rank, on every worker."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, on every worker."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.size > 1:
            dist.barrier()
