"""What the driver tells while a run goes on: a bar of steps, every attempt that begins, and why the one before it failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diptych.config import RunConfig
from diptych.pipelines import runs_folder
from diptych.pipelines.console import console, note


@contextmanager
def following(run_dir: Path, config: RunConfig, label: str = "") -> Iterator[Callable[[], None]]:
    """Yields what is to be called now and then. The bar is silent without a terminal; attempts and failures are told always.

    A run with a `label` is one of several side by side: a terminal has room for one bar, so it has none, and its notes begin with it.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from diptych.pipelines.failures import FailureReader

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    failures, attempts = FailureReader(run_dir), _AttemptReader(run_dir, label)
    shown = console.is_terminal and not label
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task(run_dir.name, total=config.train.steps, figures="starting workers")

        def show() -> None:
            for reason in failures.new():
                note(f"{label}workers failed: {reason}")
            if not attempts.due():
                return
            attempts.tell()
            line = runs_folder.last_line(run_dir) if shown else None
            if line:
                values = line["metrics"]
                if "train/loss" in values:
                    figures = f"loss {values['train/loss']:.4g} · {values['train/samples_per_second']:.0f} samples/s"
                    figures += f" · waiting {100 * values['train/data_wait_share']:.0f} %"
                    bar.update(task, completed=line["step"], figures=figures)

        yield show
        show()


class _AttemptReader:
    """Tells of attempts that were not there at the beginning: with how many workers and from which checkpoint."""

    def __init__(self, run_dir: Path, label: str) -> None:
        from diptych.trainers.runfolder import RunFolder

        self._label = label
        self.folder = RunFolder(runs_folder.records(run_dir))
        self._known, self._next = set(self.folder.names("attempts")), 0.0

    def due(self) -> bool:
        """Whether to look again; a listing of an object store costs money."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + (0.5 if self.folder.local else 15.0)
        return True

    def tell(self) -> None:
        from diptych.trainers.attempts import read_attempts

        names = set(self.folder.names("attempts"))
        new = sorted(int(name[:-5]) for name in names - self._known if name[:-5].isdigit())
        records = read_attempts(self.folder) if new else {}
        for number in new:
            attempt = records[number]
            for torn in attempt.passed_over:
                note(f"{self._label}passed over a torn checkpoint: {torn}")
            if attempt.attempt > 1:
                start = f"from {attempt.resumed_from}" if attempt.resumed_from else "from the beginning"
                note(f"{self._label}attempt {attempt.attempt}: {attempt.world_size} workers, {start}")
        self._known |= names
