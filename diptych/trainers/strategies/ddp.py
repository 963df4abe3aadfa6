"""PyTorch's DistributedDataParallel: every worker holds everything, gradients are averaged in buckets.

DDP lays its buckets out anew after the first backward pass, in the order in which gradients arrived. Another layout
sums in another order, so a resumed run would differ from an uninterrupted one in its first step. A warm-up on
`Task.example_batch`, whose gradients are dropped, settles the layout before the first real step.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diptych.config import RunConfig
from diptych.trainers.ema import Ema
from diptych.trainers.optim import check_moments, clip_gradients, make_optimizer, read_moments, set_learning_rate, write_moments
from diptych.trainers.precision import Precision, resolve_precision
from diptych.trainers.state import TrainState, copy_into, saved_tensors, to_cpu, trainable
from diptych.trainers.strategies.warmup import example_loss, no_bare_parameters, prepare_task, state_kept
from diptych.trainers.task import Batch, Output, Task, Validation
from diptych.trainers.world import World


class Autocast(nn.Module):
    """The task under the run's precision; autocast is entered inside, where no wrapper switches it off."""

    def __init__(self, task: Task, precision: Precision) -> None:
        super().__init__()
        self.task, self.precision = task, precision

    def forward(self, batch: Batch) -> Output:
        """`Task.forward`."""
        with self.precision.autocast():
            output = self.task(batch)
            return Output(output.terms, no_bare_parameters(output.features), output.report)


class DDPStrategy:
    """See `strategies.Strategy`. A world of one needs no process group and gets no wrapper."""

    def __init__(self, config: RunConfig, task: Task, world: World) -> None:
        self.config, self.task, self.world = config, task.to(world.device), world
        self.precision = resolve_precision(config.train.precision, world.device)
        prepare_task(config, task)
        self.parameters = trainable(task)
        self.optimizer = make_optimizer(task, config.optim)
        self.scaler = self.precision.scaler()
        self.model: nn.Module = Autocast(task, self.precision)
        if world.size > 1:
            self.model = self._wrap()
        self.ema = Ema(list(self.parameters.values()), config.optim.ema_decay) if config.optim.ema_decay else None

    def _wrap(self) -> DistributedDataParallel:
        """Wrap, and run twice so that the buckets have settled and been used once."""
        plain = self.model
        with state_kept(self.task):
            example_loss(plain, self.task, self.world.device).backward()
            idle = [name for name, parameter in self.parameters.items() if parameter.grad is None]
            self.task.zero_grad(set_to_none=True)
            # With parameters that get no gradient DDP has to search for them, and then never lays its buckets out anew.
            with warnings.catch_warnings():
                # The name that replaces `broadcast_buffers` is younger than the oldest torch that we support.
                warnings.simplefilter("ignore", FutureWarning)
                model = DistributedDataParallel(
                    plain,
                    device_ids=[self.world.device.index] if self.world.device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    find_unused_parameters=bool(idle),
                )
            for _ in range(2):
                example_loss(model, self.task, self.world.device).backward()
            self.task.zero_grad(set_to_none=True)
        return model

    def forward(self, batch: Batch, last: bool) -> Output:
        """Forward; without `last` gradients stay on this worker."""
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last
        return self.model(batch)

    @torch.no_grad()
    def features(self, batch: Batch) -> dict[str, Tensor]:
        """`Task.features` at the run's precision."""
        with self.precision.autocast():
            return self.task.features(batch)

    @torch.no_grad()
    def validate(self, batch: Batch) -> Validation:
        """`Task.validate` at the run's precision."""
        with self.precision.autocast():
            return self.task.validate(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward; DDP takes the mean over workers, so each part counts `world.size` times."""
        self.scaler.scale(loss * self.world.size).backward()

    def step(self, step: int, lr: float) -> Tensor:
        """Unscale, clip, step, average. The norm is the same on every worker, the gradients having been reduced."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(list(self.parameters.values()), self.config.optim.clip_norm)
        set_learning_rate(self.optimizer, lr)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() < before:
            return norm.new_full((), -1.0)
        with torch.no_grad():
            self.task.after_step()
        if self.ema is not None:
            self.ema.update(step)
        return norm

    def averaged(self) -> AbstractContextManager[None]:
        """The averages, swapped in."""
        return self.ema.swapped() if self.ema is not None else nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Parameters are always whole."""
        return nullcontext()

    def state(self) -> TrainState | None:
        """Every worker holds the same; rank 0 copies."""
        if self.world.rank != 0:
            return None
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            optimizer |= {f"{key}/{name}": value for key, value in read_moments(self.optimizer, parameter).items()}
        averages = dict(zip(self.parameters, self.ema.average, strict=True)) if self.ema is not None else {}
        return TrainState(
            weights=to_cpu(self._model_tensors()), optimizer=to_cpu(optimizer), ema=to_cpu(averages), scaler=self.scaler.state_dict()
        )

    def load_state(self, state: TrainState) -> None:
        """Copy every part in place; a missing part (an average switched on later) starts from the weights."""
        copy_into(self._model_tensors(), state.weights, "model.safetensors")
        check_moments(state.optimizer, self.config.optim)
        kept: dict[str, dict[str, Tensor]] = {}
        for key, value in state.optimizer.items():
            moment, _, name = key.partition("/")
            kept.setdefault(name, {})[moment] = value
        for name in self.parameters.keys() & kept.keys():
            write_moments(self.optimizer, self.parameters[name], kept[name])
        if self.ema is not None:
            averages = dict(zip(self.parameters, self.ema.average, strict=True))
            copy_into(averages, state.ema or {name: state.weights[name] for name in averages}, "ema.safetensors")
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)

    def _model_tensors(self) -> dict[str, Tensor]:
        return saved_tensors(self.task)

    def optimizer_bytes(self) -> int:
        """All moments of every trainable parameter."""
        moments = (read_moments(self.optimizer, parameter) for parameter in self.parameters.values())
        return sum(value.nbytes for kept in moments for key, value in kept.items() if key != "step")
