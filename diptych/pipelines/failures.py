"""Why workers failed, in words for the user: what Ray's controller hears of, kept in the run folder and told by the driver.

Ray tries again without a word. `FailureLog` travels to its controller and appends a line to `failures.jsonl` for every
failure; the driver shows each new one and, when the retries are spent, the last.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from diptych.redaction import clean_text

FILE = "failures.jsonl"

_MEMORY = "Lower train.global_batch_size, raise train.micro_batches, or set train.gradient_checkpointing=true; lower data.block_megabytes "
_MEMORY += "or data.prefetch_blocks; or take nodes with more memory."
_REMEDIES = {
    errno.ENOSPC: "The disk is full. Free space there, lower checkpoint.keep, or move the run folder",
    errno.EDQUOT: "The quota is used up. Free space there, lower checkpoint.keep, or move the run folder",
    errno.EROFS: "The file system cannot be written. Mount it for writing, or move the run folder",
    errno.EACCES: "The folder may not be written. Give the user of the workers the right to, or move the run folder",
    errno.EPERM: "The folder may not be written. Give the user of the workers the right to, or move the run folder",
}


class FailureLog(UserCallback):
    """Appends every failure of a group of workers to `run_dir/failures.jsonl`, from Ray's controller."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray when workers failed, before it decides whether to try again."""
        line = json.dumps({"time": time.time(), "reason": reason(worker_exceptions)})
        try:
            with (Path(self.run_dir) / FILE).open("a") as file:
                file.write(line + "\n")
        except OSError:
            return  # what failed may be this very disk; the driver still hears of the last failure


class FailureReader:
    """Yields each line of `failures.jsonl` once; lines of earlier calls are passed over."""

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / FILE
        self._read = self.file.stat().st_size if self.file.is_file() else 0

    def new(self) -> Iterator[str]:
        """Reasons that were added since the last call."""
        if not self.file.is_file() or self.file.stat().st_size == self._read:
            return
        with self.file.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            yield json.loads(line)["reason"]


def reason(failures: Mapping[int, BaseException]) -> str:
    """The cause of a failed group: what one worker died of explains the others, whose peer went away."""
    told = {rank: explain(error) for rank, error in sorted(failures.items())}
    # A worker that only saw its peers vanish has nothing to add if another says why.
    causes = {rank: text for rank, text in told.items() if not _is_collateral(text)} or told
    grouped: dict[str, list[int]] = {}
    for rank, text in causes.items():
        grouped.setdefault(text, []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in grouped.items())


def _is_collateral(text: str) -> bool:
    return "closed by peer" in text.lower() or "connection reset" in text.lower()


def explain(error: BaseException) -> str:
    """One line on a worker's error: its root cause, and the remedy where there is one."""
    root = _root(error)
    text = clean_text(" ".join(str(root).split()))
    if isinstance(root, OSError) and root.errno in _REMEDIES:
        return f"{_REMEDIES[root.errno]} ({text})"
    if "running low on memory" in text or "OutOfMemory" in type(root).__name__ or "out of memory" in text.lower():
        return f"out of memory: {_MEMORY} ({text[:300]})"
    if "node" in text and ("terminated" in text or "node died" in text or "node failure" in text.lower()):
        return f"its node is lost ({text[:300]})"
    if type(root).__name__ in ("ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "RayActorError"):
        return f"the process was killed, which the system does when memory runs out: see the node's kernel log. If so: {_MEMORY}"
    return f"{type(root).__name__}: {text}" if text else type(root).__name__


def _root(error: BaseException) -> BaseException:
    for attribute in ("health_check_failure", "controller_failure", "cause", "__cause__"):
        cause = getattr(error, attribute, None)
        # A hung collective explains itself better than the time-out below it.
        if isinstance(cause, BaseException) and type(error).__name__ != "HungCollective":
            return _root(cause)
    return error
