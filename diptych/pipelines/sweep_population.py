"""Population-based training: after each generation the worst members clone the best and change their hyperparameters.

Jaderberg et al., arXiv:1711.09846: truncation selection, then perturbation by a factor or a fresh draw. Ray Tune's scheduler moves
its own trials' checkpoints, which a distributed trial has not, and draws from the process's random state; here a decision is a function of the
scores, the seed and the generation, so a sweep that is killed and resumed decides the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diptych.tune_spaces import Domain, Space

if TYPE_CHECKING:
    import numpy as np

RESAMPLED = 0.25
"""Probability that a parameter is drawn afresh and not perturbed."""
FACTORS = (0.8, 1.2)
"""What a number is multiplied by, where it is perturbed."""


@dataclass(frozen=True)
class Clone:
    """What becomes of a member after a generation."""

    donor: str
    """Whose weights, moments, averages and slot it takes."""
    parameters: dict[str, Any]
    """The donor's hyperparameters, changed."""


def next_generation(
    space: Space, scores: Mapping[str, float | None], parameters: Mapping[str, dict[str, Any]], mode: str, seed: int, generation: int
) -> dict[str, Clone]:
    """Which members clone whom, by name. `scores` are those of the generation just ended; None = failed, worse than any other.

    Members that failed are cloned over even beyond the quantile, as long as one is alive.
    """
    import numpy as np

    alive = sorted((name for name, score in scores.items() if score is not None), key=lambda name: (_rank(scores[name], mode), name))
    failed = sorted(name for name, score in scores.items() if score is None)
    count = max(1, round(space.quantile * len(scores)))
    if not alive or len(scores) < 2:
        return {}
    best = alive[: min(count, len(alive))]
    worst = [name for name in alive[max(len(best), len(alive) - max(0, count - len(failed))) :] if name not in best]
    clones = {}
    for index, name in enumerate(sorted([*failed, *worst])):
        rng = np.random.default_rng([seed, generation, index])
        donor = best[int(rng.integers(len(best)))]
        clones[name] = Clone(donor, explore(space.parameters, parameters[donor], rng))
    return clones


def _rank(score: float | None, mode: str) -> float:
    assert score is not None
    return score if mode == "min" else -score


def explore(domains: Mapping[str, Domain], parameters: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """`parameters`, each perturbed within its domain, or drawn afresh; at least one differs, where any other value exists."""
    changed = dict(parameters)
    for _ in range(20):
        changed = {key: _perturbed(domain, parameters[key], rng) for key, domain in domains.items()}
        if changed != dict(parameters):
            break
    return changed


def _perturbed(domain: Domain, value: Any, rng: np.random.Generator) -> Any:
    if rng.random() < RESAMPLED:
        return domain.sample(rng)
    if domain.kind == "choice":
        place = domain.values.index(value) + int(rng.choice((-1, 1)))
        return domain.values[min(max(place, 0), len(domain.values) - 1)]
    moved = min(max(value * FACTORS[int(rng.integers(2))], domain.low), domain.high)
    return round(moved) if domain.kind == "integers" else float(moved)
