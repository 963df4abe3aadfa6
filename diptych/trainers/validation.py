"""Validation in the loop: terms are summed over batches and workers, rows are gathered in the order of their slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from diptych.batches import Fault, StepBatch
from diptych.trainers.micro_batches import make_micro_batches
from diptych.trainers.objective import add_terms, gather_features, loss_value
from diptych.trainers.randomness import seed_layers, step_seed
from diptych.trainers.strategies import Strategy
from diptych.trainers.task import Task, Term
from diptych.trainers.world import World


def mean_terms(world: World, terms: dict[str, Term]) -> dict[str, float]:
    """Σ sum / Σ weight over all workers of each term; every worker has the same names in the same order."""
    if not terms:
        return {}
    sums = torch.stack([torch.stack([term.sum.double().reshape(()), term.weight.double().reshape(())]) for term in terms.values()])
    values = world.sum_(sums.to(world.device)).tolist()
    return {name: total / weight if weight else 0.0 for name, (total, weight) in zip(terms, values, strict=True)}


def validate(
    strategy: Strategy, batches: Iterable[StepBatch], seed: int, found: Callable[[int, list[Fault]], None]
) -> tuple[dict[str, float], int]:
    """Figures `val/…` of `batches` with the averaged weights, the same on every worker, and the number of samples.

    Every worker has the same number of batches of the same size. `found` receives each batch's faults.
    """
    task, world = strategy.task, strategy.world
    terms: dict[str, Term] = {}
    rows: dict[str, list[Tensor]] = {}
    samples = torch.zeros((), dtype=torch.float64)
    losses: set[str] = set()
    with _evaluating(strategy):
        for index, share in enumerate(batches):
            seed_layers(step_seed(seed, -1, index, world.rank), world.device)
            for batch in make_micro_batches(task, share.arrays, 1, world.device):
                result = strategy.validate(batch)
                losses |= set(task.weights(batch))
                add_terms(terms, result.terms)
                if result.features:
                    add_terms(terms, _global_contrast(task, world, result.features, batch["weight"]))
                if result.rows:
                    for key, value in (result.rows | {"slot": batch["slot"], "weight": batch["weight"]}).items():
                        rows.setdefault(key, []).append(value.detach())
            samples += float(share.arrays["weight"].sum())
            found(index, share.faults)
        figures = mean_terms(world, terms)
        counted = {name: value for name, value in figures.items() if name in losses}
        loss = {"loss": loss_value(task, counted)} if counted else {}
        summary = _summarise(task, world, rows)
    total = int(world.sum_(samples.to(world.device)).item())
    return {f"val/{name}": value for name, value in (loss | figures | summary).items()}, total


@contextmanager
def _evaluating(strategy: Strategy) -> Iterator[None]:
    """Averaged weights and evaluation mode inside the block."""
    with strategy.averaged():
        strategy.task.eval()
        try:
            yield
        finally:
            strategy.task.train()


@torch.no_grad()
def _global_contrast(task: Task, world: World, features: dict[str, Tensor], weight: Tensor) -> dict[str, Term]:
    """Terms of this worker's rows against the rows of all workers."""
    size = weight.shape[0]
    whole, weights = gather_features(world, features, weight)
    return task.contrast(whole, weights, slice(world.rank * size, (world.rank + 1) * size))


def _summarise(task: Task, world: World, rows: dict[str, list[Tensor]]) -> dict[str, float]:
    """`Task.summarise` of the rows of all workers, padding left out; computed on rank 0, the same on every worker."""
    if not rows:
        return {}
    whole = dict(zip(rows, world.gather_rows([torch.cat(parts) for parts in rows.values()]), strict=True))
    figures: dict[str, float] = {}
    if world.rank == 0:
        order = torch.argsort(whole["slot"])
        order = order[whole["weight"][order] > 0]
        figures = {name: float(value) for name, value in task.summarise({key: value[order] for key, value in whole.items()}).items()}
    return world.broadcast_object(figures)
