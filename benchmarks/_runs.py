"""Whole runs of ours in this process: one that must end as finished, and one whose steps are timed."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from diptych.config import RunConfig
from diptych.datasets.stream import LocalStream
from diptych.pipelines.local import train_here
from diptych.pipelines.prepare import prepare
from diptych.pipelines.session import StreamFactory
from diptych.trainers import loop
from diptych.trainers.precision import denormals_flushed
from diptych.trainers.recorder import Recorder, start_attempt
from diptych.trainers.strategies.ddp import DDPStrategy
from diptych.trainers.task import Batch, Output
from diptych.trainers.tasks import load_task_class
from diptych.trainers.world import World


def train(config: RunConfig, run: Path, make_stream: StreamFactory | None = None) -> None:
    """`train_here`, refusing a run that did not finish: its folder may hold one on other data, which nothing may be said of."""
    result = train_here(config, run, make_stream=make_stream)
    if result["status"] != "finished":
        raise SystemExit(f"the run in {run} ended as {result['status']}: {result['error']}")


class Timed(DDPStrategy):
    """Notes when each step ended, and how long forward, backward and optimizer took in it."""

    def __init__(self, config: RunConfig, task: Any, world: World) -> None:
        super().__init__(config, task, world)
        self.ended: list[float] = []
        self.inside: list[float] = []
        self._since = 0.0

    def forward(self, batch: Batch, last: bool) -> Output:
        """As `DDPStrategy.forward`."""
        begin = time.perf_counter()
        output = super().forward(batch, last)
        self._since += time.perf_counter() - begin
        return output

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `DDPStrategy.backward`."""
        begin = time.perf_counter()
        super().backward(loss, last)
        self._since += time.perf_counter() - begin

    def step(self, step: int, lr: float) -> Tensor:
        """As `DDPStrategy.step`."""
        begin = time.perf_counter()
        norm = super().step(step, lr)
        self.ended.append(time.perf_counter())
        self.inside.append(self._since + self.ended[-1] - begin)
        self._since = 0.0
        return norm


def timed_run(config: RunConfig, folder: Path, warm_up: int) -> tuple[list[float], list[float]]:
    """(seconds, seconds of it inside the model and the optimizer) of each step after the first `warm_up`, of our whole loop."""
    folder.mkdir(parents=True)
    prepared = prepare(config, folder)
    config = prepared.config
    with denormals_flushed():
        strategy = Timed(config, load_task_class(config.task.name)(config.task, config.seed), World.current("cpu"))
        recorder = Recorder(str(folder), start_attempt(str(folder), strategy.world), strategy.world, config, prepared.facts["digest"])
        loop.train(config, strategy, lambda step: LocalStream(prepared.train, 0, 1, step, config.train.steps), None, recorder)
    seconds = [after - before for before, after in itertools.pairwise(strategy.ended)]
    return seconds[warm_up:], strategy.inside[warm_up + 1 :]
