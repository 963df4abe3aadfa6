"""The whole state of training as full tensors per parameter, so that any world size and either strategy loads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diptych.config import ConfigError

if TYPE_CHECKING:
    from diptych.trainers.task import Task

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, under torch's and DeepSpeed's common names."""


@dataclass
class TrainState:
    """Full fp32 tensors on the CPU, by parameter name. Empty parts were not saved, and loading leaves them fresh."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """Every parameter (fp32 master weights under ZeRO) and every persistent buffer."""
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """`exp_avg/<parameter>`, `exp_avg_sq/<parameter>` and `step/<parameter>` (AdamW's counter, `[]`), or `momentum/<parameter>` (Muon's)."""
    ema: dict[str, Tensor] = field(default_factory=dict)
    """Averages of the trainable parameters."""
    scaler: dict[str, float | int] = field(default_factory=dict)
    """fp16's loss scale and its growth counter."""


def trainable(task: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, tied ones once, in a fixed order."""
    return {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}


def persistent_buffers(task: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state dict, by name."""
    hidden = {
        f"{prefix}.{name}" if prefix else name for prefix, module in task.named_modules() for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in task.named_buffers() if name not in hidden}


def saved_tensors(task: Task) -> dict[str, Tensor]:
    """What a checkpoint holds of the model: parameters, but for frozen ones that the task restores itself, and buffers."""
    left_out = task.restorable()
    return {name: value for name, value in task.named_parameters() if name not in left_out} | persistent_buffers(task)


def to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that later steps do not touch; one synchronisation for all of them."""
    copies = {}
    for name, tensor in tensors.items():
        source = tensor.detach()
        if source.device.type == "cpu":
            copies[name] = source.clone(memory_format=torch.contiguous_format)
        else:
            copies[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)
    if any(tensor.device.type == "cuda" for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def check_fit(shapes: dict[str, torch.Size], values: dict[str, Tensor], what: str) -> None:
    """`ConfigError` naming the difference unless `values`, of the file `what`, has exactly these names and shapes."""
    remedy = "Resume with the run's own config.json, or start a new run with another name."
    missing, unknown = sorted(set(shapes) - set(values)), sorted(set(values) - set(shapes))
    if missing or unknown:
        difference = f"{what} lacks {missing[:5] or 'nothing'} and holds unknown {unknown[:5] or 'nothing'}"
        raise ConfigError("task", f"an architecture that the checkpoint does not fit: {difference}", "that of the checkpoint", remedy)
    for name, shape in shapes.items():
        if tuple(shape) != tuple(values[name].shape):
            raise ConfigError("task", f"{name} of shape {list(shape)}", f"{list(values[name].shape)}, as in the checkpoint", remedy)


@torch.no_grad()
def copy_into(targets: dict[str, Tensor], values: dict[str, Tensor], what: str) -> None:
    """Copy `values` into `targets` by name; `ConfigError` unless names and shapes agree."""
    check_fit({name: target.shape for name, target in targets.items()}, values, what)
    for name, target in targets.items():
        target.copy_(values[name])
