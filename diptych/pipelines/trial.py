"""How a sweep steers a run that is otherwise a run like any other: where it pauses, where it waits for a verdict, what it shares.

Driver and workers speak through the run folder, as they do about stopping: a worker that has reached a rung waits until
`verdicts/step_00000040` says `continue` or `stop`. A driver that died answers no more, so the wait has an end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from diptych.pipelines.prepare import Inputs

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
"""How long a worker waits for a verdict before it goes on."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, or one generation of it, as `train.run` takes it."""

    until: int = 0
    """Stop exactly after this many steps, with a checkpoint; 0 = go on to `train.steps`."""
    rungs: tuple[int, ...] = ()
    """Steps done at which the run waits for a verdict."""
    inputs: Inputs | None = None
    """Manifest, joins and tokenizer that the trials share."""
    mutable: frozenset[str] = frozenset()
    """Keys that may differ from those that the run began with: a new generation explores them."""


def verdict_file(run_dir: Path, step: int) -> Path:
    """Where the verdict on the rung at `step` stands."""
    return run_dir / "verdicts" / f"step_{step:08d}"


def write_verdict(run_dir: Path, step: int, go_on: bool) -> None:
    """Tell the worker that waits at `step` to go on or to stop."""
    file = verdict_file(run_dir, step)
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text("continue" if go_on else "stop")
    temporary.replace(file)


class SweepStops:
    """Whether to stop before the next step; called once before each step, so that it knows which one that is."""

    def __init__(self, otherwise: Callable[[], bool], run_dir: Path, step: int, until: int, rungs: Collection[int]) -> None:
        """`step` steps are done; `otherwise` asks what else may stop the run."""
        self._otherwise, self._run_dir, self._step, self._until, self._rungs = otherwise, run_dir, step, until, frozenset(rungs)

    def __call__(self) -> bool:
        """Whether to end the run after the step that is about to be taken; waits at a rung."""
        stop = self._otherwise() or (self._step in self._rungs and self._condemned())
        self._step += 1
        # The loop stops after the step that it was about to take.
        return stop or 0 < self._until <= self._step

    def _condemned(self) -> bool:
        file, deadline = verdict_file(self._run_dir, self._step), time.monotonic() + PATIENCE_SECONDS
        while not file.is_file():
            if self._otherwise():
                return True
            if time.monotonic() > deadline:
                log.warning("no verdict on step %d after %.0f s; going on", self._step, PATIENCE_SECONDS)
                return False
            time.sleep(_POLL_SECONDS)
        return file.read_text() == "stop"
