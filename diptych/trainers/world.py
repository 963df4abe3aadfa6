"""The workers of a run, and the few collectives that the training plane uses.

Everything works with one process and no process group too, so that the loop has no special case for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

    def begin_sum(self, values: dict[str, Tensor]) -> Sums:
        """Begin to add up each of `values` (`[]`) over all workers, in one collective; the work goes on beside what comes next."""
        return Sums(self, values)

    def gather_rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """`[B, …]` of each worker → `[size * B, …]` in order of rank, for all of `rows` in one collective. B must agree, over workers and `rows`."""
        if self.size == 1 or not rows:
            return list(rows)
        # As bytes: whatever the types, one collective carries all, and gloo, which knows no bool, that as well.
        wires = [value.contiguous().view(len(value), -1).view(torch.uint8) for value in rows]
        wire = torch.cat(wires, dim=1)
        parts = [torch.empty_like(wire) for _ in range(self.size)]
        dist.all_gather(parts, wire)
        found = torch.cat(parts).split([one.shape[1] for one in wires], dim=1)
        return [
            part.clone(memory_format=torch.contiguous_format).view(-1).view(value.dtype).view(len(part), *value.shape[1:])
            for value, part in zip(rows, found, strict=True)
        ]

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


class Sums(Mapping[str, Tensor]):
    """Sums over all workers by name, float64 `[]`; who reads the first waits for all.

    A collective takes a millisecond where every core trains, a fiftieth of a small model's step, of which the workers need the result much later.
    """

    def __init__(self, world: World, values: dict[str, Tensor]) -> None:
        self._values = {name: value.detach().double().reshape(()) for name, value in values.items()}
        self._work = None
        # In a world of one they stay on their devices, so that reading a wish of the host waits for no GPU.
        if world.size > 1:
            packed = torch.stack([value.to(world.device) for value in self._values.values()])
            self._work = dist.all_reduce(packed, async_op=True)
            self._values = dict(zip(values, packed.unbind(), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
