"""Configuration: frozen, typed, and addressed by dotted paths. No torch, no Ray.

A recipe returns a whole `RunConfig`; the command line, search spaces and tests change it through `KEY=VALUE` dotted
paths (`apply_overrides`). A field's documentation is the string under it, with its unit. Derived values are Python in
the recipe, not syntax in a file. Every complaint is a `ConfigError` that names the key, the value, what is allowed and
the remedy.
"""

from diptych.config.base import Config, ConfigError, Flags, Integers, Numbers, Paths, TaskConfig
from diptych.config.cluster import ClusterConfig, TrackingConfig
from diptych.config.data import DataConfig
from diptych.config.keys import apply_overrides, build, dotted_keys, get_path, set_path
from diptych.config.run import RunConfig, load_config_file
from diptych.config.tasks import load_recipe, recipes_of, task_config_class, task_names
from diptych.config.training import CheckpointConfig, OptimConfig, TrainConfig, ValidationConfig

__all__ = [
    "CheckpointConfig", "ClusterConfig", "Config", "ConfigError", "DataConfig", "Flags", "Integers", "Numbers", "OptimConfig", "Paths",
    "RunConfig", "TaskConfig", "TrackingConfig", "TrainConfig", "ValidationConfig", "apply_overrides", "build", "dotted_keys", "get_path",
    "load_config_file", "load_recipe", "recipes_of", "set_path", "task_config_class", "task_names",
]  # fmt: skip
