"""Tasks: one objective per module, found by the module's name; no registry to edit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from diptych.config import ConfigError, task_names

if TYPE_CHECKING:
    from diptych.trainers.task import Task


def load_task_class(name: str) -> type[Task]:
    """The class of the task `name`: the one in `trainers/tasks/<name>.py` whose `name` says so.

    Raises `ConfigError` where there is no such task, or where a package that it wraps is not installed.
    """
    module_name = f"{__name__}.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == module_name:
            raise ConfigError("TASK", name, ", ".join(task_names()), "Each task is a module in diptych/trainers/tasks.") from None
        raise ConfigError("TASK", name, f"a task whose packages are installed; {error.name} is not", "See the extras in README.") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module_name and getattr(value, "name", None) == name
    ]
    assert len(found) == 1, f"{module_name} must define one Task named {name!r}, found {found}"
    return found[0]
