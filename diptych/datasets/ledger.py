"""The ledger: every bad sample that a run met, with shard, key, reason and the slot that a substitute fills.

Each worker of each attempt appends to a file of its own, `ledger/a0003-r0001.jsonl`; `read_ledger` puts them together and
tells each distinct fault once.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from diptych.batches import Fault
from diptych.datasets import folders, storage


class Ledger:
    """Appends the faults of one attempt's workers; made on each worker."""

    def __init__(self, run_dir: str, attempt: int) -> None:
        self.folder, self.attempt = storage.join(run_dir, "ledger"), attempt
        self._lines: dict[int, list[bytes]] = {}

    def record(self, step: int, rank: int, faults: list[Fault]) -> None:
        """Add the faults of one share; `step` is -1 for validation. On disk when this returns."""
        lines = [json.dumps({"attempt": self.attempt, "step": step, "rank": rank} | asdict(fault)).encode() + b"\n" for fault in faults]
        url = storage.join(self.folder, f"a{self.attempt:04d}-r{rank:04d}.jsonl")
        if storage.is_local(url):
            folders.make_folder(self.folder)
            with open(storage.local_path(url), "ab") as file:
                file.writelines(lines)
            return
        # Object stores cannot append; faults are few, and the budget bounds them.
        self._lines.setdefault(rank, []).extend(lines)
        storage.write_bytes(url, b"".join(self._lines[rank]))


def read_ledger(run_dir: str) -> list[dict[str, Any]]:
    """Every line, oldest attempt first; a fault that a later attempt met again at the same slot is told once."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for url in folders.list_files(storage.join(run_dir, "ledger"), ".jsonl"):
        for text in storage.read_bytes(url).splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # the last line of a worker that was killed while it wrote
            lines.setdefault((line["shard"], line["key"], line["kind"], line["slot"]), line)
    return list(lines.values())


def summary(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Distinct bad samples by kind."""
    return dict(Counter(kind for _, _, kind in {(line["shard"], line["key"], line["kind"]) for line in lines}))
