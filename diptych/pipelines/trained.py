"""A trained run, opened: its configuration and its task with the weights of a checkpoint. For every verb that follows `train`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.config import ConfigError, RunConfig, set_path

if TYPE_CHECKING:
    import torch

    from diptych.trainers.task import Task


_MODEL_KEYS = ("model", "pretrained", "vae", "text_tower", "tokenizer", "start")
"""Keys of `task.*` that name weights or a tokenizer."""


@dataclass(frozen=True)
class Trained:
    """A task in evaluation mode, on `device`."""

    run_dir: Path
    config: RunConfig
    task: Task
    checkpoint: str
    """Name of the checkpoint that was loaded."""
    state: dict[str, Any]
    """Its `state.json`: step, samples, digest, world_size, best validation, …"""


def load_trained(run_dir: Path, checkpoint: str = "newest", averaged: bool = True, device: torch.device | str = "cpu") -> Trained:
    """Load a run's task from its `newest` or `best` checkpoint, or one by name.

    With `averaged`, the EMA weights stand in where the run kept them. Raises `ConfigError` if the run has no whole checkpoint.
    """
    from diptych.pipelines.runs_folder import records
    from diptych.trainers.checkpoint import load
    from diptych.trainers.runfolder import RunFolder
    from diptych.trainers.state import copy_into, saved_tensors
    from diptych.trainers.tasks import load_task_class

    config = read_config(run_dir)
    name = checkpoint_name(run_dir, checkpoint)
    loaded = load(RunFolder(records(run_dir)), name, optimizer=False)
    task = load_task_class(config.task.name)(config.task, config.seed)
    weights = loaded.tensors.weights | (loaded.tensors.ema if averaged else {})
    copy_into(saved_tensors(task), weights, f"{run_dir}/{name}")
    return Trained(run_dir, config, task.to(device).eval(), name, loaded.state)


def checkpoint_name(run_dir: Path, checkpoint: str = "newest") -> str:
    """The whole checkpoint that `newest`, `best` or a name stands for; `ConfigError` if the run has none such."""
    from diptych.pipelines.runs_folder import records
    from diptych.trainers.attempts import candidates
    from diptych.trainers.checkpoint import newest_whole
    from diptych.trainers.runfolder import RunFolder

    folder = RunFolder(records(run_dir))
    newest = newest_whole(folder)
    if newest is None:
        raise ConfigError("RUN", str(run_dir), "a run with at least one whole checkpoint", "Let it train until its first checkpoint.")
    if checkpoint == "best":
        return json.loads(folder.read(f"checkpoints/{newest}/state.json"))["saved_name"] or newest
    known = candidates(folder)
    if checkpoint not in ("newest", *known):
        raise ConfigError("checkpoint", checkpoint, f"newest, best, or one of {', '.join(known)}")
    return newest if checkpoint == "newest" else checkpoint


def described(run_dir: Path, checkpoint: str, averaged: bool) -> dict[str, Any]:
    """What `load_trained` would load: `run, task, checkpoint, weights`, and `models` that the task names beside them. Nothing is loaded."""
    config = read_config(run_dir)
    models = {key: str(getattr(config.task, key, "")) for key in _MODEL_KEYS}
    return {
        "run": str(run_dir),
        "task": config.task.name,
        "checkpoint": checkpoint_name(run_dir, checkpoint),
        "weights": "averaged" if averaged and config.optim.ema_decay else "as trained",
        "models": [f"task.{key}={name}" for key, name in models.items() if name],
    }


def read_config(run_dir: Path) -> RunConfig:
    """The run's configuration, with its own tokenizer at its place in `run_dir`, which may have been moved or copied."""
    config = RunConfig.from_json((run_dir / "config.json").read_text())
    stored, here = Path(str(getattr(config.task, "tokenizer", ""))), run_dir / "inputs" / "tokenizer"
    if stored.parts[-2:] == here.parts[-2:] and not stored.is_dir() and here.is_dir():
        return set_path(config, "task.tokenizer", str(here))
    return config
