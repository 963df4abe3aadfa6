"""Memory of processes, in MB of 10⁶ bytes, as Linux tells it."""

from __future__ import annotations

import threading
from pathlib import Path


def status_megabytes(field: str, process: int | str = "self") -> float:
    """A field of /proc/PROCESS/status: `VmHWM`, the peak resident memory, or `RssAnon`, what of it is no mapped file now.

    (`ru_maxrss` would count the parent's memory before the start.)
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024 / 1e6


def peak_megabytes() -> float:
    """Peak resident memory of this process."""
    return status_megabytes("VmHWM")


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
