"""Everything that one attempt writes to its run folder, and the start of an attempt; the loop calls nothing else to store."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

from diptych.batches import StepBatch
from diptych.config import ConfigError, RunConfig
from diptych.trainers.attempts import Attempt, Fenced, checkpoint_name
from diptych.trainers.checkpoint import Checkpoint, CheckpointWriter, begin_attempt, load
from diptych.trainers.journal import MetricsLog, Trace
from diptych.trainers.progress import Progress
from diptych.trainers.runfolder import LASTING, RunFolder, StorageFailed
from diptych.trainers.strategies import Strategy
from diptych.trainers.world import World

log = logging.getLogger(__name__)


def start_attempt(url: str, world: World) -> Attempt:
    """Begin an attempt on rank 0 and tell every worker; the stream starts at its `start_step`. Raises `StorageFailed` on all."""
    begun: Attempt | StorageFailed | None = None
    if world.rank == 0:
        try:
            begun = begin_attempt(url, world.size)
        except OSError as error:
            begun = _storage_failed(0, url, error)
    begun = world.broadcast_object(begun)
    if isinstance(begun, StorageFailed):
        raise begun
    assert begun is not None
    return begun


def _storage_failed(rank: int, url: str, error: OSError) -> StorageFailed:
    return StorageFailed(f"rank {rank} cannot write to {url}: {error}", lasting=error.errno in LASTING)


class Recorder:
    """Checkpoints, metrics and trace of one attempt. Every worker has one; rank 0 writes what is common."""

    def __init__(self, url: str, attempt: Attempt, world: World, config: RunConfig, digest: str = "") -> None:
        self.folder = RunFolder(url, config.cluster.storage_retries)
        self.attempt, self.world, self.config, self.digest = attempt, world, config, digest
        self.metrics_log = MetricsLog(self.folder, attempt.attempt) if world.rank == 0 else None
        self.trace = Trace(self.folder, attempt.attempt, world.rank) if config.data.trace else None
        self.writer = CheckpointWriter(self.folder, attempt.attempt, config.checkpoint.keep) if world.rank == 0 else None

    def restore(self, strategy: Strategy) -> Progress:
        """Load the checkpoint that the attempt decided on, if any; where training stands."""
        if self.attempt.resumed_from is None:
            return Progress()
        checkpoint = load(self.folder, self.attempt.resumed_from)
        self._check_continuity(checkpoint)
        strategy.load_state(checkpoint.tensors)
        log.info("attempt %d resumes from %s", self.attempt.attempt, checkpoint.name)
        return Progress.from_state(checkpoint.state)

    def _check_continuity(self, checkpoint: Checkpoint) -> None:
        """The stream goes on where it stopped only with the same data, seed and global batch."""
        known, now = checkpoint.state, self.config
        remedy = "Go on with what the run began with (its config.json), or start a new run with another name."
        if self.digest and known["digest"] and self.digest != known["digest"]:
            raise ConfigError("data.shards", f"{now.data.shards} of digest {self.digest}", f"data of digest {known['digest']}", remedy)
        if now.seed != known["config"]["seed"]:
            raise ConfigError("seed", now.seed, str(known["config"]["seed"]), remedy)
        if known["slot"] != known["step"] * now.train.global_batch_size:
            size = known["config"]["train"]["global_batch_size"]
            raise ConfigError("train.global_batch_size", now.train.global_batch_size, str(size), remedy)

    def rows(self, share: StepBatch) -> None:
        """Note which samples this worker was given."""
        if self.trace is not None:
            self.trace.add(share.step, share.arrays)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line of figures after `step` steps."""
        if self.metrics_log is not None:
            self.metrics_log.add(step, metrics)

    def checkpoint(self, strategy: Strategy, progress: Progress) -> None:
        """Copy the state now and write it behind the next steps. Every worker calls it at the same step.

        Raises on every worker: `Fenced` if a newer attempt has taken over, `StorageFailed` if any of them could not write.
        """
        self._agreed(lambda: self._flush(progress.step))
        tensors = strategy.state()
        best = progress.saving(self.config, checkpoint_name(progress.step, self.attempt.attempt))

        def save() -> None:
            if self.writer is not None:
                assert tensors is not None
                assert self.metrics_log is not None
                self.writer.save(tensors, progress.to_state() | self._facts(progress), best, self.metrics_log.committed)

        self._agreed(save)

    def _agreed(self, write: Callable[[], object]) -> None:
        """`write()` on every worker; what stops one stops all, together: who only saw a peer vanish would be started again."""
        verdict: RuntimeError | None = None
        try:
            write()
        except Fenced as error:
            verdict = error
        except OSError as error:
            verdict = _storage_failed(self.world.rank, self.folder.url, error)
        for found in self.world.gather_objects(verdict):
            if found is not None:
                raise found

    def _facts(self, progress: Progress) -> dict[str, Any]:
        return {
            "slot": progress.step * self.config.train.global_batch_size,
            "samples": progress.step * self.config.train.global_batch_size,
            "world_size": self.world.size,
            "attempt": self.attempt.attempt,
            "digest": self.digest,
            "config": json.loads(self.config.to_json(public=True)),
        }

    def _flush(self, step: int) -> None:
        """Bring trace and metrics to the folder on every worker, so that what a checkpoint stands for is there before it counts."""
        if self.metrics_log is not None:
            self.metrics_log.flush()
        if self.trace is not None:
            self.trace.flush(step)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # What ended the run is what the caller wants to know; a checkpoint under way still gets its chance.
        if kind is not None and self.writer is not None:
            try:
                self.writer.wait()
            except Exception:
                log.exception("the checkpoint under way was not written either")

    def close(self, step: int) -> None:
        """Write what is left and wait for the last checkpoint; raises as `checkpoint` does."""

        def rest() -> None:
            if self.writer is not None:
                self.writer.wait()
            self._flush(step)

        self._agreed(rest)
