"""Programs that train without end, measured in turns of seconds: each runs while the others are stopped.

The speed of a virtual machine drifts by a third within minutes, so programs that run one after the other are measured on different machines. Here each is
started and warmed up; then every turn lets each run for some seconds, and a few steps at least, with all its processes, and stops them (SIGSTOP) before
the next one runs. Of a turn counts what lies between the first and the last step that ended in it, so the stops themselves are never in a figure; nor is
its beginning, in which a program does first what fell due while it was stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil

Ends = list[tuple[int, float]]
"""(steps done, when by `time.time()`), in order."""


class Turn(NamedTuple):
    """What a program did in one of its turns."""

    rate: float
    """Steps per second."""
    busy: list[float]
    """Processors that each of its processes kept busy on average, the busiest first."""
    running: list[float]
    """Share of the turn that the busiest thread of each of these processes was on a core."""
    ready: list[float]
    """And that it could have been, but had to wait for one."""
    touched: list[float]
    """Pages per second that this thread touched anew: each is a fault, for which the system finds and clears memory."""


class _Used(NamedTuple):
    """What a process has used so far."""

    when: float
    """By `time.time()`: looking at many threads takes a while, in which they go on."""
    seconds: float
    """Of processors."""
    threads: dict[str, tuple[float, float, int]]
    """Seconds on a core, ready without one, and pages touched anew, by thread."""


MARK = "DIPTYCH_BENCHMARK_PROGRAM"
FEW, PATIENCE_SECONDS = 3, 300.0
"""Entries of `Ends` after which a program is warm, and that a turn has at least; how long it may take to get there."""
SETTLE_SECONDS = 0.5
"""Of each turn, before it counts."""


class StepLog:
    """Where a program notes when its steps end."""

    def __init__(self, path: Path) -> None:
        self.steps = 0
        self._file = path.open("w", buffering=1)

    def ended(self) -> None:
        """A step has ended now."""
        self.steps += 1
        self._file.write(f"{self.steps} {time.time()}\n")


def read_steps(path: Path) -> Ends:
    """What a `StepLog` has written so far."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [(int(step), float(when)) for step, when in (line.split() for line in lines)]


def logged_steps(run_dir: Path) -> Ends:
    """The steps that a run of ours has logged so far."""
    from diptych.trainers.journal import read_metrics

    return [(line["step"], line["time"]) for line in read_metrics(str(run_dir))]


@dataclass(frozen=True)
class Program:
    """One side of a comparison; it trains until it is ended."""

    command: list[str]
    ends: Callable[[], Ends]
    """Its steps so far."""
    log: Path
    """Its output; shown if it fails."""
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    folder: Path | None = None


class _Running:
    """A program's processes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        # Children of a process that has ended are nobody's any more; what they inherited tells whose they were.
        self._mark = uuid.uuid4().hex
        environment = {**program.environment, MARK: self._mark}
        with program.log.open("w") as log:
            self._popen = subprocess.Popen(program.command, cwd=program.folder, env=environment, stdout=log, stderr=log)
        self._root = psutil.Process(self._popen.pid)

    def warm_up(self) -> None:
        """Wait for its first steps, then stop it."""
        self.wait_for_steps(0.0)
        self.signal(signal.SIGSTOP)

    def wait_for_steps(self, since: float) -> None:
        """Until it has noted a few."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (done := sum(when >= since for _, when in self.program.ends())) < FEW:
            self.check()
            if time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(self.program.command)} noted {done} steps in {PATIENCE_SECONDS:.0f} s")
            time.sleep(0.5)

    def check(self) -> None:
        """Ends this process if the program has ended."""
        if self._popen.poll() is not None:
            raise SystemExit(f"{' '.join(self.program.command)} has ended:\n{self.program.log.read_text()[-4000:]}")

    def used(self) -> dict[int, _Used]:
        """What each of its processes has used so far, by process id."""
        found: dict[int, _Used] = {}
        for one in self._family():
            with suppress(psutil.Error):
                found[one.pid] = _Used(time.time(), sum(one.cpu_times()[:2]), _scheduled(one.pid))
        return found

    def signal(self, number: signal.Signals) -> None:
        """To all its processes, those included that begin meanwhile."""
        told: set[psutil.Process] = set()
        while new := self._family() - told:
            for one in new:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)
            told |= new

    def end(self) -> None:
        """End all its processes at once: nobody wants its last checkpoint, and of Ray's parts each would wait for others."""
        # Ray's agents write their names over their environment, mark and all; while their parents live they are known as children of those.
        left = self._family() | self._marked()
        while left:
            for one in left:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            self._popen.wait()
            psutil.wait_procs(left, 1)  # What is killed may stay as a zombie of somebody else.
            left = self._marked()

    def _family(self) -> set[psutil.Process]:
        try:
            return {self._root, *self._root.children(recursive=True)}
        except psutil.NoSuchProcess:
            return set()

    def _marked(self) -> set[psutil.Process]:
        return {one for one in psutil.process_iter() if self._is_marked(one)}

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark
        except psutil.Error:
            return False


def alternate(programs: Mapping[str, Program], turns: int, seconds: float) -> dict[str, list[Turn]]:
    """Each program's `turns`, in each of which it runs for `seconds`, or until it has noted `FEW` steps."""
    with ExitStack() as stack:
        # Asked to end, this process ends its programs first: stopped ones would stay for ever.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _end_once))
        running: dict[str, _Running] = {}
        for name, program in programs.items():
            running[name] = _Running(program)
            stack.callback(running[name].end)
            running[name].warm_up()
        slices: dict[str, list[tuple[float, float, dict[int, _Used], dict[int, _Used]]]] = {name: [] for name in programs}
        for turn in range(turns):
            # Every other turn backwards: what drifts steadily counts for nobody.
            for name in list(programs)[:: -1 if turn % 2 else 1]:
                running[name].signal(signal.SIGCONT)
                time.sleep(SETTLE_SECONDS)
                before = running[name].used()
                begin = time.time()
                time.sleep(seconds)
                running[name].wait_for_steps(begin)
                end = time.time()
                after = running[name].used()
                running[name].check()
                running[name].signal(signal.SIGSTOP)
                slices[name].append((begin, end, before, after))
    return {name: [_turn(program.ends(), *one) for one in slices[name]] for name, program in programs.items()}


def alternate_starts(programs: Callable[[], Mapping[str, Program]], starts: int, turns: int, seconds: float) -> dict[str, list[Turn]]:
    """The turns of each of `programs()`, all of them started anew `starts` times: where memory lies is chance, and makes 5 % for as long as it lives."""
    found: dict[str, list[Turn]] = {}
    for _ in range(starts):
        for name, done in alternate(programs(), turns, seconds).items():
            found.setdefault(name, []).extend(done)
    return found


def _end_once(*_: object) -> NoReturn:
    # Asked again, as `timeout` does, it would stop ending its programs.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _scheduled(pid: int) -> dict[str, tuple[float, float, int]]:
    """Seconds that each thread was on a core, and ready without one (the kernel's `schedstat`), and its minor faults (`stat`)."""
    found: dict[str, tuple[float, float, int]] = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # A thread may end meanwhile.
            running, ready, _ = (thread / "schedstat").read_text().split()
            # Behind the name, which may hold anything, stand the state and numbers: of those the seventh.
            faults = (thread / "stat").read_text().rpartition(")")[2].split()[7]
            found[thread.name] = (int(running) / 1e9, int(ready) / 1e9, int(faults))
    return found


def _turn(ends: Ends, begin: float, end: float, before: Mapping[int, _Used], after: Mapping[int, _Used]) -> Turn:
    spent: list[tuple[float, float, float, float]] = []
    for pid, now in after.items():
        then = before.get(pid, _Used(begin, 0.0, {}))
        length = now.when - then.when
        threads = [
            tuple((new - old) / length for new, old in zip(used, then.threads.get(thread, (0.0, 0.0, 0)), strict=True))
            for thread, used in now.threads.items()
        ]
        spent.append(((now.seconds - then.seconds) / length, *max(threads, default=(0.0, 0.0, 0.0))))
    return Turn(_rate(ends, begin, end), *map(list, zip(*sorted(spent, reverse=True), strict=True)))


def _rate(ends: Ends, begin: float, end: float) -> float:
    """Steps per second between the first and the last that ended in a turn."""
    (before, start), *_, (step, stop) = [one for one in ends if begin <= one[1] <= end]
    return (step - before) / (stop - start)
