"""How a step is spread over workers: DDP, or DeepSpeed's ZeRO 1–3, behind one protocol chosen by `train.strategy`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from diptych.config import RunConfig
from diptych.trainers.precision import Precision
from diptych.trainers.state import TrainState
from diptych.trainers.task import Batch, Output, Task, Validation
from diptych.trainers.world import World


class Strategy(Protocol):
    """What the loop asks of a strategy. Unless said otherwise every worker calls every method, in the same order."""

    task: Task
    world: World
    precision: Precision

    def forward(self, batch: Batch, last: bool) -> Output:
        """`Task.forward` with gradients; `last` marks the step's last micro-batch, whose backward pass may communicate."""

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """`Task.features` without gradients, as this worker's weights are now."""

    def validate(self, batch: Batch) -> Validation:
        """`Task.validate` without gradients."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Back-propagate this worker's part of the global loss; parts are summed over workers and micro-batches."""

    def step(self, step: int, lr: float) -> Tensor:
        """Clip, take optimizer step `step` at rate `lr`, average weights. Returns the global gradient norm `[]` before clipping.

        A step that fp16's scaler refused changes nothing and returns a norm of -1.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the task holds its averaged weights, if the run keeps any."""

    def whole(self) -> AbstractContextManager[None]:
        """Inside the block every worker's task holds all parameters in full (export, generation)."""

    def state(self) -> TrainState | None:
        """Copies of everything that a resumed run needs, on rank 0; None on the other workers."""

    def load_state(self, state: TrainState) -> None:
        """Take over a state that any strategy at any world size saved; every worker passes the same one."""

    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's moments that this worker holds."""


def make_strategy(config: RunConfig, task: Task, device: torch.device | str = "cpu") -> Strategy:
    """The strategy that `config.train` names, around `task`, on the default process group if there is one.

    Moves the task to `device`. Raises `ConfigError` where the combination cannot work.
    """
    world = World.current(device)
    if config.train.strategy == "ddp":
        from diptych.trainers.strategies.ddp import DDPStrategy

        return DDPStrategy(config, task, world)
    from diptych.trainers.strategies.deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(config, task, world)
