"""The loop: next batch, step, log, validate, checkpoint. It knows no model, no Ray and no MLflow."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from diptych.batches import Fault, StepBatch
from diptych.config import RunConfig
from diptych.trainers.guard import Guard
from diptych.trainers.heartbeat import Heartbeat
from diptych.trainers.micro_batches import make_micro_batches
from diptych.trainers.objective import accumulate, local_weights, loss_value
from diptych.trainers.optim import learning_rate
from diptych.trainers.precision import fast_attention
from diptych.trainers.progress import Progress
from diptych.trainers.recorder import Recorder
from diptych.trainers.strategies import Strategy
from diptych.trainers.task import Batch, Task, Term
from diptych.trainers.throughput import Throughput, peak_flops
from diptych.trainers.validation import mean_terms, validate
from diptych.trainers.world import Sums

log = logging.getLogger(__name__)

_TOKENS, _STOP, _SAVE, _FAULTS = "run/tokens", "run/stop", "run/save", "run/faults"
"""What is summed up beside the weights of the terms, whose names are identifiers."""


def _never() -> bool:
    return False


@dataclass
class Callbacks:
    """What the caller wants to hear. Each is called on the worker that it concerns, and must not use collectives."""

    should_stop: Callable[[], bool] = _never
    """Asked on every worker before every step; True on any of them ends the run after that step, with a checkpoint."""
    should_save: Callable[[], bool] = _never
    """Asked on every worker before every step; True on any of them writes a checkpoint after that step."""
    record_faults: Callable[[int, int, list[Fault]], None] | None = None
    """`(step, rank, faults)` for every share that met bad samples; step -1 for validation."""
    show: Callable[[int, Task], None] | None = None
    """`(steps done, task)` on every worker after each validation, with averaged weights, in evaluation mode."""


@dataclass
class TrainResult:
    """How a run ended."""

    status: str
    """`finished`, `stopped` (asked to) or `early_stopped` (out of patience)."""
    step: int
    """Optimizer steps done over all attempts."""
    samples: int
    """Samples that the steps took."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of each figure of this attempt."""


def train(
    config: RunConfig,
    strategy: Strategy,
    stream: Callable[[int], Iterable[StepBatch]],
    validation: Callable[[], Iterable[StepBatch]] | None,
    recorder: Recorder,
    *,
    callbacks: Callbacks | None = None,
) -> TrainResult:
    """Train `strategy.task` from where the attempt's checkpoint stands to `config.train.steps`.

    `stream(step)` yields this worker's share of every step from `step` on; `validation()` yields the held-out shares,
    equally many on every worker. Raises `Diverged`, `FaultBudgetExceeded`, `Fenced`, `HungCollective`, or what the stream raises.
    """
    session = _Session(config, strategy, validation, recorder, callbacks or Callbacks())
    attention = fast_attention(strategy.precision, strategy.task.attention_tokens)
    with recorder, attention, Heartbeat(strategy.world) as heartbeat:
        status = session.status() or _steps(session, stream, heartbeat)
        recorder.close(session.progress.step)
    return session.result(status)


def _steps(session: _Session, stream: Callable[[int], Iterable[StepBatch]], heartbeat: Heartbeat) -> str:
    """The loop; returns how it ended."""
    config, strategy, progress = session.config, session.strategy, session.progress
    heartbeat.step = progress.step
    for share in session.throughput.timed(stream(progress.step)):
        if share.step != progress.step:
            raise RuntimeError(f"the stream delivered step {share.step} where step {progress.step} was due; nothing was trained on it")
        session.recorder.rows(share)
        micros = make_micro_batches(strategy.task, share.arrays, config.train.micro_batches, strategy.world.device)
        sums = session.agree(share, micros)
        terms, report = accumulate(strategy, micros, sums, seed=config.seed, step=progress.step)
        stop, save = session.settle(share, sums)
        lr = learning_rate(config.optim, config.train.steps, progress.step)
        norm = strategy.step(progress.step, lr)
        session.guard.watch(progress.step, norm)
        progress.step += 1
        heartbeat.step = progress.step
        session.throughput.step()
        done = progress.step == config.train.steps
        if session.due(config.train.log_every, done or stop):
            session.guard.check()
            session.log(terms, report, {"grad_norm": norm, "lr": lr})
        if session.due(config.validation.every_steps, done):
            session.validate()
        status = session.status() or ("stopped" if stop else "")
        if session.due(config.checkpoint.every_steps, save or bool(status)):
            session.guard.check()
            session.recorder.checkpoint(strategy, progress)
        if status:
            return status
    raise RuntimeError(f"the stream ended after step {progress.step} of {config.train.steps}")


def _tokens(batch: Batch) -> torch.Tensor:
    """Tokens of the texts of `batch`, `[]`."""
    return (batch["token_mask"] * batch["weight"][:, None]).sum() if "token_mask" in batch else batch["weight"].new_zeros(())


class _Session:
    """What the loop keeps between steps."""

    def __init__(
        self,
        config: RunConfig,
        strategy: Strategy,
        validation: Callable[[], Iterable[StepBatch]] | None,
        recorder: Recorder,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.strategy, self.validation, self.recorder, self.callbacks = config, strategy, validation, recorder, callbacks
        world, task = strategy.world, strategy.task
        self.progress: Progress = recorder.restore(strategy)
        self.guard = Guard(config)
        peak = peak_flops(world.device, strategy.precision.name)
        self.throughput = Throughput(config.train.global_batch_size, peak, task.flops_per_sample, world.size)
        self.tokens = torch.zeros((), dtype=torch.float64, device=world.device)
        self.metrics: dict[str, float] = {}
        if world.rank == 0:
            log.info("precision %s (%s)", strategy.precision.name, strategy.precision.reason)
            log.info("optimizer state: %d bytes on this worker of %d", strategy.optimizer_bytes(), world.size)

    def agree(self, share: StepBatch, micros: list[Batch]) -> Sums:
        """Begin to sum up over the workers, in one collective: weights of the terms, tokens, and what `settle` wants to know."""
        weights = local_weights(self.strategy.task, micros)
        self._report_faults(share.step, share.faults)
        wishes = {_STOP: self.callbacks.should_stop(), _SAVE: self.callbacks.should_save(), _FAULTS: len(share.faults)}
        flags = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in wishes.items()}
        return self.strategy.world.begin_sum(weights | {_TOKENS: torch.stack([_tokens(micro) for micro in micros]).sum()} | flags)

    def settle(self, share: StepBatch, sums: Sums) -> tuple[bool, bool]:
        """Whether any worker wants to stop, or to save; their faults are counted, and named to each other where there are any."""
        self.tokens += sums[_TOKENS]
        stop, save, faults = torch.stack([sums[name] for name in (_STOP, _SAVE, _FAULTS)]).tolist()
        if faults:
            self.progress.count_faults(self.strategy.world, share.faults, self.config.data.fault_budget)
        return stop > 0, save > 0

    def _report_faults(self, step: int, faults: list[Fault]) -> None:
        if faults and self.callbacks.record_faults is not None:
            self.callbacks.record_faults(step, self.strategy.world.rank, faults)

    def log(self, terms: dict[str, Term], report: dict[str, Term], plain: dict[str, torch.Tensor | float]) -> None:
        """Figures of the step just done, over all workers, and rates since the last line."""
        figures = mean_terms(self.strategy.world, terms | report)
        loss = loss_value(self.strategy.task, {name: figures[name] for name in terms})
        figures = {"loss": loss} | figures | {name: float(value) for name, value in plain.items()}
        figures |= self.throughput.rates(float(self.tokens))
        self.tokens.zero_()
        self._publish({f"train/{name}": value for name, value in figures.items()})

    def validate(self) -> None:
        """Figures of the held-out samples; counts for early stopping and the best checkpoint."""
        if self.validation is None or self.config.validation.samples == 0:
            return
        self.guard.check()
        begin = time.perf_counter()
        found: list[Fault] = []

        def collect(_: int, faults: list[Fault]) -> None:
            found.extend(faults)

        figures, samples = validate(self.strategy, self.validation(), self.config.seed, collect)
        self._report_faults(-1, found)
        self.progress.count_faults(self.strategy.world, found, self.config.data.fault_budget)
        if samples:
            self.progress.judge(self.config, figures)
            self._publish(figures)
        if self.callbacks.show is not None:
            with torch.no_grad(), self.strategy.averaged(), self.strategy.whole():
                self.strategy.task.eval()
                self.callbacks.show(self.progress.step, self.strategy.task)
                self.strategy.task.train()
        self.throughput.paused(begin)

    def _publish(self, figures: dict[str, float]) -> None:
        self.metrics |= figures
        self.recorder.metrics(self.progress.step, figures)

    def due(self, every: int, ends: bool) -> bool:
        """Whether something that happens every `every` steps (0 = only at the end) happens now."""
        return ends or (every > 0 and self.progress.step % every == 0)

    def status(self) -> str:
        """How the run has ended, or an empty string while it has not."""
        if self.progress.exhausted(self.config):
            return "early_stopped"
        return "finished" if self.progress.step >= self.config.train.steps else ""

    def result(self, status: str) -> TrainResult:
        """The run's end."""
        return TrainResult(status, self.progress.step, self.progress.step * self.config.train.global_batch_size, self.metrics)
