"""What a sweep tries: Ray Tune's variants, its search algorithms and its ASHA, in terms of our spaces.

Ray's objects are asked, not handed the trials to run: their own state files are pickles, and a resumed sweep must unpickle nothing.
So each is built anew from the recorded trials and reports, which say all that it knew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from diptych.config import ConfigError
from diptych.tune_spaces import Domain, Space


def check_installed(space: Space) -> None:
    """`ConfigError` where the method needs what is not installed."""
    if space.method == "optuna" and find_spec("optuna") is None:
        raise ConfigError("--method", "optuna", "a method that is installed", "`make install EXTRAS=cpu,dev,optuna` adds it.")


def first_trials(space: Space, count: int, seed: int) -> list[dict[str, Any]]:
    """Parameters of the trials that are known before any has run: all but Optuna's. The same for the same seed."""
    import numpy as np
    from ray import tune
    from ray.tune.search.variant_generator import generate_variants

    if space.method == "optuna":
        return []
    if space.method == "grid":
        spec = {key: tune.grid_search(list(domain.values)) for key, domain in space.parameters.items()}
        return [dict(variant) for _, variant in generate_variants(spec)][:count]
    spec = {key: _to_ray(domain) for key, domain in space.parameters.items()}
    state = np.random.RandomState(seed)
    return [_plain(next(iter(generate_variants(spec, random_state=state)))[1]) for _ in range(count)]


def grid_size(space: Space) -> int:
    """Combinations of a grid."""
    count = 1
    for domain in space.parameters.values():
        count *= len(domain.values)
    return count


def _plain(variant: dict[str, Any]) -> dict[str, Any]:
    # NumPy's scalars do not go into JSON.
    return {key: value.item() if hasattr(value, "item") else value for key, value in variant.items()}


def _to_ray(domain: Domain) -> Any:
    from ray import tune

    if domain.kind == "choice":
        return tune.choice(list(domain.values))
    if domain.kind == "integers":
        return tune.randint(int(domain.low), int(domain.high) + 1)
    return (tune.loguniform if domain.kind == "loguniform" else tune.uniform)(domain.low, domain.high)


class OptunaSuggestions:
    """Ray Tune's `OptunaSearch` (TPE), told of every trial that has ended."""

    def __init__(self, space: Space, metric: str, mode: str, seed: int, known: Iterable[tuple[dict[str, Any], float | None]]) -> None:
        """`known`: parameters and value of trials that an earlier driver ended; None = failed."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = OptunaSearch.convert_search_space({key: _to_ray(domain) for key, domain in space.parameters.items()})
        past = list(known)
        # Its first draws are random: the same seed again would repeat those of the earlier driver.
        self._search = OptunaSearch(space=distributions, metric=metric, mode=mode, seed=seed + len(past))
        self._metric = metric
        for parameters, value in past:
            self._search.add_evaluated_point(parameters, value if value is not None else 0.0, error=value is None)

    def suggest(self, name: str) -> dict[str, Any]:
        """Parameters of the new trial `name`."""
        found = self._search.suggest(name)
        assert isinstance(found, dict)
        return _plain(found)

    def ended(self, name: str, value: float | None) -> None:
        """Trial `name` ended with `value`, or failed."""
        self._search.on_trial_complete(name, {self._metric: value} if value is not None else None, error=value is None)


@dataclass(frozen=True)
class _Named:
    """All that ASHA reads of a trial."""

    trial_id: str


class Halving:
    """Ray Tune's ASHA: whether a trial that has reached a rung may go on."""

    def __init__(self, rungs: Sequence[int], reduction: int, most_steps: int, mode: str) -> None:
        from ray.tune.schedulers import AsyncHyperBandScheduler

        logging.getLogger("ray.tune").setLevel(logging.WARNING)
        self.rungs = tuple(rungs)
        self._scheduler = AsyncHyperBandScheduler(
            time_attr="step", metric="value", mode=mode, max_t=most_steps, grace_period=self.rungs[0], reduction_factor=reduction
        )
        self._added: set[str] = set()

    def reached(self, name: str, step: int, value: float) -> bool:
        """Trial `name` has `value` after `step` steps; False = stop it."""
        trial: Any = _Named(name)
        if name not in self._added:
            self._scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
            self._added.add(name)
        return bool(self._scheduler.on_trial_result(None, trial, {"step": step, "value": value}) != "STOP")  # type: ignore[arg-type]


def rungs_of(interval: int, reduction: int, most_steps: int) -> tuple[int, ...]:
    """Steps at which ASHA judges: `interval` and its multiples by powers of `reduction`, below `most_steps`."""
    rungs = []
    step = interval
    while step < most_steps:
        rungs.append(step)
        step *= reduction
    return tuple(rungs)
