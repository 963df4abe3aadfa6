"""Tasks and their recipes, found by name: a new one is a file in `diptych/recipes`, with no list to add it to."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diptych.config.base import ConfigError, TaskConfig

if TYPE_CHECKING:
    from diptych.config.run import RunConfig


def _task_module(name: str) -> Any:
    from diptych import recipes

    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        raise ConfigError("TASK", name, ", ".join(names), f"Did you mean {near[0]}?" if near else "")
    return importlib.import_module(f"{recipes.__name__}.{name}")


def task_names() -> list[str]:
    """Every task that ships with recipes, by discovery."""
    from diptych import recipes

    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__) if not module.name.startswith("_"))


def task_config_class(name: str) -> type[TaskConfig]:
    """The configuration class of the task `name`."""
    module = _task_module(name)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, TaskConfig) and value.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"{module.__name__} must define one TaskConfig, found {classes}"
    return classes[0]


def recipes_of(name: str) -> dict[str, Callable[[], RunConfig]]:
    """Every recipe of the task `name`: the public functions of its recipe module."""
    module = _task_module(name)
    return {
        key: value
        for key, value in vars(module).items()
        if callable(value) and not isinstance(value, type) and not key.startswith("_") and value.__module__ == module.__name__
    }


def load_recipe(task: str, recipe: str) -> RunConfig:
    """The configuration that the recipe returns; `ConfigError` with the nearest name if there is none."""
    recipes = recipes_of(task)
    if recipe not in recipes:
        near = difflib.get_close_matches(recipe, recipes, n=1, cutoff=0.4)
        raise ConfigError("--recipe", recipe, ", ".join(recipes), f"Did you mean {near[0]}?" if near else "")
    return recipes[recipe]()
