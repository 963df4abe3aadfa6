"""Memory of processes, in MB of 10⁶ bytes, as Linux tells it."""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

STORE = "Ray's object store"
EVERY_SECONDS = 5.0
"""Between two looks at all processes of a benchmark: one takes 10 ms, which then is 0.2 % of a core."""


def status_megabytes(field: str, process: int | str = "self") -> float:
    """A field of /proc/PROCESS/status: `VmHWM`, the peak resident memory, or `RssAnon`, what of it is no mapped file now.

    (`ru_maxrss` would count the parent's memory before the start.)
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024 / 1e6


def peak_megabytes() -> float:
    """Peak resident memory of this process."""
    return status_megabytes("VmHWM")


def store_megabytes(raylet: int) -> float:
    """What of the object store of `raylet` has ever been written to: blocks of a file without a name, which it holds open."""
    written = 0
    for file in Path(f"/proc/{raylet}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            written += 512 * file.stat().st_blocks if os.readlink(file).startswith("/dev/shm/plasma") else 0
    return written / 1e6


class PrivateMemory:
    """Peak of the memory of this process that is no mapped file, looked at every 5 ms while the block runs.

    What is mapped of files is page cache, which the kernel takes back when somebody needs it.
    """

    def __enter__(self) -> PrivateMemory:
        self.peak = status_megabytes("RssAnon")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.005):
            self.peak = max(self.peak, status_megabytes("RssAnon"))


_SIDES = ("--side", "--bare", "--part", "--train")
"""Options by which our scripts tell themselves what they measure in a process of its own."""


def kind_of(words: Sequence[str]) -> str:
    """What a process with the command line `words` is: a script, a module, an actor of Ray's or a program; of our scripts with its side."""
    first = Path(words[0]).name if words else ""
    if words and words[0].startswith("ray::"):
        return re.split(r"[.(:\s]", words[0].removeprefix("ray::"), maxsplit=1)[0] + " (Ray)"
    if not first.startswith("python"):
        return first
    rest = [word for word in words[1:] if word not in ("-u", "-B", "-I", "-E", "-s")]
    if rest[:1] == ["-m"]:
        return rest[1]
    if rest[:1] == ["-c"]:
        return "multiprocessing" if "multiprocessing" in rest[1] else "python -c"
    side = next((f" {word} {value}" for word, value in itertools.pairwise(rest) if word in _SIDES), "")
    return Path(rest[0]).name + side if rest else first


class Peaks:
    """Peak resident memory of each kind of process from this one down, in MB, looked at every few seconds from now on.

    The kernel keeps every process's peak, so only what a process takes between the last look and its end is missed. What processes
    share, such as blocks in Ray's object store, counts for each of them; how much of the store has ever been used is told apart.
    """

    def __init__(self) -> None:
        self.megabytes: dict[str, float] = {}
        self._one_look = threading.Lock()
        threading.Thread(target=self._watch, name="peaks", daemon=True).start()

    def look(self) -> None:
        """Look now."""
        this = psutil.Process()
        with self._one_look:
            found = dict(self.megabytes)
            for one in [this, *this.children(recursive=True)]:
                with suppress(psutil.Error, OSError, StopIteration):
                    kind = kind_of(one.cmdline())
                    _raise(found, kind, status_megabytes("VmHWM", one.pid))
                    if kind == "raylet":
                        _raise(found, STORE, store_megabytes(one.pid))
            # Another dictionary: somebody may be walking through the old one.
            self.megabytes = found

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(EVERY_SECONDS)


def _raise(found: dict[str, float], kind: str, megabytes: float) -> None:
    found[kind] = round(max(found.get(kind, 0.0), megabytes), 1)
