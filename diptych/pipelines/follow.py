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
def following(run_dir: Path, config: RunConfig) -> Iterator[Callable[[], None]]:
    """Yields what is to be called now and then. The bar is silent without a terminal; attempts and failures are told always."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from diptych.pipelines.failures import FailureReader

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    failures, attempts = FailureReader(run_dir), _AttemptReader(run_dir)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(run_dir.name, total=config.train.steps, figures="starting workers")

        def show() -> None:
            for reason in failures.new():
                note(f"workers failed: {reason}")
            if not attempts.due():
                return
            attempts.tell()
            line = runs_folder.last_line(run_dir) if console.is_terminal else None
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

    def __init__(self, run_dir: Path) -> None:
        from diptych.trainers.runfolder import RunFolder

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
                note(f"passed over a torn checkpoint: {torn}")
            if attempt.attempt > 1:
                start = f"from {attempt.resumed_from}" if attempt.resumed_from else "from the beginning"
                note(f"attempt {attempt.attempt}: {attempt.world_size} workers, {start}")
        self._known |= names
