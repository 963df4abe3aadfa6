"""What a run writes beside its checkpoints: metrics and, on request, which sample stood where.

Every attempt has its own files, so that no two processes append to one. Readers merge them by the history that counts:
a step that was redone after a checkpoint replaces its first try.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from diptych.trainers.attempts import history
from diptych.trainers.runfolder import RunFolder

TRACE_COLUMNS = ("step", "rank", "slot", "row", "attempt")


class MetricsLog:
    """`metrics/a0003.jsonl`: a line `{step, time, metrics}` per logged step and `{committed}` per checkpoint. Rank 0 only.

    An object store cannot append, so there every `flush` makes a part of its own, `metrics/a0003-000001.jsonl`.
    """

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self.folder, self.name = folder, f"metrics/a{attempt:04d}"
        self._lines: list[bytes] = []
        # The thread that writes checkpoints adds lines too.
        self._lock = threading.Lock()
        self._parts = 0

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Append the figures after `step` optimizer steps."""
        self._line({"step": step, "time": time.time(), "metrics": metrics})

    def committed(self, step: int) -> None:
        """Note that a checkpoint of `step` counts."""
        self._line({"committed": step, "time": time.time()})

    def _line(self, value: dict[str, Any]) -> None:
        with self._lock:
            self._lines.append(json.dumps(value).encode() + b"\n")
        if self.folder.local:
            # What cannot be written now is kept for the next checkpoint, where all workers hear of it.
            with contextlib.suppress(OSError):
                self.flush()

    def flush(self) -> None:
        """Bring every line to the run folder."""
        with self._lock:
            data = b"".join(self._lines)
            if data and self.folder.local:
                self.folder.append(f"{self.name}.jsonl", data)
            elif data:
                self.folder.write(f"{self.name}-{self._parts + 1:06d}.jsonl", data)
                self._parts += 1
            self._lines.clear()


def read_metrics(folder: RunFolder | str) -> list[dict[str, Any]]:
    """Lines `{step, time, metrics, attempt}` of the history that counts, in order of step; several lines of a step are merged."""
    folder = RunFolder(folder) if isinstance(folder, str) else folder
    files = [(match, name) for name in folder.names("metrics") if (match := re.fullmatch(r"a(\d+)(-\d+)?\.jsonl", name))]
    merged: dict[int, dict[str, Any]] = {}
    for attempt, first, end in history(folder):
        for name in (name for match, name in files if int(match[1]) == attempt):
            for line in _lines(folder.read(f"metrics/{name}")):
                # A line speaks about steps done: what was done at the take-over belongs to the earlier attempt.
                if "metrics" in line and (line["step"] > first or first == 0) and (end is None or line["step"] <= end):
                    known = merged.setdefault(line["step"], {"step": line["step"], "metrics": {}})
                    known |= {"time": line["time"], "attempt": attempt, "metrics": known["metrics"] | line["metrics"]}
    return [merged[step] for step in sorted(merged)]


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    for text in data.splitlines():
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue  # the last line of a process that was killed while it wrote


class Trace:
    """`trace/a0003-r0001-00000100.parquet`: the rows that rank 1 was given, up to step 100."""

    def __init__(self, folder: RunFolder, attempt: int, rank: int) -> None:
        self.folder, self.attempt, self.rank = folder, attempt, rank
        self._parts: list[tuple[int, np.ndarray, np.ndarray]] = []

    def add(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        """Note the samples of one share of step `step` (from 0); padding is left out."""
        kept = arrays["weight"] > 0
        self._parts.append((step, arrays["slot"][kept], arrays["row"][kept]))

    def flush(self, steps_done: int) -> None:
        """Write what was noted since the last flush, before a checkpoint of `steps_done` may count."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._parts:
            return
        sizes = [len(slots) for _, slots, _ in self._parts]
        total = sum(sizes)
        table = pa.table(
            {
                "step": np.repeat(np.array([step for step, _, _ in self._parts], dtype=np.int64), sizes),
                "rank": np.full(total, self.rank, dtype=np.int32),
                "slot": np.concatenate([slots for _, slots, _ in self._parts]),
                "row": np.concatenate([rows for _, _, rows in self._parts]),
                "attempt": np.full(total, self.attempt, dtype=np.int32),
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.folder.write(f"trace/a{self.attempt:04d}-r{self.rank:04d}-{steps_done:08d}.parquet", sink.getvalue().to_pybytes())
        self._parts.clear()


def read_trace(folder: RunFolder | str) -> Any:
    """The samples of the history that counts as a `pyarrow.Table` of `TRACE_COLUMNS`, in order of step and slot."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folder = RunFolder(folder) if isinstance(folder, str) else folder
    spans = {span.attempt: span for span in history(folder)}
    parts = []
    for name in folder.names("trace"):
        match = re.fullmatch(r"a(\d+)-r\d+-\d+\.parquet", name)
        span = spans.get(int(match[1])) if match else None
        if span is None:
            continue
        # Read by this thread alone: pyarrow's own would still hold Python's bytes at exit, and abort the process.
        part = pq.ParquetFile(pa.BufferReader(folder.read(f"trace/{name}")), pre_buffer=False).read(use_threads=False)
        parts.append(part.filter(pc.field("step") < span.end) if span.end is not None else part)
    if not parts:
        empty = {name: pa.array([], pa.int32() if name in ("rank", "attempt") else pa.int64()) for name in TRACE_COLUMNS}
        return pa.table(empty)
    return pa.concat_tables(parts).sort_by([("step", "ascending"), ("slot", "ascending")])
