"""One step's loss, the same for any split of the global batch over workers and micro-batches.

Every term's weight is known before any loss is scaled, so a term is its sum over the global batch divided by its
weight over the global batch. Contrastive terms compare features of the whole global batch: those of all workers and
micro-batches are gathered, the gradient with respect to them is computed once and added up, and each micro-batch
back-propagates its own slice of it (gradient caching; Gao et al., "Scaling deep contrastive learning batch size under
memory limited setup", 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.trainers.randomness import seed_layers, step_seed
from diptych.trainers.strategies import Strategy
from diptych.trainers.task import Batch, Output, Task, Term
from diptych.trainers.world import World


def add_terms(total: dict[str, Term], terms: dict[str, Term]) -> None:
    """Add `terms` to `total` by name, without gradients."""
    for name, term in terms.items():
        part = Term(term.sum.detach().double(), term.weight.detach().double())
        total[name] = Term(total[name].sum + part.sum, total[name].weight + part.weight) if name in total else part


def weighted(task: Task, terms: dict[str, Term], totals: Mapping[str, Tensor]) -> Tensor:
    """Σ coefficient · sum / global weight of `terms`, `[]`, with gradients."""
    parts = []
    for name, term in terms.items():
        assert name in totals, f"{task.name}.weights() lacks the term {name!r} that its forward or contrast returns"
        parts.append(task.coefficients.get(name, 1.0) * term.sum.float() / totals[name].float().clamp_min(1e-12))
    return torch.stack(parts).sum()


def local_weights(task: Task, micros: list[Batch]) -> dict[str, Tensor]:
    """Weight of each loss term over `micros`, float64 `[]`; summed over workers they are the `totals` of a step."""
    parts = [task.weights(micro) for micro in micros]
    return {name: torch.stack([part[name].detach().double().reshape(()) for part in parts]).sum() for name in parts[0]}


def loss_value(task: Task, figures: dict[str, float]) -> float:
    """The loss, from the averaged terms in `figures`; names that are no loss term are left out."""
    coefficients = task.coefficients
    return sum(coefficients.get(name, 1.0) * value for name, value in figures.items())


@dataclass
class Contrast:
    """The contrastive part of one step, seen from one worker."""

    terms: dict[str, Term]
    """This worker's rows against the global batch, without gradients."""
    gradients: dict[str, Tensor]
    """Of the global loss: `[B, D]` for this worker's rows, `[]` for scalars."""

    def surrogate(self, features: dict[str, Tensor], micro_step: int, shares: int) -> Tensor:
        """A loss `[]` whose gradient is the global loss's with respect to this micro-batch's features.

        Scalars are shared by all `shares` micro-batches of all workers, so each counts its part of their gradient.
        """
        parts = []
        for name, value in features.items():
            gradient = self.gradients[name]
            if value.ndim == 0:
                parts.append(value.float() * gradient / shares)
            else:
                rows = value.shape[0]
                parts.append((value.float() * gradient[micro_step * rows : (micro_step + 1) * rows]).sum())
        return torch.stack(parts).sum()


def gather_features(world: World, local: dict[str, Tensor], weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """`local` features (`[B, D]`, and `[]`, which all workers share) and `weight` `[B]` of all workers: float32 `[size * B, D]`, and the weights."""
    values = {name: value.float() for name, value in local.items()}
    names = [name for name, value in values.items() if value.ndim]
    *rows, weights = world.gather_rows([*(values[name] for name in names), weight])
    return values | dict(zip(names, rows, strict=True)), weights


def contrast(task: Task, world: World, local: dict[str, Tensor], weight: Tensor, totals: Mapping[str, Tensor]) -> Contrast:
    """Gather `local` features (`[B, D]`, `[]`) of all workers, compare globally, and return what concerns this worker."""
    size = weight.shape[0]
    rows = slice(world.rank * size, (world.rank + 1) * size)
    whole, weights = gather_features(world, {name: value.detach() for name, value in local.items()}, weight)
    leaves = {name: value.requires_grad_() for name, value in whole.items()}
    with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
        terms = task.contrast(leaves, weights, rows)
        loss = weighted(task, terms, totals)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(leaves.values(), found, strict=True)]
    flat = world.sum_(torch.cat([part.flatten() for part in gradients]))
    summed = dict(zip(leaves, flat.split([part.numel() for part in gradients]), strict=True))
    mine = {name: summed[name].view_as(leaf) if leaf.ndim == 0 else summed[name].view_as(leaf)[rows] for name, leaf in leaves.items()}
    return Contrast({name: Term(term.sum.detach(), term.weight.detach()) for name, term in terms.items()}, mine)


def accumulate(
    strategy: Strategy, micros: list[Batch], totals: Mapping[str, Tensor], *, seed: int, step: int
) -> tuple[dict[str, Term], dict[str, Term]]:
    """Forward and backward of this worker's share of one step, micro-batches with their draws; gradients are left for `Strategy.step`.

    Returns the local loss terms and the local report. `totals` holds each term's weight over the global batch. Workers may have different
    numbers of micro-batches, of different sizes, where the task does not contrast.
    """
    task, world = strategy.task, strategy.world
    seeds = [step_seed(seed, step, index, world.rank) for index in range(len(micros))]
    terms: dict[str, Term] = {}
    report: dict[str, Term] = {}
    compared = _gather_first(strategy, micros, seeds, totals) if len(micros) > 1 else None
    for index, micro in enumerate(micros):
        last = index == len(micros) - 1
        seed_layers(seeds[index], world.device)
        output: Output = strategy.forward(micro, last)
        if output.features and compared is None:
            compared = contrast(task, world, output.features, micro["weight"], totals)
        loss = weighted(task, output.terms, totals) if output.terms else micro["weight"].new_zeros(())
        if compared is not None:
            loss = loss + compared.surrogate(output.features, index, len(micros) * world.size)
        strategy.backward(loss, last)
        add_terms(terms, output.terms)
        add_terms(report, output.report)
    if compared is not None:
        add_terms(terms, compared.terms)
    return terms, report


def _gather_first(strategy: Strategy, micros: list[Batch], seeds: list[int], totals: Mapping[str, Tensor]) -> Contrast | None:
    """Features of all micro-batches, without gradients and from the same random state as the forward passes to come."""
    parts = []
    for micro, seed in zip(micros, seeds, strict=True):
        seed_layers(seed, strategy.world.device)
        features = strategy.features(micro)
        if not features:
            return None
        parts.append(features)
    local = {name: value if value.ndim == 0 else torch.cat([part[name] for part in parts]) for name, value in parts[0].items()}
    return contrast(strategy.task, strategy.world, local, torch.cat([micro["weight"] for micro in micros]), totals)
