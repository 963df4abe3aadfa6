"""Promise 1 for every task, by discovery: stopped off a checkpoint and begun again = never stopped, bit for bit, layer dropout on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support_distributed import run_workers
from support_training import SAMPLES, assert_identical, final_state, losses_by_step, share, smallest, trace_rows, train_in

from diptych.batches import StepBatch
from diptych.config import CheckpointConfig, DataConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig, set_path, task_names
from diptych.trainers.task import Task
from diptych.trainers.tasks import load_task_class
from diptych.trainers.world import World

STEPS, EVERY, KILLED_AT = 6, 2, 5


class Killed(Exception):  # noqa: N818
    """Ends an attempt in the middle of a step's wait for data, as a signal would: nothing is saved."""


def build(name: str) -> Task:
    """The task of the recipe `smoke`, with layer dropout where it has some."""
    task = smallest(name)
    if "dropout" in type(task.config).model_fields:
        task = load_task_class(name)(set_path(task.config, "dropout", 0.2), seed=3)
    return task


def attempts(folder: str, names: list[str], optimizer: str, stopped: bool) -> None:
    """Train each task by `optimizer` in `folder`; if `stopped` the first attempt ends at `KILLED_AT`, off a checkpoint, and a second goes on."""
    world = World.current("cpu")
    for name in names:
        kills = [KILLED_AT, None] if stopped else [None]
        for kill in kills:
            task = build(name)
            config = RunConfig(
                task=task.config,
                data=DataConfig(trace=True),
                optim=OptimConfig(name=optimizer, lr=1e-3, ema_decay=0.9, clip_norm=1.0),
                train=TrainConfig(steps=STEPS, global_batch_size=SAMPLES, micro_batches=2, log_every=1, precision="fp32"),
                validation=ValidationConfig(samples=0),
                checkpoint=CheckpointConfig(every_steps=EVERY),
            )

            def stream(first: int, task: Task = task, kill: int | None = kill) -> Iterator[StepBatch]:
                for step in range(first, STEPS):
                    if step == kill:
                        raise Killed
                    rows = share(task.example_batch(SAMPLES, seed=step), world.rank, world.size, 2)
                    slots = torch.where(rows["slot"] >= 0, rows["slot"] + step * SAMPLES, -1)
                    yield StepBatch(step, {key: value.numpy() for key, value in (rows | {"slot": slots, "row": slots}).items()})

            try:
                train_in(f"{folder}/{name}", config, stream=stream, task=task)
            except Killed:
                assert kill is not None
                continue
            assert kill is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_run_goes_on_as_if_it_never_stopped(tmp_path: Path, workers: int, optimizer: str) -> None:
    names = task_names()
    assert {"gpt2", "clip_vit", "coca"} <= set(names)
    for folder, killed in (("whole", False), ("killed", True)):
        arguments: tuple[Any, ...] = (str(tmp_path / folder), names, optimizer, killed)
        if workers == 1:
            attempts(*arguments)
        else:
            run_workers(attempts, workers, *arguments, deadline_seconds=300)
    for name in names:
        whole, killed = tmp_path / "whole" / name, tmp_path / "killed" / name
        assert len(list((killed / "attempts").iterdir())) == 2, name
        assert_identical(final_state(whole), final_state(killed))
        assert losses_by_step(whole) == losses_by_step(killed), name
        assert trace_rows(whole) == trace_rows(killed), name
        assert [slot for _, slot, _ in trace_rows(killed)] == list(range(STEPS * SAMPLES)), name
