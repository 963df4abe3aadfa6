"""A sweep's plots as SVG for one page: parallel coordinates, the metric over training, and which parameter mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diptych.pipelines.report import finished_svg, styled_axes
from diptych.pipelines.sweep_record import Definition, TrialRecord
from diptych.tune_spaces import Domain


def parallel_plot(definition: Definition, trials: Sequence[TrialRecord]) -> str:
    """A line per trial through an axis per parameter and one for the metric; the darker, the better."""
    import matplotlib as mpl

    domains = definition.space.parameters
    with styled_axes("parallel coordinates", (8.6, 3.4)) as (canvas, axes):
        values = [trial.value or 0.0 for trial in trials]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        for trial, value in zip(trials, values, strict=True):
            places = [_place(domain, trial.parameters[key]) for key, domain in domains.items()]
            share = (value - low) / (high - low) if high > low else 0.5
            good = 1 - share if definition.mode == "min" else share
            axes.plot(
                range(len(places) + 1),
                [*places, share],
                color=mpl.colormaps["viridis_r"](0.1 + 0.9 * good),
                alpha=0.9,
                linewidth=1.2 + good,
            )
        axes.set_xticks(range(len(domains) + 1), [*[key.rpartition(".")[2] for key in domains], definition.metric])
        axes.set_yticks([])
        axes.set_ylim(-0.12, 1.12)
        axes.set_xlim(-0.25, len(domains) + 0.25)
        for index, domain in enumerate(domains.values()):
            bounds = domain.bounds()
            for place, text in ((-0.09, bounds[0]), (1.05, bounds[-1])):
                axes.annotate(
                    f"{text:.3g}" if isinstance(text, float) else str(text), (index, place), fontsize=7, color="#808894", ha="center"
                )
        for place, number in ((-0.09, low), (1.05, high)):
            axes.annotate(f"{number:.4g}", (len(domains), place), fontsize=7, color="#808894", ha="center")
        return finished_svg(canvas, "parallel")


def _place(domain: Domain, value: Any) -> float:
    """Where a value stands between the bounds of its domain, in [0, 1]."""
    if domain.kind == "choice":
        return domain.values.index(value) / max(1, len(domain.values) - 1) if value in domain.values else 0.5
    if domain.kind == "loguniform":
        return math.log(value / domain.low) / math.log(domain.high / domain.low)
    return float((value - domain.low) / (domain.high - domain.low))


def metric_plot(metric: str, curves: Mapping[str, Sequence[tuple[int, float]]], best: str) -> str:
    """The metric of every trial over its steps; the best one stands out."""
    with styled_axes(f"{metric} over training", (4.2, 3.0)) as (canvas, axes):
        for name, points in curves.items():
            if points:
                steps, values = zip(*points, strict=True)
                stands_out = name == best
                axes.plot(
                    steps,
                    values,
                    marker="o",
                    markersize=3,
                    linewidth=2.2 if stands_out else 0.9,
                    alpha=1.0 if stands_out else 0.6,
                    label=name,
                )
        axes.set_xlabel("step", color="#808894")
        if 0 < sum(bool(points) for points in curves.values()) <= 12:
            axes.legend(frameon=False, labelcolor="#808894", fontsize=7, ncols=2)
        return finished_svg(canvas, "metric")


def importance(domains: Mapping[str, Domain], trials: Sequence[TrialRecord]) -> dict[str, float]:
    """How much of the metric's spread each parameter explains, by key, in [0, 1].

    For numbers the square of Spearman's rank correlation, for other choices the share of variance between their groups (η²) of ranks.
    Empty below four trials, where chance explains anything.
    """
    if len(trials) < 4:
        return {}
    ranks = _ranks(np.array([trial.value for trial in trials], dtype=np.float64))
    found = {}
    for key in domains:
        values = [trial.parameters[key] for trial in trials]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            found[key] = _squared_correlation(_ranks(np.array(values, dtype=np.float64)), ranks)
        else:
            found[key] = _between_groups([str(value) for value in values], ranks)
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, the mean rank for equal values."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1) / 2


def _squared_correlation(left: np.ndarray, right: np.ndarray) -> float:
    if left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1] ** 2)


def _between_groups(groups: Sequence[str], ranks: np.ndarray) -> float:
    if ranks.std() == 0:
        return 0.0
    named = np.array(groups)
    means = np.array([ranks[named == name].mean() for name in groups])
    return float(means.var() / ranks.var())


def importance_plot(weights: Mapping[str, float]) -> str:
    """A bar per parameter, the most important on top; says so where there are too few trials."""
    with styled_axes("importance", (4.2, 3.0)) as (canvas, axes):
        ordered = sorted(weights.items(), key=lambda pair: pair[1])
        axes.barh([key.rpartition(".")[2] for key, _ in ordered], [value for _, value in ordered], color="#5b8def")
        axes.set_xlim(0, 1)
        if not weights:
            axes.text(0.5, 0.5, "fewer than four trials", ha="center", color="#808894")
        return finished_svg(canvas, "importance")
