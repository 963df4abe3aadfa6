"""Which worker holds the others up: every worker tells once a second at which step it is and what it is doing.

The others wait in a collective for the worker that hangs, and what they raise in the end names nobody. So each one keeps a line in the
process group's store: step, time, and where its training thread stands. When a collective fails, whoever is silent, or
stands outside a collective, is named.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from diptych.trainers.world import World

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
_SILENT_SECONDS = 10.0
"""A worker whose last line is older is stopped, swapped out or cut off."""
_WAITING = ("torch/distributed/", "torch/autograd/", "deepspeed/comm/", "diptych/trainers/world.py")
"""Modules in which a thread stands while it waits for the other workers."""


class HungCollective(RuntimeError):  # noqa: N818 - it names what happened
    """A collective failed; the message names the workers that the others waited for."""


class Heartbeat:
    """Tells and reads where every worker stands. A world of one needs none, and every method does nothing there."""

    def __init__(self, world: World) -> None:
        self.world, self.step = world, 0
        self._main = threading.get_ident()
        self._ended = threading.Event()
        # A connection of its own: the training thread may be blocked in the group's.
        self._store = dist.distributed_c10d._get_default_store().clone() if world.size > 1 else None
        self._thread = threading.Thread(target=self._tell, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._store is not None and isinstance(error, RuntimeError) and is_collective_failure(error):
            verdict = self.verdict()
            raise HungCollective(f"{verdict} ({_first_line(error)})") from error

    def _tell(self) -> None:
        assert self._store is not None
        while not self._ended.is_set():
            try:
                self._store.set(_key(self.world.rank), json.dumps(self._line()))
            except RuntimeError:
                return  # the store has ended with its process; the collective that fails next says so
            self._ended.wait(BEAT_SECONDS)

    def _line(self) -> dict[str, Any]:
        where, waits = _place(sys._current_frames().get(self._main))
        who = f"{socket.gethostname()}, process {os.getpid()}"
        return {"step": self.step, "time": time.time(), "where": where, "waits": waits, "who": who}

    def verdict(self) -> str:
        """Which workers the others waited for, as far as their lines tell."""
        assert self._store is not None
        lines: list[dict[str, Any] | None] = []
        try:
            for rank in range(self.world.size):
                present = self._store.check([_key(rank)])
                lines.append(json.loads(self._store.get(_key(rank))) if present else None)
        except RuntimeError:
            return "Rank 0 is gone, and with it what the others wait for"
        return blame(lines, time.time())


def blame(lines: Sequence[dict[str, Any] | None], now: float) -> str:
    """One sentence on who held the others up; `lines[rank]` is a worker's last line, None if it never told one."""
    silent, outside = [], []
    for rank, line in enumerate(lines):
        if line is None:
            silent.append(f"rank {rank}, which never started")
        elif now - line["time"] > _SILENT_SECONDS:
            silent.append(
                f"rank {rank} ({line['who']}), silent for {now - line['time']:.0f} s since step {line['step']}, in {line['where']}"
            )
        elif not line["waits"]:
            outside.append(f"rank {rank} ({line['who']}), at step {line['step']} in {line['where']}")
    guilty = silent or outside
    if not guilty:
        return "A collective failed although every worker stands in one: the network between them is the likely cause"
    return f"The workers waited for {'; '.join(guilty)}"


def is_collective_failure(error: BaseException) -> bool:
    """Whether the error is what gloo, NCCL or the store raise when a peer does not answer."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        words in text
        for words in ("timed out waiting", "application timeout", "connection closed by peer", "gloo", "nccl", "connection reset")
    )


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """(`function (file:line)` of the innermost frame of ours, whether the thread waits for the other workers)."""
    waits, innermost = False, ""
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or any(part in file for part in _WAITING)
        place = f"{frame.f_code.co_name} ({'/'.join(file.split('/')[-2:])}:{frame.f_lineno})"
        innermost = innermost or place
        if "diptych/" in file:
            return place if innermost == place else f"{place}, {innermost}", waits
        frame = frame.f_back
    return innermost or "no Python code", waits


def _key(rank: int) -> str:
    return f"diptych/heartbeat/{rank}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
