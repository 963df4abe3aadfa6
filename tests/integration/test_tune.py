"""Sweeps as a user runs them: MLflow's tree, early stopping, populations that clone, and a sweep that was killed and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support_runs import kill_tree, logged_step, make_shards, wait_for

from diptych.config import load_config_file
from diptych.pipelines import tune
from diptych.pipelines.sweep import Budget
from diptych.trainers.checkpoint import load
from diptych.trainers.journal import read_metrics
from diptych.trainers.runfolder import RunFolder

# Up to sixteen starts of a group of workers in one sweep, half a minute each on two cores.
LONG = pytest.mark.timeout(3600)
COMMON = ["train.global_batch_size=8", "train.log_every=1", "tracking.system_metrics=false", "optim.ema_decay=0.9"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


def sweep(shards: Path, name: str, overrides: list[str], vary: list[str], **options: Any) -> dict[str, Any]:
    changes = {key: options.pop(key) for key in ("method", "trials", "interval_steps", "metric") if key in options}
    calls = {key: options.pop(key) for key in ("resume", "at_once") if key in options}
    task = options.pop("task", "coca")
    definition = tune.define(
        task, options.pop("space", ""), "smoke", "", [*COMMON, *overrides, f"name={name}", f"data.shards={shards}"], vary, changes
    )
    trials = definition.space.trials if definition.space.method != "grid" else 100
    return tune.run(definition, Budget(trials, **options), **calls)


def mlflow_tree() -> tuple[dict[str, Any], dict[str, Any]]:
    """(run by id, the runs without a parent by name)."""
    from mlflow import MlflowClient

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    runs = {run.info.run_id: run for run in client.search_runs([each.experiment_id for each in client.search_experiments()])}
    return runs, {run.info.run_name: run for run in runs.values() if "mlflow.parentRunId" not in run.data.tags}


def assert_tracked(result: dict[str, Any]) -> None:
    """One parent, one child for each trial, all ended, parameters and digest on each."""
    runs, parents = mlflow_tree()
    assert list(parents) == [Path(result["sweep_dir"]).name]
    parent = runs[result["run_id"]]
    assert parent.info.status == "FINISHED"
    children = {trial["run_id"]: trial for trial in result["trials"]}
    assert set(runs) == {result["run_id"], *children}
    for run_id, trial in children.items():
        child = runs[run_id]
        assert child.info.status == "FINISHED", trial
        assert child.data.tags["mlflow.parentRunId"] == result["run_id"]
        assert child.data.tags["diptych.data_digest"] == parent.data.tags["diptych.data_digest"] != ""
        assert child.info.run_name == trial["name"]
        assert child.inputs.dataset_inputs
        assert "optim.lr" in child.data.params


def assert_population_clones(result: dict[str, Any]) -> None:
    """Every clone took its donor's weights and slot, and its first step used the new rate; nothing changed of what may not."""
    cloned = [(trial, clone) for trial in result["trials"] for clone in trial["clones"]]
    assert cloned
    for trial, clone in cloned:
        run_dir, donor_dir = Path(trial["run_dir"]), Path(result["sweep_dir"]) / clone["donor"]
        records = [json.loads(path.read_text()) for path in sorted((run_dir / "attempts").glob("*.json"))]
        assert any(record["start_step"] == clone["step"] for record in records)
        rates = {line["step"]: line["metrics"]["train/lr"] for line in read_metrics(str(run_dir)) if "train/lr" in line["metrics"]}
        assert rates[clone["step"] + 1] == pytest.approx(clone["parameters"]["optim.lr"]), "the first step after the clone"
        copies = [name for name in RunFolder(str(run_dir)).names("checkpoints") if name.startswith(f"step_{clone['step']:08d}")]
        originals = [name for name in RunFolder(str(donor_dir)).names("checkpoints") if name.startswith(f"step_{clone['step']:08d}")]
        ours, theirs = load(str(run_dir), copies[-1]), load(str(donor_dir), originals[-1])
        assert ours.state["donor"].endswith(f"{clone['donor']}/checkpoints/{originals[-1]}")
        assert ours.state["slot"] == theirs.state["slot"] == clone["step"] * 8
        for part in ("weights", "optimizer", "ema"):
            left, right = getattr(ours.tensors, part), getattr(theirs.tensors, part)
            assert set(left) == set(right)
            assert all(torch.equal(left[name], right[name]) for name in left), "equal weights, so equal loss on any batch"
        config = load_config_file(str(run_dir / "config.json"))
        assert (config.seed, config.train.global_batch_size, config.data.keep) == (0, 8, ())


def test_asha_stops_the_worse_and_tracks_all(shards: Path, ray_session: Any) -> None:
    """Six trials of one worker; rates far apart, so that early stopping has something to see."""
    lr = "optim.lr=1e-6,1e-5,1e-4,1e-3,3e-3,1e-2"
    result = sweep(shards, "asha", ["train.steps=36"], [lr], method="asha", trials=6, interval_steps=4, at_once=2)
    assert_tracked(result)
    assert len(result["trials"]) == 6
    status = {trial["name"]: trial["status"] for trial in result["trials"]}
    assert set(status.values()) == {"finished", "pruned"}
    for trial in result["trials"]:
        if trial["status"] == "pruned":
            assert trial["step"] in (5, 13), "stopped at a rung: one step after the verdict"
    best = result["best"]
    assert best["value"] == min(trial["value"] for trial in result["trials"])
    again = load_config_file(best["config"])
    assert again.optim.lr == best["parameters"]["optim.lr"]
    assert again.name == ""
    runs, _ = mlflow_tree()
    from mlflow import MlflowClient

    artifacts = {item.path for item in MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).list_artifacts(result["run_id"])}
    assert {"best.json", "table.csv", "sweep.html", "grid.jpg"} <= artifacts
    assert runs[result["run_id"]].data.metrics["best/val/loss"] == pytest.approx(best["value"])
    from diptych.pipelines import evaluate

    figures = evaluate.run([best["run_dir"]], samples=8, track=False)["metrics"]
    assert figures["loss"] > 0, "a trial is a run like any other"
    shared = list((Path(result["sweep_dir"]) / "inputs").glob("tokenizer-*"))
    assert len(shared) == 1, "one tokenizer for all"


def test_a_population_clones_its_best(shards: Path, ray_session: Any) -> None:
    overrides = ["train.steps=12", "checkpoint.keep=9", "optim.schedule=constant"]
    result = sweep(shards, "pbt", overrides, ["optim.lr=loguniform(1e-6,1e-2)"], method="pbt", trials=4, interval_steps=4, at_once=2)
    assert_tracked(result)
    assert [trial["step"] for trial in result["trials"]] == [12] * 4
    assert [trial["generation"] for trial in result["trials"]] == [2] * 4
    assert_population_clones(result)


def test_a_budget_of_samples_stops_and_a_larger_one_goes_on(shards: Path, ray_session: Any) -> None:
    call = (shards, "budget", ["train.steps=150", "checkpoint.every_steps=25"], ["optim.lr=1e-4,1e-3"])
    first = sweep(*call, method="grid", samples=400, at_once=1)
    assert first["status"] == "stopped"
    assert "samples spent" in first["reason"]
    assert 400 <= first["samples"] < 2400
    with pytest.raises(Exception, match="Add --resume to go on"):
        sweep(*call, method="grid", at_once=1)
    second = sweep(*call, method="grid", at_once=2, resume=True)
    assert second["status"] == "finished"
    assert [trial["step"] for trial in second["trials"]] == [150, 150]
    assert second["samples"] == 2 * 150 * 8
    assert second["run_id"] == first["run_id"]
    assert_tracked(second)


@pytest.mark.slow
@LONG
def test_a_sweep_that_was_killed_goes_on(shards: Path, tmp_path: Path) -> None:
    """SIGKILL of everything half-way: what had finished is not repeated, what had not goes on, and there is no extra run."""
    options = [
        "--method",
        "grid",
        "--vary",
        "optim.lr=1e-5,1e-4,1e-3,1e-2",
        "--at-once",
        "1",
        "name=killed",
        f"data.shards={shards}",
        *COMMON,
    ]
    command = [sys.executable, "-m", "diptych.pipelines.tune", "coca", *options, "train.steps=150", "checkpoint.every_steps=20", "--json"]
    environment = os.environ | {"RAY_ADDRESS": ""}
    folder = tmp_path / "runs" / "killed"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: logged_step(folder / "t001") >= 50, process)
    kill_tree(process, with_driver=True)
    finished = {path: path.stat().st_mtime_ns for path in (folder / "t000").rglob("*") if path.is_file()}
    assert (folder / "t000" / "result.json").is_file()
    ended = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert ended.returncode == 0, ended.stderr[-4000:]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert [trial["status"] for trial in result["trials"]] == ["finished"] * 4
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished trial is left alone"
    attempts = [len(list((folder / trial["name"] / "attempts").iterdir())) for trial in result["trials"]]
    assert attempts == [1, 2, 1, 1]
    assert result["samples"] == 4 * 150 * 8
    assert json.loads((folder / "t001" / "attempts" / "0002.json").read_text())["start_step"] >= 40
    assert_tracked(result)


@pytest.mark.slow
@LONG
def test_eight_trials_of_two_workers_under_asha(shards: Path, ray_session: Any) -> None:
    lr = "optim.lr=loguniform(1e-6,1e-2)"
    result = sweep(shards, "wide", ["workers=2", "train.steps=45"], [lr], method="asha", trials=8, interval_steps=5, at_once=2)
    assert_tracked(result)
    assert len(result["trials"]) == 8
    assert {trial["status"] for trial in result["trials"]} == {"finished", "pruned"}
    for trial in result["trials"]:
        record = json.loads((Path(trial["run_dir"]) / "attempts" / "0001.json").read_text())
        assert record["world_size"] == 2


@pytest.mark.slow
@LONG
def test_eight_members_of_two_workers_under_pbt(shards: Path, ray_session: Any) -> None:
    overrides = ["workers=2", "train.steps=10", "checkpoint.keep=9", "optim.schedule=constant"]
    result = sweep(shards, "broad", overrides, ["optim.lr=loguniform(1e-6,1e-2)"], method="pbt", trials=8, interval_steps=5, at_once=2)
    assert_tracked(result)
    assert [trial["step"] for trial in result["trials"]] == [10] * 8
    assert_population_clones(result)


@pytest.mark.slow
@LONG
def test_the_grid_of_rates_and_lengths_ends_with_table_and_picture(shards: Path, ray_session: Any) -> None:
    result = sweep(shards, "grid", [], [], space="thumbs_up_small", task="stable_diffusion")
    assert_tracked(result)
    assert sorted(trial["step"] for trial in result["trials"]) == [4, 4, 20, 20, 40, 40, 80, 80]
    table = (Path(result["sweep_dir"]) / "table.csv").read_text().splitlines()
    assert len(table) == 9
    assert table[0].startswith("trial,status,step,val/loss,at step,optim.lr,train.steps")
    from PIL import Image

    with Image.open(Path(result["sweep_dir"]) / "grid.jpg") as grid:
        assert grid.width > 4 * 288, "a column per length"
