"""A trained run, opened: its configuration and its task with the weights of a checkpoint. For every verb that follows `train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.config import ConfigError, RunConfig, set_path

if TYPE_CHECKING:
    import torch

    from diptych.trainers.task import Task


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
    from diptych.trainers.attempts import candidates
    from diptych.trainers.checkpoint import load, newest_whole
    from diptych.trainers.runfolder import RunFolder
    from diptych.trainers.state import copy_into, saved_tensors
    from diptych.trainers.tasks import load_task_class

    config = _where_it_lies(RunConfig.from_json((run_dir / "config.json").read_text()), run_dir)
    folder = RunFolder(records(run_dir))
    newest = newest_whole(folder)
    if newest is None:
        raise ConfigError("RUN", str(run_dir), "a run with at least one whole checkpoint", "Let it train until its first checkpoint.")
    name = newest
    if checkpoint == "best":
        name = load(folder, newest, optimizer=False).state["saved_name"] or newest
    elif checkpoint != "newest":
        name, known = checkpoint, candidates(folder)
        if name not in known:
            raise ConfigError("checkpoint", name, f"newest, best, or one of {', '.join(known)}")
    loaded = load(folder, name, optimizer=False)
    task = load_task_class(config.task.name)(config.task, config.seed)
    weights = loaded.tensors.weights | (loaded.tensors.ema if averaged else {})
    copy_into(saved_tensors(task), weights, f"{run_dir}/{name}")
    return Trained(run_dir, config, task.to(device).eval(), name, loaded.state)


def _where_it_lies(config: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration with the run's own tokenizer at its place in `run_dir`, which may have been moved or copied."""
    stored, here = Path(str(getattr(config.task, "tokenizer", ""))), run_dir / "inputs" / "tokenizer"
    if stored.parts[-2:] == here.parts[-2:] and not stored.is_dir() and here.is_dir():
        return set_path(config, "task.tokenizer", str(here))
    return config
