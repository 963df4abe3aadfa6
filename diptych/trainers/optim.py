"""AdamW or Muon, and learning rates that are a pure function of the step.

The rate is set before every step and never restored from a checkpoint, so that a resumed run, a longer schedule or a
trial that explores takes the rate of its own configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from diptych.config import ConfigError, OptimConfig
from diptych.trainers.muon import MOMENTUM, MuonWithAdamW, hidden_matrices
from diptych.trainers.state import MOMENTS
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


def make_optimizer(task: Task, config: OptimConfig) -> torch.optim.Optimizer:
    """`config.name` over the task's parameter groups: Muon, or AdamW (PyTorch's, or bitsandbytes' under `eight_bit`; Loshchilov and
    Hutter, 2019). Raises `ConfigError` where nothing is trained, or the optimizer does not fit.
    """
    groups = task.parameter_groups(config.weight_decay)
    if not groups:
        raise ConfigError("task", f"{task.name} without trainable parameters", "at least one", "Nothing could be learned: unfreeze some.")
    if config.eight_bit:
        if config.name != "adamw":
            raise ConfigError("optim.eight_bit", True, f"false with optim.name={config.name}", "Its moments are not AdamW's.")
        from diptych.trainers.eight_bit import adamw_8bit

        eight_bit: torch.optim.Optimizer = adamw_8bit(groups, config)
        return eight_bit
    # On a CPU torch would otherwise take a dozen small operations for each parameter: a fifth of the step of a small model.
    fused = True if all(parameter.device.type == "cpu" for parameter in task.parameters()) else None
    if config.name == "muon":
        return MuonWithAdamW(groups, hidden_matrices(task), config, fused)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def read_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer remembers of a parameter, in full: `state.MOMENTS` and `step`, or Muon's `MOMENTUM`; zeros before a gradient."""
    if isinstance(optimizer, MuonWithAdamW):
        if parameter in optimizer.matrices:
            return {MOMENTUM: optimizer.momentum(parameter)}
        assert optimizer.adamw is not None
        optimizer = optimizer.adamw
    known = optimizer.state.get(parameter)
    # A parameter that never had a gradient has no moments yet; under ZeRO it has zeros.
    if not known:
        return dict.fromkeys(MOMENTS, torch.zeros_like(parameter)) | {"step": torch.zeros(())}
    if "state1" in known:
        from diptych.trainers.eight_bit import full_moments

        return full_moments(known)
    return {key: known[key] for key in (*MOMENTS, "step")}


def write_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: dict[str, Tensor]) -> None:
    """Give a parameter what `read_moments` returned."""
    if isinstance(optimizer, MuonWithAdamW):
        if parameter in optimizer.matrices:
            optimizer.momentum(parameter).copy_(kept[MOMENTUM])
            return
        assert optimizer.adamw is not None
        optimizer = optimizer.adamw
    # In the parameter's own memory format: the fused optimizer pairs elements by their place in memory.
    moments = {key: torch.empty_like(parameter).copy_(kept[key]) for key in MOMENTS}
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[parameter] = {"step": kept["step"].float().clone()} | moments
        return
    from diptych.trainers.eight_bit import store_moments

    store_moments(optimizer, parameter, moments, float(kept["step"]))


def check_moments(saved: Iterable[str], config: OptimConfig) -> None:
    """`ConfigError` where a checkpoint's moments, by their names, are of another optimizer than `config.name`."""
    names = {key.partition("/")[0] for key in saved}
    holds = "muon" if MOMENTUM in names else "adamw"
    if names and holds != config.name:
        raise ConfigError("optim.name", config.name, holds, "The checkpoint's moments are that optimizer's.")


def clip_gradients(parameters: Sequence[nn.Parameter], clip_norm: float) -> Tensor:
    """Scale the gradients to a global L2 norm of at most `clip_norm` (0 = leave them); returns the norm before, `[]`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if clip_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm
