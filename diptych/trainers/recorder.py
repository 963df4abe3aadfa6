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
from diptych.trainers.runfolder import RunFolder
from diptych.trainers.strategies import Strategy
from diptych.trainers.world import World

log = logging.getLogger(__name__)


def start_attempt(url: str, world: World) -> Attempt:
    """Begin an attempt on rank 0 and tell every worker; the stream starts at its `start_step`."""
    return world.broadcast_object(begin_attempt(url, world.size) if world.rank == 0 else None)


class Recorder:
    """Checkpoints, metrics and trace of one attempt. Every worker has one; rank 0 writes what is common."""

    def __init__(self, url: str, attempt: Attempt, world: World, config: RunConfig, digest: str = "") -> None:
        self.folder, self.attempt, self.world, self.config, self.digest = RunFolder(url), attempt, world, config, digest
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

        Raises `Fenced`, on every worker, if a newer attempt has taken over.
        """
        self._flush(progress.step)
        tensors = strategy.state()
        best = progress.saving(self.config, checkpoint_name(progress.step, self.attempt.attempt))

        def save(writer: CheckpointWriter) -> None:
            assert tensors is not None
            assert self.metrics_log is not None
            writer.save(tensors, progress.to_state() | self._facts(progress), best, self.metrics_log.committed)

        self._write(save)

    def _write(self, write: Callable[[CheckpointWriter], object]) -> None:
        """`write` on rank 0. If it is fenced, all workers are, together: one that only saw a peer vanish would be started again."""
        verdict = None
        if self.writer is not None:
            try:
                write(self.writer)
            except Fenced as error:
                verdict = str(error)
        verdict = self.world.broadcast_object(verdict)
        if verdict is not None:
            raise Fenced(verdict)

    def _facts(self, progress: Progress) -> dict[str, Any]:
        return {
            "slot": progress.step * self.config.train.global_batch_size,
            "samples": progress.step * self.config.train.global_batch_size,
            "world_size": self.world.size,
            "attempt": self.attempt.attempt,
            "digest": self.digest,
            "config": json.loads(self.config.to_json()),
        }

    def _flush(self, step: int) -> None:
        """Bring trace and metrics to the folder on every worker, so that what a checkpoint stands for is there before it counts."""
        if self.metrics_log is not None:
            self.metrics_log.flush()
        if self.trace is not None:
            self.trace.flush(step)
            self.world.barrier()

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
        """Write what is left and wait for the last checkpoint; raises its error."""
        self._write(CheckpointWriter.wait)
        self._flush(step)
