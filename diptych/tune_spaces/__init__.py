"""What a search space is, and finding the spaces of a task.

A space is a public function in `tune_spaces/<task>.py` that returns a `Space`; its docstring says what it searches and what that
takes. Parameters are keyed by configuration paths, so whatever `KEY=VALUE` may set can be searched.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from diptych.config import Config, ConfigError, RunConfig, build, set_path, task_names

if TYPE_CHECKING:
    import numpy as np

METHODS = ("grid", "random", "asha", "pbt", "optuna")
_HYPERPARAMETERS = ("optim.", "task.")


class Domain(Config):
    """What one parameter may be."""

    kind: Literal["choice", "uniform", "loguniform", "integers"] = "choice"
    """`choice` of `values`; `uniform` or `loguniform` in [low, high]; `integers` from low to high, both included."""
    values: tuple[Any, ...] = ()
    """Of a choice; neighbours are near each other, where they have an order."""
    low: float = 0.0
    """Smallest value."""
    high: float = 0.0
    """Largest value."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Domain:
        if self.kind == "choice" and not self.values:
            raise ConfigError("values", [], "at least one value")
        if self.kind != "choice" and not self.low < self.high:
            raise ConfigError("low", self.low, f"less than high = {self.high:g}")
        if self.kind == "loguniform" and self.low <= 0:
            raise ConfigError("low", self.low, "above 0 for loguniform")
        return self

    def bounds(self) -> tuple[Any, ...]:
        """Every value of a choice, else the smallest and the largest: what a configuration must be able to take."""
        if self.kind == "choice":
            return self.values
        return (int(self.low), int(self.high)) if self.kind == "integers" else (self.low, self.high)

    def sample(self, rng: np.random.Generator) -> Any:
        """A value drawn afresh."""
        if self.kind == "choice":
            return self.values[int(rng.integers(len(self.values)))]
        if self.kind == "integers":
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.kind == "loguniform":
            return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return float(rng.uniform(self.low, self.high))

    def __str__(self) -> str:
        """As `--vary` takes it."""
        if self.kind == "choice":
            return ",".join(value if isinstance(value, str) else json.dumps(value) for value in self.values)
        return f"{self.kind}({self.low:g},{self.high:g})"


class Space(Config):
    """A search, whole but for the data."""

    parameters: dict[str, Domain]
    """Configuration path → what it may be."""
    method: Literal["grid", "random", "asha", "pbt", "optuna"] = "random"
    """`grid`: every combination. `random`: draws. `asha`: draws, the worse ones stopped early (Li et al., arXiv:1810.05934). `pbt`: a population
    whose worst clone the best and change (Jaderberg et al., arXiv:1711.09846). `optuna`: draws that learn from those before (TPE)."""
    recipe: str = "smoke"
    """What is not searched comes from this recipe."""
    config: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Configuration path → value that differs from the recipe's."""
    trials: int = pydantic.Field(8, ge=1)
    """Trials; the population under `pbt`. A grid has as many as it has combinations."""
    metric: str = ""
    """Figure to compare trials by; empty = the configuration's `train.monitor`."""
    mode: Literal["", "min", "max"] = ""
    """Whether smaller or larger is better; empty = `train.monitor_mode`."""
    interval_steps: int = pydantic.Field(0, ge=0)
    """Steps to the first rung of `asha`, or of a generation of `pbt`; 0 = an `reduction`-squared part, or a quarter, of `train.steps`."""
    reduction: int = pydantic.Field(3, ge=2)
    """`asha` keeps one in so many at each rung, and each rung is so many times as far as the one before."""
    quantile: float = pydantic.Field(0.25, gt=0, le=0.5)
    """`pbt`: this share of the population, the worst, clones the same share, the best."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Space:
        if not self.parameters:
            raise ConfigError("parameters", {}, "at least one parameter", "Name a space with --space, or parameters with --vary.")
        for key, domain in self.parameters.items():
            if self.method == "grid" and domain.kind != "choice":
                raise ConfigError(key, str(domain), "a list of values under method grid", f"Example: --vary {key}=1e-4,1e-3")
        return self

    def check(self, base: RunConfig) -> None:
        """`ConfigError` unless `base` can take every parameter at its bounds, and, under `pbt`, change it in mid-run."""
        for key, domain in self.parameters.items():
            for value in domain.bounds():
                set_path(base, key, value)
            if self.method == "pbt" and not (key.startswith(_HYPERPARAMETERS) and all(isinstance(v, int | float) for v in domain.bounds())):
                raise ConfigError(
                    key,
                    str(domain),
                    "a number under optim. or task. where the method is pbt",
                    "A clone goes on with its donor's samples: seed, global batch, filters and data cannot change within a population.",
                )


def parse_vary(text: str) -> tuple[str, Domain]:
    """`KEY=1e-4,1e-3`, `KEY=loguniform(1e-5,1e-2)`, `KEY=uniform(0,0.3)`, `KEY=integers(1,8)` → key and domain."""
    key, separator, spec = text.partition("=")
    if not separator or not spec.strip():
        raise ConfigError("--vary", text, "KEY=VALUE,VALUE,… or KEY=loguniform(LOW,HIGH), uniform(…), integers(…)")
    drawn = re.fullmatch(r"(uniform|loguniform|integers)\(([^,]+),([^,]+)\)", spec.strip())
    if drawn is None:
        return key.strip(), Domain(values=tuple(_value(part.strip()) for part in spec.split(",")))
    try:
        return key.strip(), Domain(kind=drawn[1], low=float(drawn[2]), high=float(drawn[3]))  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError("--vary", text, "two numbers, the smaller first", str(error)) from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def spaces_of(task: str) -> dict[str, Callable[[], Space]]:
    """Every space of `task`; empty for a task without any. `ConfigError` if there is no such task."""
    if task not in task_names():
        near = difflib.get_close_matches(task, task_names(), n=1, cutoff=0.4)
        raise ConfigError("TASK", task, ", ".join(task_names()), f"Did you mean {near[0]}?" if near else "")
    if task not in tasks_with_spaces():
        return {}
    module = importlib.import_module(f"{__name__}.{task}")
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value) and not isinstance(value, type) and not name.startswith("_") and value.__module__ == module.__name__
    }


def tasks_with_spaces() -> list[str]:
    """Every task that has a module here, by discovery."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_space(task: str, name: str) -> Space:
    """The space `name` of `task`; `ConfigError` with the nearest name if there is none."""
    spaces = spaces_of(task)
    if name not in spaces:
        near = difflib.get_close_matches(name, spaces, n=1, cutoff=0.4)
        remedy = f"Did you mean {near[0]}?" if near else "--vary KEY=… searches without a named space."
        raise ConfigError("--space", name, ", ".join(spaces) or f"none: {task} has no named spaces", remedy)
    return spaces[name]()


def combined(space: Space | None, varied: Iterable[tuple[str, Domain]], fixed: Iterable[str], changes: dict[str, Any]) -> Space:
    """`space` with the parameters `varied` added, those `fixed` by hand taken out, and the fields in `changes` replaced."""
    parameters = dict(space.parameters if space else {}) | dict(varied)
    kept = {key: domain for key, domain in parameters.items() if key not in set(fixed)}
    fields = {name: getattr(space, name) for name in Space.model_fields} if space else {}
    return build(Space, fields | {"parameters": kept} | changes, "space")
