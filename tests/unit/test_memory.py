"""What is said of a worker's memory before it starts is what it holds afterwards."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support_runs import make_shards, overrides
from support_training import DIM, smallest

from diptych.config import ConfigError, RunConfig, apply_overrides, load_config_file, load_recipe, task_names
from diptych.pipelines import ray_context
from diptych.pipelines.local import train_here
from diptych.pipelines.sweep_resources import demand, estimated_worker_gb, local_places
from diptych.trainers.memory import Footprint, footprint
from diptych.trainers.strategies import make_strategy
from diptych.trainers.tasks import load_task_class

FACTS: dict[str, Any] = {"image_dim": DIM, "text_dim": DIM}


def known(config: RunConfig) -> Footprint:
    found = footprint(config, FACTS)
    assert found is not None
    return found


@pytest.mark.parametrize("name", task_names())
def test_parameters_are_those_of_the_model(name: str) -> None:
    expected = sum(parameter.numel() for parameter in smallest(name).parameters())
    assert known(load_recipe(name, "smoke")).parameters == expected


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_state_and_checkpoint_are_what_a_run_holds_and_writes(tmp_path: Path, decay: float) -> None:
    settings = overrides(make_shards(tmp_path / "shards", 24), "run", workers=1, train__steps=2, optim__ema_decay=decay)
    train_here(apply_overrides(load_recipe("coca", "smoke"), [*settings, "data.validation_share=0"]), tmp_path / "run")
    # With the tokenizer that was trained, which so few captions leave smaller than it was asked to be.
    config = load_config_file(str(tmp_path / "run" / "config.json"))
    said = known(config)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    sizes = {file.stem: file.stat().st_size for file in folder.glob("*.safetensors")}
    assert said.checkpoint_bytes == pytest.approx(sum(sizes.values()) + 2 * sizes["optimizer"], rel=0.1), (
        "copies, and the largest file twice"
    )
    strategy: Any = make_strategy(config, load_task_class("coca")(config.task, config.seed))
    held = 2 * sum(parameter.nbytes for parameter in strategy.parameters.values()) + strategy.optimizer_bytes()
    held += sum(average.nbytes for average in strategy.ema.average) if decay else 0
    assert said.state_bytes == pytest.approx(held, rel=0.02)


def large(*changes: str) -> RunConfig:
    """GPT-2's own size: 124 million parameters."""
    sizes = ["task.architecture.layers=12", "task.architecture.width=768", "task.architecture.heads=12", "task.tokenizer=train:50257"]
    return apply_overrides(load_recipe("gpt2", "smoke"), [*sizes, "cluster.logical_cpus=64", *changes])


def test_a_large_model_leaves_room_for_fewer_trials(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small, many = estimated_worker_gb([load_recipe("gpt2", "smoke")], {}), estimated_worker_gb([large(), load_recipe("gpt2", "smoke")], {})
    assert small == ray_context.WORKER_GB
    assert many > 4
    assert "million parameters" in capsys.readouterr().err
    monkeypatch.setattr(psutil, "virtual_memory", partial(SimpleNamespace, available=14e9))
    assert local_places(demand([large()], many), large(), 0) == 2
    with pytest.raises(ConfigError, match=f"1 × {many:g} = {many:g} GB; memory: {many:g} GB each of 14.0 free"):
        local_places(demand([large()], many), large(), 3)


def test_on_a_gpu_only_the_checkpoint_s_copies_count_and_zero_divides_what_the_optimizer_keeps() -> None:
    whole = estimated_worker_gb([large()], {})
    assert estimated_worker_gb([large("cluster.gpus_per_worker=1")], {}) < whole - 1.5
    one, four = known(large("workers=4")), known(large("workers=4", "train.strategy=zero1"))
    assert four.state_bytes < 0.7 * one.state_bytes
    assert four.checkpoint_bytes == one.checkpoint_bytes


def test_what_cannot_be_known_counts_as_small() -> None:
    """Weights that would have to be fetched, and dimensions that only the data tell."""
    assert footprint(load_recipe("gpt2", "reports"), FACTS) is None
    assert footprint(load_recipe("dalle2_prior", "smoke"), {}) is None
    assert estimated_worker_gb([load_recipe("dalle2_prior", "published")], {}) == ray_context.WORKER_GB
