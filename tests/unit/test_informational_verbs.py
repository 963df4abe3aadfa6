"""`recipes`, `runs` and `doctor`: what they say must be what is there, and what is broken must come with its remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diptych.config import ConfigError, apply_overrides, load_recipe, recipes_of, task_names
from diptych.pipelines import doctor, recipes, runs, runs_folder, tracking
from diptych.trainers.attempts import record_attempt
from diptych.trainers.runfolder import RunFolder


def call(*arguments: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`diptych ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "diptych", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder, env=os.environ | environment)


def test_recipes_lists_every_recipe_of_every_task() -> None:
    result = recipes.run()
    assert [task["task"] for task in result["tasks"]] == task_names()
    for task in result["tasks"]:
        assert [recipe["name"] for recipe in task["recipes"]] == list(recipes_of(task["task"]))
        assert task["summary"]
        assert all(recipe["summary"] for recipe in task["recipes"])


@pytest.mark.parametrize("task", task_names())
def test_the_lines_of_a_recipe_can_be_pasted_into_a_call(task: str) -> None:
    """Every `KEY=VALUE` line that is shown, applied to that recipe, gives the same configuration."""
    result = recipes.run(task)
    config = load_recipe(task, "smoke")
    lines = [line for line in recipes.report(result).splitlines() if "=" in line and not line.startswith(" ")]
    shown = [line for line in lines if line.partition("=")[0] in {row["key"] for row in result["keys"]}]
    assert len(shown) == len(result["keys"]) > 40
    assert apply_overrides(config, shown) == config
    assert all(row["documentation"] for row in result["keys"])


def test_recipe_by_two_words_or_a_slash() -> None:
    assert recipes.run("coca", "demo") == recipes.run("coca/demo")
    assert recipes.run("coca/demo")["config"] == json.loads(load_recipe("coca", "demo").to_json())
    with pytest.raises(ConfigError, match="NAME"):
        recipes.run("coca/demo", "smoke")
    with pytest.raises(ConfigError, match="Did you mean demo"):
        recipes.run("coca", "demmo")


def test_choices_and_bounds_are_shown() -> None:
    rows = {row["key"]: row for row in recipes.run("coca")["keys"]}
    assert rows["train.strategy"]["allowed"] == "ddp, zero1, zero2, zero3"
    assert rows["data.validation_share"]["allowed"] == "≥ 0 and < 1"


def make_run(folder: Path, name: str, status: str | None, driver: str, run_id: str = "", uri: str = "") -> Path:
    """A run folder as a driver leaves it, with two logged steps of one attempt and no checkpoint."""
    run_dir = folder / name
    (run_dir / "metrics").mkdir(parents=True)
    record_attempt(RunFolder(str(run_dir)), world_size=1, resumed_from=None, number=1)
    (run_dir / "config.json").write_text(load_recipe("coca", "smoke").to_json())
    if status:
        runs_folder.write_driver(run_dir, {"driver": driver, "status": status, "run_id": run_id, "uri": uri, "digest": "d", "facts": {}})
    lines = [{"step": step, "time": 1.0 + step, "metrics": {"train/loss": 3.0 - step}} for step in (1, 2)]
    lines.insert(1, {"step": 1, "time": 2.5, "metrics": {"val/loss": 7.0}})
    (run_dir / "metrics" / "a0001.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


@pytest.fixture
def dead_driver() -> str:
    """The identity of a process that has ended."""
    code = "from diptych.pipelines.tracking import driver_identity; print(driver_identity())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_runs_tells_the_living_from_the_dead(tmp_path: Path, dead_driver: str) -> None:
    make_run(tmp_path, "alive", "running", tracking.driver_identity())
    make_run(tmp_path, "dead", "running", dead_driver)
    make_run(tmp_path, "done", "finished", dead_driver)
    make_run(tmp_path / "sweep", "trial-1", "failed", dead_driver)
    make_run(tmp_path, "fresh", None, "")
    (tmp_path / "not a run").mkdir()
    result = runs.run(str(tmp_path))
    found = {facts["name"]: facts["status"] for facts in result["runs"]}
    assert found == {"alive": "running", "dead": "interrupted", "done": "finished", "sweep/trial-1": "failed", "fresh": "prepared"}
    facts = next(facts for facts in result["runs"] if facts["name"] == "dead")
    assert (facts["task"], facts["step"], facts["steps"], facts["metrics"]) == ("coca", 2, 10, {"train/loss": 1.0, "val/loss": 7.0})
    assert Path(facts["run_dir"]) == tmp_path / "dead"
    text = runs.report(result)
    assert "interrupted: dead." in text
    assert text.count("\n") >= 6


def test_runs_are_compared_by_what_differs(tmp_path: Path, dead_driver: str) -> None:
    from diptych.pipelines import runs_compare

    for name, rate in (("one", 0.1), ("two", 0.2)):
        run_dir = make_run(tmp_path, name, "finished", dead_driver)
        stored = json.loads((run_dir / "config.json").read_text())
        stored["optim"]["lr"] = rate
        (run_dir / "config.json").write_text(json.dumps(stored))
    answer = call("runs", str(tmp_path), "--compare", "one", "--compare", "two", "--json")
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout.strip().splitlines()[-1])
    assert told["configuration"] == {"optim.lr": [0.1, 0.2]}
    assert told["metrics"] == {"train/loss": [1.0, 1.0], "val/loss": [7.0, 7.0]}
    assert "optim.lr" in answer.stderr
    wrong = call("runs", str(tmp_path), "--compare", "three")
    assert wrong.returncode == 2
    assert "one, two" in wrong.stderr
    with pytest.raises(ConfigError, match="a run that was tracked in MLflow"):
        runs_compare.page(runs.run(str(tmp_path))["runs"][0])


def test_a_damaged_configuration_does_not_hide_the_other_runs(tmp_path: Path, dead_driver: str) -> None:
    make_run(tmp_path, "good", "finished", dead_driver)
    (make_run(tmp_path, "cut", "finished", dead_driver) / "config.json").write_text('{"task": {')
    result = runs.run(str(tmp_path))
    assert {facts["name"]: facts["status"] for facts in result["runs"]} == {"good": "finished", "cut": "unreadable config.json"}


def test_runs_ends_in_mlflow_what_died(tmp_path: Path, dead_driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted → KILLED; finished while the server was away → FINISHED with its metrics; alive or of another host → untouched."""
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    store = tracking.client(uri)
    experiment = store.create_experiment("test", artifact_location=(tmp_path / "artifacts").as_uri())

    def running(name: str, driver: str, status: str) -> str:
        run_dir = tmp_path / "runs" / name
        tags = {tracking.TAG_DRIVER: driver, tracking.TAG_RUN_DIR: str(run_dir)}
        run_id = str(store.create_run(experiment, tags=tags).info.run_id)
        make_run(tmp_path / "runs", name, status, driver, run_id, uri)
        return run_id

    interrupted = running("interrupted", dead_driver, "running")
    finished = running("finished", dead_driver, "finished")
    alive = running("alive", tracking.driver_identity(), "running")
    elsewhere = running("elsewhere", "another-host:1:1", "running")
    result = runs.run("runs")
    assert set(result["ended"]) == {interrupted, finished}
    statuses = {run_id: store.get_run(run_id).info.status for run_id in (interrupted, finished, alive, elsewhere)}
    assert statuses == {interrupted: "KILLED", finished: "FINISHED", alive: "RUNNING", elsewhere: "RUNNING"}
    assert [(point.step, point.value) for point in store.get_metric_history(finished, "train/loss")] == [(1, 2.0), (2, 1.0)]
    assert store.get_metric_history(interrupted, "train/loss") == [], "no checkpoint has committed these steps"
    assert runs.run("runs")["ended"] == []


def test_a_store_that_is_gone_does_not_hide_the_runs(tmp_path: Path, dead_driver: str, capfd: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "a", "finished", dead_driver, "id", f"sqlite:///{tmp_path / 'gone.db'}")
    make_run(tmp_path, "b", "finished", dead_driver, "id", "http://user:secret@127.0.0.1:1")
    begin = time.monotonic()
    result = runs.run(str(tmp_path))
    assert time.monotonic() - begin < 60
    assert len(result["runs"]) == 2
    assert len(result["unreachable"]) == 2
    assert not (tmp_path / "gone.db").exists(), "looking must not make a store"
    printed = capfd.readouterr()
    assert "127.0.0.1:1 does not answer" in printed.err
    assert "secret" not in json.dumps(result) + printed.out + printed.err


def test_runs_of_a_missing_folder_ends_with_2(tmp_path: Path) -> None:
    answer = call("runs", str(tmp_path / "nowhere"))
    assert answer.returncode == 2
    assert "nowhere" in answer.stderr


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in result["checks"]}


def test_doctor_finds_this_environment_fit(tmp_path: Path) -> None:
    """The environment that runs the tests can train; the object is the last line and the status follows it."""
    answer = call("doctor", "--json", folder=tmp_path)
    result = json.loads(answer.stdout.splitlines()[-1])
    assert answer.returncode == 0, [check for check in result["checks"] if check["needed"] and not check["ok"]]
    assert result["ok"] is True
    checks = by_name(result)
    assert {"python", "packages", "torch", "cpu", "memory", "working folder", "ray", "ray token", "mlflow store"} <= set(checks)
    assert all(set(check) == {"name", "ok", "detail", "remedy", "needed"} for check in result["checks"])
    assert "precision=auto takes" in checks["cpu"]["detail"]


def test_doctor_fails_with_the_remedy_where_training_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    result = doctor.run()
    assert result["ok"] is False
    text = doctor.report(result)
    assert "FAIL  mlflow store" in text
    assert "FAIL  ray folder" in text
    assert "set RAY_TMPDIR to a short path" in text
    assert "training cannot work yet: ray folder, mlflow store" in text
    with pytest.raises(SystemExit) as end:
        doctor.command(json=True)
    assert end.value.code == 1


def test_every_failing_check_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each check, made to fail in what it looks at, says what to do."""
    monkeypatch.setattr(doctor, "_version", lambda _name: None)
    monkeypatch.setattr(doctor, "_writable", lambda _folder: False)
    monkeypatch.setattr(doctor, "_under_uv_run", lambda: True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    sections = (doctor._packages, doctor._folders, doctor._ray)
    failing = [check for section in sections for check in section() if not check.ok]
    assert {"packages", "faiss", "working folder", "ray", "ray token", "uv run"} <= {check.name for check in failing}
    assert all(check.remedy for check in failing)


@pytest.mark.parametrize(
    ("environment", "ok", "words"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, True, "no token is asked for"),
        ({"RAY_AUTH_TOKEN": "t"}, True, "there is a token"),
        ({}, True, "will make one"),
        ({"RAY_ADDRESS": "ray://head:10001"}, False, "names a cluster"),
    ],
)
def test_facts_about_rays_token(environment: dict[str, str], ok: bool, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check = doctor._token()
    assert check.ok is ok
    assert words in check.detail
