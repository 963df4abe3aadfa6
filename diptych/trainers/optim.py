"""AdamW, and learning rates that are a pure function of the step.

The rate is set before every step and never restored from a checkpoint, so that a resumed run, a longer schedule or a
trial that explores takes the rate of its own configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diptych.config import ConfigError, OptimConfig
from diptych.trainers.task import Task


def learning_rate(config: OptimConfig, steps: int, step: int) -> float:
    """Rate of optimizer step `step` (from 0) of a run of `steps`: linear warm-up, then `config.schedule`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1.0 - progress
    floor = min(config.min_lr, config.lr)
    return floor + (config.lr - floor) * left


def adamw(task: Task, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the task's parameter groups (PyTorch's, or bitsandbytes' under `eight_bit`; Loshchilov and Hutter, 2019)."""
    groups = task.parameter_groups(config.weight_decay)
    if not groups:
        raise ConfigError("task", f"{task.name} without trainable parameters", "at least one", "Nothing could be learned: unfreeze some.")
    if config.eight_bit:
        from diptych.trainers.eight_bit import adamw_8bit

        return adamw_8bit(groups, config)
    # On a CPU torch would otherwise take a dozen small operations for each parameter: a fifth of the step of a small model.
    fused = True if all(parameter.device.type == "cpu" for parameter in task.parameters()) else None
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Sequence[nn.Parameter], clip_norm: float) -> Tensor:
    """Scale the gradients to a global L2 norm of at most `clip_norm` (0 = leave them); returns the norm before, `[]`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if clip_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm
