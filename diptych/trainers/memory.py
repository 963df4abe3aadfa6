"""What a training worker holds in memory, told by its configuration: the model is built without its values, which costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diptych.config import RunConfig
from diptych.trainers.state import trainable
from diptych.trainers.tasks import load_task_class


@dataclass(frozen=True)
class Footprint:
    """Of the worker that holds most: rank 0, which also writes checkpoints. Activations and libraries are not in it."""

    parameters: int
    """How many, frozen ones included."""
    state_bytes: int
    """Weights, gradients, moments and averages, in the memory of the device."""
    checkpoint_bytes: int
    """The copies from which a checkpoint is written, and its largest file twice while it is put together, in the memory of the host."""


def footprint(config: RunConfig, facts: dict[str, Any]) -> Footprint | None:
    """`facts` describe the data, from which a model may take its dimensions.

    None for weights that would have to be fetched first, and for a model that cannot be built from what is known.
    """
    named = getattr(config.task, "pretrained", True)
    # Without a name of weights among the keys, or with a switch for them, `task.model` names them.
    if getattr(config.task, "model", "") if named is True else named:
        return None
    try:
        with torch.device("meta"):
            task = load_task_class(config.task.name)(config.task.resolve(facts), config.seed)
    except Exception:  # An estimate that cannot be made must not stop what it is for.
        return None
    weights = sum(parameter.numel() * parameter.element_size() for parameter in task.parameters())
    learned = sum(parameter.numel() for parameter in trainable(task).values())
    averages = 4 * learned if config.optim.ema_decay else 0
    # ZeRO divides what the optimizer keeps among the workers; a checkpoint is gathered whole.
    workers = config.least_workers if config.train.strategy != "ddp" else 1
    kept = ((2 if config.optim.eight_bit else 8) * learned + averages) // workers
    copies = weights + averages + 8 * learned
    return Footprint(sum(parameter.numel() for parameter in task.parameters()), weights + 4 * learned + kept, copies + 2 * 8 * learned)
