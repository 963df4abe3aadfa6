"""What both strategies do to a task before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diptych.config import RunConfig
from diptych.trainers.precision import set_deterministic
from diptych.trainers.state import persistent_buffers
from diptych.trainers.task import Batch, Task


def prepare_task(config: RunConfig, task: Task) -> None:
    """Options that hold under every strategy: deterministic kernels, gradient checkpointing, `torch.compile`."""
    if config.train.deterministic:
        set_deterministic()
    if config.train.gradient_checkpointing:
        task.set_gradient_checkpointing()
    if config.train.compile:
        # In place: parameter names stay, and only `forward` is compiled.
        task.compile()
    task.train()


def no_bare_parameters(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of parameters that a task hands out as they are (a temperature); call it inside the forward pass.

    DDP would take such a parameter for unused, and ZeRO-3 takes its content away after the pass.
    """
    return {name: value.clone() if isinstance(value, nn.Parameter) else value for name, value in features.items()}


def example_batch(task: Task, device: torch.device) -> Batch:
    """Two made-up rows with their draws, on `device`."""
    batch = {key: value.to(device) for key, value in task.example_batch(2).items()}
    return batch | task.draws(batch)


def example_loss(model: nn.Module, task: Task, device: torch.device) -> Tensor:
    """A loss on the example batch that reaches every parameter that a real step reaches."""
    output = model(example_batch(task, device))
    values = [term.sum for term in output.terms.values()] + [value.float().sum() for value in output.features.values()]
    return torch.stack([value.float() for value in values]).sum()


@contextmanager
def state_kept(task: Task) -> Iterator[None]:
    """Buffers and random state are after the block what they were before it."""
    buffers = {name: buffer.detach().clone() for name, buffer in persistent_buffers(task).items()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
    with torch.no_grad():
        for name, buffer in persistent_buffers(task).items():
            buffer.copy_(buffers[name])
