"""Search spaces: each is found, its keys are configuration paths, and what a call asks for is checked before anything starts."""

from __future__ import annotations

import inspect
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diptych.config import ConfigError, get_path, task_names
from diptych.pipelines import tune
from diptych.pipelines.sweep_record import Definition
from diptych.pipelines.sweep_resources import demand, local_places
from diptych.pipelines.sweep_search import Halving, OptunaSuggestions, first_trials, grid_size, rungs_of
from diptych.tune_spaces import Domain, Space, load_space, parse_vary, spaces_of, tasks_with_spaces

SPACES = [(task, name) for task in tasks_with_spaces() for name in spaces_of(task)]
RATE = Domain(kind="loguniform", low=1e-5, high=1e-2)


def defined(task: str = "coca", overrides: list[str] | None = None, vary: list[str] | None = None, **changes: Any) -> Definition:
    return tune.define(task, changes.pop("space", ""), "", "", overrides or [], vary or ["optim.lr=loguniform(1e-5,1e-2)"], changes)


def test_spaces_are_found() -> None:
    assert len(SPACES) >= 18
    assert tasks_with_spaces() == task_names(), "every task has spaces"


@pytest.mark.parametrize(("task", "name"), SPACES)
def test_keys_of_a_space_exist_and_its_trials_resolve(task: str, name: str) -> None:
    space = load_space(task, name)
    definition = tune.define(task, name, "", "", [], [], {})
    trials = first_trials(space, min(space.trials, 4), seed=0)
    assert trials or space.method == "optuna"
    for parameters in trials:
        config = definition.config_of(parameters)
        assert {key: get_path(config, key) for key in parameters} == parameters
    if definition.interval:
        key = "validation.every_steps" if definition.metric.startswith("val/") else "train.log_every"
        assert definition.interval % get_path(definition.base, key) == 0, "every rung is measured"
    assert Definition.from_json(definition.to_json()) == definition


@pytest.mark.parametrize(("task", "name"), SPACES)
def test_a_space_says_what_it_searches_and_takes(task: str, name: str) -> None:
    text = inspect.getdoc(spaces_of(task)[name]) or ""
    assert "Searches: " in text
    assert "Takes: " in text


def test_the_grid_of_the_fine_tunes_is_whole() -> None:
    space = load_space("coca", "lr_by_steps")
    trials = first_trials(space, 100, seed=0)
    assert len(trials) == grid_size(space) == 8
    assert {(trial["optim.lr"], trial["train.steps"]) for trial in trials} == {
        (lr, steps) for lr in (1e-5, 1e-3) for steps in (4, 20, 40, 80)
    }


def test_draws_are_a_function_of_the_seed_and_more_of_them_begin_alike() -> None:
    space = Space(parameters={"optim.lr": RATE, "optim.warmup_steps": Domain(kind="integers", low=1, high=9)}, method="random")
    few, many = first_trials(space, 3, seed=5), first_trials(space, 6, seed=5)
    assert many[:3] == few
    assert first_trials(space, 3, seed=6) != few
    assert all(1e-5 <= trial["optim.lr"] <= 1e-2 and trial["optim.warmup_steps"] in range(1, 10) for trial in many)


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("train.steps=400,2000", Domain(values=(400, 2000))),
        ("optim.schedule=linear,cosine", Domain(values=("linear", "cosine"))),
        ("optim.lr=loguniform(1e-5,1e-2)", RATE),
        ("task.x=integers(1, 8)", Domain(kind="integers", low=1, high=8)),
    ],
)
def test_vary(text: str, domain: Domain) -> None:
    key, parsed = parse_vary(text)
    assert parsed == domain
    assert parse_vary(f"{key}={domain}")[1] == domain, "a domain is shown as it is written"


@pytest.mark.parametrize("text", ["optim.lr", "optim.lr=", "optim.lr=uniform(2,1)", "optim.lr=loguniform(0,1)", "optim.lr=uniform(a,b)"])
def test_vary_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_vary(text)


@pytest.mark.parametrize(
    "key", ["seed=0,1", "train.global_batch_size=8,16", "data.shuffle_chunk=8,16", "data.keep=a,b", "train.steps=10,20"]
)
def test_what_a_clone_shares_with_its_donor_is_not_mutable(key: str) -> None:
    with pytest.raises(ConfigError, match="cannot change within a population"):
        defined(vary=[key], method="pbt")


def test_a_grid_needs_values() -> None:
    with pytest.raises(ConfigError, match="a list of values under method grid"):
        defined(method="grid")


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean optim\.lr"):
        defined(vary=["optim.lrr=1e-3,1e-4"])


def test_a_key_that_is_fixed_is_not_searched() -> None:
    definition = defined(space="smoke", vary=["optim.weight_decay=0,0.1"], overrides=["optim.lr=0.5"])
    assert set(definition.space.parameters) == {"task.caption_weight", "optim.weight_decay"}
    assert definition.base.optim.lr == 0.5


def test_rungs_and_generations_are_steps_that_are_validated() -> None:
    asha = defined(overrides=["train.steps=90", "validation.every_steps=4"], method="asha")
    assert (asha.interval, asha.base.validation.every_steps) == (12, 4)
    assert rungs_of(asha.interval, 3, 90) == (12, 36)
    pbt = defined(overrides=["train.steps=40"], method="pbt")
    assert (pbt.interval, pbt.base.validation.every_steps) == (10, 10)
    with pytest.raises(ConfigError, match="above 0: trials are compared by val/loss"):
        defined(overrides=["data.validation_share=0"], method="asha")


def test_asha_decides_alike_when_its_reports_are_told_again() -> None:
    reports = [(f"t{index:03d}", 10, float(value)) for index, value in enumerate((5, 3, 9, 4, 8, 1, 7, 2))]
    first, again = (Halving((10, 30), 3, 90, "min") for _ in range(2))
    told = [first.reached(*report) for report in reports]
    assert told == [again.reached(*report) for report in reports]
    assert told[0], "nothing to compare with yet"
    assert not told[2]
    assert told[5]
    assert first.reached("t005", 30, 1.0) is again.reached("t005", 30, 1.0) is True


def test_optuna_learns_from_trials_that_an_earlier_driver_ended() -> None:
    pytest.importorskip("optuna")
    space = Space(parameters={"optim.lr": RATE, "optim.schedule": Domain(values=("linear", "cosine"))}, method="optuna")
    known = [({"optim.lr": 10**-exponent, "optim.schedule": "linear"}, float(exponent)) for exponent in (2, 3, 4, 5)]
    search = OptunaSuggestions(space, "val/loss", "min", 0, [*known, ({"optim.lr": 1e-3, "optim.schedule": "cosine"}, None)])
    for number in range(3):
        parameters = search.suggest(f"t{number}")
        assert 1e-5 <= parameters["optim.lr"] <= 1e-2
        assert parameters["optim.schedule"] in ("linear", "cosine")
        search.ended(f"t{number}", None if number == 1 else 1.0)


@pytest.mark.parametrize(
    ("overrides", "at_once", "worker_gb", "told"),
    [
        (["workers=2", "cluster.logical_cpus=3"], 0, 0.75, r"2 workers × 1 \+ 2 for data = 4 CPUs"),
        (["workers=2", "cluster.logical_cpus=9"], 3, 0.75, "at most 2 .*4 each of 9 declared"),
        (["workers=2"], 0, 1000.0, "2 × 1000 = 2000 GB"),
        (["workers=1000"], 0, 0.75, "1000 workers × 1"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_with_the_arithmetic(overrides: list[str], at_once: int, worker_gb: float, told: str) -> None:
    definition = defined(overrides=overrides)
    with pytest.raises(ConfigError, match=told):
        tune._places(definition, [{"optim.lr": 1e-3}], at_once, worker_gb)


def test_memory_bounds_the_trials_at_once() -> None:
    import psutil

    config = defined(overrides=["cluster.logical_cpus=64"]).base
    third = psutil.virtual_memory().available / 1e9 / 3.5
    assert local_places(demand([config], third), config, 0) in (2, 3)
    with pytest.raises(ConfigError, match="at most [23] .*memory"):
        local_places(demand([config], third), config, 5)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (["tune", "coca", "--space", "smoke", "cluster.gpus_per_worker=1"], "at most 0 GPUs here: 1 workers × 1"),
        (["tune", "coca", "--space", "smoke", "workers=2", "cluster.logical_cpus=3"], "at least 4: 2 workers × 1 + 2 for data = 4 CPUs"),
        (["train", "coca", "cluster.gpus_per_worker=1", "workers=3"], "at most 0 GPUs here: 3 workers × 1"),
        (["train", "coca", "workers=3", "cluster.logical_cpus=4"], "at least 5: 3 workers × 1 + 2 for data = 5 CPUs"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_within_5_seconds(tmp_path: Path, call: list[str], told: str) -> None:
    """As a user calls it: imports included, and before Ray starts."""
    if "gpus" in " ".join(call) and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-m", "diptych", *call, "data.shards=x", "name=g"]
    began, before = time.monotonic(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"RAY_ADDRESS": ""})
    wall, cpu = time.monotonic() - began, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    assert ended.returncode == 2, ended.stderr
    assert told in ended.stderr
    assert not list(tmp_path.iterdir()), "nothing was made"
    # On a machine that others load, the clock is theirs too.
    assert cpu < 5
    assert wall < 5 or os.getloadavg()[0] > 2
