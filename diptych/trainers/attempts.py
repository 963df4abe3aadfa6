"""Attempts of a run, and the history that counts.

Each start of the worker group records itself in `attempts/NNNN.json` before it does anything else: which checkpoint it
resumed from and so at which step it took over. The chain of these records decides what counts. What an earlier attempt
wrote beyond the step at which a later one took over was redone, or comes from an orphan that outlived its driver: its
checkpoints are never considered and its metrics and traces are left out. An orphan that notices a newer record stops
with `Fenced`.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

from diptych.trainers.runfolder import RunFolder

_CHECKPOINT = re.compile(r"step_(\d{8,})-a(\d{4,})")


class Fenced(RuntimeError):  # noqa: N818 - it is a verdict, not a failure
    """A newer attempt has taken over the run; this one must not write any more."""


class Span(NamedTuple):
    """Steps `[first, end)` of an attempt that count; `end` is None for the newest attempt."""

    attempt: int
    first: int
    end: int | None


@dataclass(frozen=True)
class Attempt:
    """One start of the worker group, as `attempts/NNNN.json` records it."""

    attempt: int
    started: float
    """Seconds since 1970, UTC."""
    world_size: int
    resumed_from: str | None
    """Name of the checkpoint that this attempt loads; None = it starts from the beginning."""
    start_step: int
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that were torn, each with what was wrong with it."""


def checkpoint_name(step: int, attempt: int) -> str:
    """`step_00000100-a0002`: `step` optimizer steps done, written by attempt 2."""
    return f"step_{step:08d}-a{attempt:04d}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint's folder, or None for any other name."""
    match = _CHECKPOINT.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def read_attempts(folder: RunFolder) -> dict[int, Attempt]:
    """Every recorded attempt by number."""
    records = {}
    for name in folder.names("attempts"):
        if re.fullmatch(r"\d{4,}\.json", name):
            record = Attempt(**json.loads(folder.read(f"attempts/{name}")))
            records[record.attempt] = record
    return records


def newest_attempt(folder: RunFolder) -> int:
    """Highest recorded number; 0 if the run has not started yet."""
    return max((int(name[:-5]) for name in folder.names("attempts") if re.fullmatch(r"\d{4,}\.json", name)), default=0)


def record_attempt(
    folder: RunFolder,
    world_size: int,
    resumed_from: str | None,
    number: int,
    passed_over: tuple[str, ...] = (),
    start_step: int | None = None,
) -> Attempt | None:
    """Record attempt `number` exclusively; None if that number was taken meanwhile. It starts where its checkpoint stands, or at `start_step`."""
    parsed = parse_checkpoint_name(resumed_from) if resumed_from else None
    start = start_step if start_step is not None else parsed[0] if parsed else 0
    record = Attempt(number, time.time(), world_size, resumed_from, start, passed_over)
    data = json.dumps(asdict(record)).encode()
    return record if folder.create(f"attempts/{number:04d}.json", data) else None


def history(folder: RunFolder | str) -> list[Span]:
    """The attempts whose work counts, oldest first, with the steps of each: the chain back from the newest record."""
    folder = RunFolder(folder) if isinstance(folder, str) else folder
    records = read_attempts(folder)
    spans: list[Span] = []
    number, end = max(records, default=0), None
    while number:
        record = records[number]
        spans.insert(0, Span(number, record.start_step, end))
        parent = parse_checkpoint_name(record.resumed_from) if record.resumed_from else None
        end, number = record.start_step, parent[1] if parent else 0
    return spans


def candidates(folder: RunFolder) -> list[str]:
    """Names of the checkpoints that a new attempt may resume from, newest step first; not yet verified."""
    spans = {span.attempt: span for span in history(folder)}
    names = []
    for name in folder.names("checkpoints"):
        parsed = parse_checkpoint_name(name)
        if parsed and parsed[1] in spans:
            end = spans[parsed[1]].end
            if end is None or parsed[0] <= end:
                names.append(name)
    return sorted(names, key=lambda name: parse_checkpoint_name(name) or (0, 0), reverse=True)


def check_fence(folder: RunFolder, attempt: int) -> None:
    """Raise `Fenced` if an attempt newer than `attempt` is recorded."""
    newest = newest_attempt(folder)
    if newest > attempt:
        raise Fenced(f"attempt {attempt} of the run in {folder.url} was superseded by attempt {newest}; this process stops writing")
