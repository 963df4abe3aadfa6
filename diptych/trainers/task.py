"""What a task is: an `nn.Module` that turns a batch into weighted loss terms, validates, generates and exports.

The loop knows no model. It needs of a task only what this base class names, and it never averages means: a term is a
sum over the worker's rows with the weight (tokens, samples) that it is to be divided by once all workers' weights are
known. A contrastive task also returns features; the loop gathers them over workers and micro-batches, so that the
loss sees the whole global batch however it was split.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diptych.batches import Needs
from diptych.config import TaskConfig

Batch = dict[str, Tensor]
"""Keys, dtypes and shapes as `batches.FIELDS` says, as tensors on the worker's device, plus the task's own draws."""


class Term(NamedTuple):
    """A quantity summed over this worker's rows, and what to divide the sum over all workers by."""

    sum: Tensor
    weight: Tensor


@dataclass
class Output:
    """What `Task.forward` returns for one micro-batch."""

    terms: dict[str, Term]
    """Loss terms; the loss is the sum over terms of `coefficient * sum / weight`, both taken over the global batch."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """`[B, D]` features (and `[]` scalars, e.g. a learned temperature) that `Task.contrast` compares globally."""
    report: dict[str, Term] = field(default_factory=dict)
    """Figures to log that carry no gradient (accuracy, …)."""


@dataclass
class Validation:
    """What `Task.validate` returns for one batch."""

    terms: dict[str, Term] = field(default_factory=dict)
    """Summed over batches and workers, then divided: `val/<name>`."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """`[B, …]` per-sample tensors, gathered from all workers in slot order for `Task.summarise`."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """As `Output.features`: gathered from all workers, so that `contrast` sees the whole validation batch."""


class Grid(NamedTuple):
    """Pictures for people, laid out in rows."""

    name: str
    """A short name that a file can have."""
    images: np.ndarray
    """uint8 [N, H, W, 3]"""
    columns: int


class Table(NamedTuple):
    """A table for people, which `evaluate` prints, logs and writes as csv and HTML."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    grids: tuple[Grid, ...] = ()
    """Pictures that belong to it; empty = those of the batch, if it has any."""


@dataclass
class Evaluation:
    """What `Task.evaluate` returns."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Figures by name, beside those of `validate` and `summarise`."""
    tables: list[Table] = field(default_factory=list)


class Task(nn.Module, abc.ABC):
    """Base of every task. A subclass lives in `trainers/tasks/<name>.py`, is found by that name and needs no registry."""

    name: ClassVar[str]

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Build the model from `config` (weights from a folder, a hub name, or fresh). `seed` keys the counted draws."""
        super().__init__()
        self.config = config
        self.seed = seed

    @property
    def needs(self) -> Needs:
        """The batch that `forward` takes."""
        return self.config.needs()

    @property
    def coefficients(self) -> dict[str, float]:
        """Weight of each loss term in the loss; terms left out count 1."""
        return {}

    def draws(self, batch: Batch) -> Batch:
        """Random inputs (noise, timesteps, condition masks) of each row, from (seed, slot) alone."""
        return {}

    @abc.abstractmethod
    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Weight of every loss term for this batch, those of `contrast` included, without a forward pass.

        The loop sums these over workers and micro-batches before it scales any loss.
        """

    @abc.abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Loss terms of one micro-batch that already holds `draws`."""

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """`Output.features` alone, for the gathering pass of an accumulated step; empty unless the task contrasts.

        Runs under `no_grad` from the same random state as `forward`, so it must draw layer dropout in the same order.
        """
        return {}

    def contrast(self, features: dict[str, Tensor], weight: Tensor, rows: slice) -> dict[str, Term]:
        """Loss terms of the rows `rows` of the global batch against all of it.

        `features` holds `[N, D]` tensors of the whole global batch (and scalars), `weight` is `[N]` with zeros on padding.
        """
        return {}

    def after_step(self) -> None:
        """Called after each optimizer step, under `no_grad` (clamp a temperature, …).

        Changes parameters in place by their own methods (`parameter.clamp_`), not through `.data`.
        """

    @property
    def flops_per_sample(self) -> float | None:
        """Floating-point operations of forward and backward for one sample, if known; the loop then logs MFU."""
        return None

    @property
    def attention_tokens(self) -> int | None:
        """The longest sequence that its attention runs over, if known; which kernel is fastest depends on it."""
        return None

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups of the trainable parameters; gains, biases and scalars are not decayed."""
        decay: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for _, parameter in self.named_parameters():
            if parameter.requires_grad:
                (decay if parameter.ndim >= 2 else plain).append(parameter)
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def restorable(self) -> frozenset[str]:
        """Names of frozen parameters that the configuration alone restores (published weights), so that no checkpoint holds them."""
        return frozenset()

    def set_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass. Tasks that cannot must say so with a `ValueError`."""
        raise ValueError(f"train.gradient_checkpointing: {self.name} has no gradient checkpointing; set it to false")

    def validate(self, batch: Batch) -> Validation:
        """Figures of one validation batch, under `no_grad` and `eval()`; by default the loss terms of `forward`."""
        output = self(batch)
        return Validation(terms=output.terms | output.report, features=output.features)

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of the gathered `Validation.rows` of the whole validation set (retrieval, mean cosine, …)."""
        return {}

    def show(self, batch: Batch) -> Table | None:
        """A row per sample of a small held-out batch, for people to look at: captions made beside the true ones, ….

        Called after each validation, under `no_grad` and `eval()`, on one worker; None where there is nothing to see. Pictures with buckets
        stand in rows of the square, see `AspectBuckets`.
        """
        return None

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """What is too slow for validation in the loop (generated texts, …) on held-out `batches`, in one process.

        Called under `no_grad` and `eval()`. Batches are those of `validate`, on the task's device; rows of weight zero are padding.
        """
        return Evaluation()

    @abc.abstractmethod
    def example_batch(self, batch_size: int, seed: int = 0) -> Batch:
        """A small random batch that satisfies `needs`, for tests, warm-up and profiles."""

    @abc.abstractmethod
    def export(self, folder: Path) -> None:
        """Write the model in the layout that its own ecosystem loads."""

    @property
    def usage(self) -> str:
        """Python that loads the exported folder `{folder}` in its own ecosystem, for the model card."""
        return ""


def synthetic_rows(batch_size: int) -> Batch:
    """The keys of `batches.Slots` for an `example_batch`: slots 0…B−1, all of weight one."""
    slots = torch.arange(batch_size)
    return {"slot": slots, "row": slots.clone(), "weight": torch.ones(batch_size)}
