"""DeepSpeed's ZeRO: stage 1 partitions the optimizer's state over the workers, stage 2 gradients too, stage 3 weights too.

The model stays in fp32 under autocast, as it does under DDP, so both strategies compute the same numbers; AdamW is
PyTorch's own on each worker's flat partitions, whose learning rate the loop sets before each step.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.config import ConfigError, RunConfig
from diptych.trainers.ema import Ema
from diptych.trainers.optim import check_moments, make_optimizer, set_learning_rate
from diptych.trainers.precision import LossScale, Precision, resolve_precision
from diptych.trainers.state import MOMENTS, TrainState, check_fit, copy_into, persistent_buffers, to_cpu, trainable
from diptych.trainers.strategies.partitions import Partitions, scalars_carried
from diptych.trainers.strategies.warmup import no_bare_parameters, prepare_task
from diptych.trainers.task import Batch, Output, Task, Validation
from diptych.trainers.world import World


class Entry(nn.Module):
    """Every way into the task as one module, because ZeRO-3 brings weights together in a module's call and nowhere else.

    Returns plain tuples and dictionaries, in which DeepSpeed finds the tensors to hook.
    """

    def __init__(self, task: Task, precision: Precision) -> None:
        super().__init__()
        self.task, self.precision = task, precision
        self._opens = False
        # Registered before DeepSpeed's own hooks, which take the weights away after the task's call, and bring them back in
        # the backward pass when they find a tensor in what the call returned.
        task.register_forward_hook(self._open)

    def _open(self, _task: nn.Module, _inputs: tuple[Any, ...], output: Output) -> Any:
        return (output.terms, no_bare_parameters(output.features), output.report) if self._opens else output

    def forward(self, batch: Batch, way: str = "train") -> tuple[dict[str, Any], ...]:
        """`Task.forward`, `Task.features` or `Task.validate`, under the run's precision."""
        with self.precision.autocast():
            if way == "features":
                return (no_bare_parameters(self.task.features(batch)),)
            if way == "validate":
                result = self.task.validate(batch)
                return result.terms, result.rows, no_bare_parameters(result.features)
            self._opens = True
            try:
                return self.task(batch)
            finally:
                self._opens = False


def _concerns_training(record: logging.LogRecord) -> bool:
    """False for stage 3's warning that it finds no tensor in an `Output`; that happens in validation alone, where it needs none."""
    return "unknown inputs or outputs type (<class 'diptych" not in record.getMessage()


class DeepSpeedStrategy:
    """See `strategies.Strategy`."""

    def __init__(self, config: RunConfig, task: Task, world: World) -> None:
        self.config, self.task, self.world = config, task.to(world.device), world
        self.stage = int(config.train.strategy.removeprefix("zero"))
        self.precision = resolve_precision(config.train.precision, world.device)
        self.scale = LossScale() if self.precision.name == "fp16" else None
        if config.train.compile and self.stage == 3:
            raise ConfigError("train.compile", True, "false under train.strategy=zero3", "Use zero2, or leave compilation off.")
        if config.optim.eight_bit:
            raise ConfigError(
                "optim.eight_bit", True, "false under DeepSpeed", "ZeRO partitions the moments instead; or set train.strategy=ddp."
            )
        if config.optim.name != "adamw":
            raise ConfigError(
                "optim.name",
                config.optim.name,
                "adamw under DeepSpeed",
                "ZeRO partitions matrices that Muon needs whole; or set train.strategy=ddp.",
            )
        prepare_task(config, task)
        for parameter in task.parameters():
            # DeepSpeed views weights as bytes, which torch refuses where channels come last (and for kernels of one pixel then, too).
            if parameter.ndim == 4:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self.parameters = trainable(task)
        self.engine = self._initialise()
        self.partitions = Partitions(self.engine.optimizer, self.stage)
        self.ema = Ema(self.partitions.flats, config.optim.ema_decay) if config.optim.ema_decay else None

    def _initialise(self) -> Any:
        if self.world.device.type == "cpu":
            # DeepSpeed chooses its device when it is first imported.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", str(self.world.device.index or 0))
        import deepspeed

        # Its progress reports go to standard output, where programs expect our own last line.
        deepspeed.utils.logger.setLevel(logging.WARNING)
        deepspeed.utils.logger.addFilter(_concerns_training)
        # An all-reduce for inference that DeepSpeed would compile for minutes, and that needs a compiler on every worker.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            backend = "nccl" if self.world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        for parameter in self.task.parameters():
            # DeepSpeed sends parameters as rows of bytes, which weights with channels last are not. `contiguous` would leave those of
            # 1×1 convolutions as they are.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        with scalars_carried(self.task):
            engine, *_ = deepspeed.initialize(
                model=Entry(self.task, self.precision),
                optimizer=make_optimizer(self.task, self.config.optim),
                config=self._settings(),
                dist_init_required=False,
            )
        return engine

    def _settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration; everything else is ours."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.config.train.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.world.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.config.train.micro_batches,
            "gradient_clipping": self.config.optim.clip_norm,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }

    def forward(self, batch: Batch, last: bool) -> Output:
        """Forward; without `last` the optimizer's step is not due."""
        self.engine.set_gradient_accumulation_boundary(last)
        terms, features, report = self.engine(batch)
        return Output(terms, features, report)

    @torch.no_grad()
    def features(self, batch: Batch) -> dict[str, Tensor]:
        """`Task.features` through the wrapped module."""
        return self.engine.module(batch, "features")[0]

    @torch.no_grad()
    def validate(self, batch: Batch) -> Validation:
        """`Task.validate` through the wrapped module."""
        terms, rows, features = self.engine.module(batch, "validate")
        return Validation(terms, rows, features)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward; DeepSpeed takes the mean over workers, so each part counts `world.size` times."""
        if self.scale is not None:
            self.engine.optimizer.override_loss_scale(self.scale.scale)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, step: int, lr: float) -> Tensor:
        """Step on this worker's partitions, gather the weights, average. DeepSpeed refuses gradients that are not finite."""
        set_learning_rate(self.engine.optimizer, lr)
        self.engine.step()
        overflow = bool(self.engine.optimizer.overflow)
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.world.device).reshape(())
        if self.scale is not None:
            self.scale.update(overflow)
        if overflow:
            return norm.new_full((), -1.0 if self.scale is not None else float("inf"))
        self._after_step()
        if self.ema is not None:
            self.ema.update(step)
        return norm

    @torch.no_grad()
    def _after_step(self) -> None:
        """The task's changes to parameters, carried over to the partitions that the next step starts from."""
        if type(self.task).after_step is Task.after_step:
            return
        before = {name: parameter._version for name, parameter in self.parameters.items()}
        self.task.after_step()
        changed = [parameter for name, parameter in self.parameters.items() if parameter._version != before[name]]
        for parameter in changed:
            if parameter.numel() == 0:
                raise ConfigError(
                    "train.strategy", "zero3", "ddp, zero1 or zero2", f"{self.task.name} changes a large parameter after each step."
                )
            self.partitions.write(parameter, parameter.detach().float())
        if changed and self.stage == 3:
            self.partitions.refresh()

    def averaged(self) -> AbstractContextManager[None]:
        """The averages, swapped into the partitions and gathered."""
        return self._averaged() if self.ema is not None else nullcontext()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        assert self.ema is not None
        try:
            with self.ema.swapped():
                self.partitions.refresh()
                yield
        finally:
            self.partitions.refresh()

    def whole(self) -> AbstractContextManager[None]:
        """Under stage 3 every parameter, gathered."""
        return self._gathered(self.task.parameters())

    def state(self) -> TrainState | None:
        """One parameter after the other is gathered; rank 0 keeps the copies."""
        state = TrainState(scaler=self.scale.state_dict() if self.scale is not None else {})
        for name, parameter in self.parameters.items():
            self._keep(state.weights, name, self.partitions.read(parameter))
            for key in MOMENTS:
                self._keep(state.optimizer, f"{key}/{name}", self.partitions.read(parameter, key))
            self._keep(state.optimizer, f"step/{name}", torch.tensor(self.partitions.steps))
        if self.ema is not None:
            with self.ema.swapped():
                for name, parameter in self.parameters.items():
                    self._keep(state.ema, name, self.partitions.read(parameter))
        for name, parameter in self._frozen().items():
            with self._gathered([parameter]):
                self._keep(state.weights, name, parameter)
        state.weights |= to_cpu(persistent_buffers(self.task)) if self.world.rank == 0 else {}
        return state if self.world.rank == 0 else None

    def _keep(self, part: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if self.world.rank == 0:
            part |= to_cpu({name: tensor})

    def _frozen(self) -> dict[str, nn.Parameter]:
        """Those that a checkpoint holds."""
        left_out = self.parameters.keys() | self.task.restorable()
        return {name: parameter for name, parameter in self.task.named_parameters() if name not in left_out}

    def _gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    @torch.no_grad()
    def load_state(self, state: TrainState) -> None:
        """Each worker takes its part of every tensor."""
        buffers = persistent_buffers(self.task)
        held = self.parameters | self._frozen()
        shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in held.items()}
        check_fit(shapes | {name: buffer.shape for name, buffer in buffers.items()}, state.weights, "model.safetensors")
        check_moments(state.optimizer, self.config.optim)
        copy_into(buffers, {name: state.weights[name] for name in buffers}, "model.safetensors")
        for name, parameter in self._frozen().items():
            self.partitions.write_frozen(parameter, state.weights[name])
        for name, parameter in self.parameters.items():
            self.partitions.write(parameter, state.weights[name])
            for key in MOMENTS:
                if f"{key}/{name}" in state.optimizer:
                    self.partitions.write(parameter, state.optimizer[f"{key}/{name}"], key)
        steps = [float(value) for name, value in state.optimizer.items() if name.startswith("step/")]
        self.partitions.steps = max(steps, default=0.0)
        self.partitions.refresh()
        if self.ema is not None:
            averages = state.ema or state.weights
            self.ema.swap()
            for name, parameter in self.parameters.items():
                self.partitions.write(parameter, averages[name])
            self.ema.swap()
        if state.scaler and self.scale is not None:
            self.scale.load_state_dict(state.scaler)

    def optimizer_bytes(self) -> int:
        """Both moments of this worker's partitions."""
        return self.partitions.bytes_of_moments()
