"""What `diptych submit` sends and refuses before any cluster is asked; jobs themselves run in tests/integration/test_cluster.py."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from diptych.config import ConfigError
from diptych.pipelines.submit import follow, job_environment, run


def test_the_environment_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the file, with the folder, what is left out, and variables from here or as given."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "env.yaml").write_text("pip: [timm]\nexcludes: [notebooks]\nenv_vars: {A: one}\n")
    told = job_environment(str(tmp_path / "env.yaml"), ("OMP_NUM_THREADS", "B=two=2"), str(tmp_path), ("videos",))
    assert told["pip"] == ["timm"]
    assert told["working_dir"] == str(tmp_path)
    assert {"notebooks", "videos", ".env", "*.pem", ".venv", "runs"} <= set(told["excludes"])
    variables = {key: value for key, value in told["env_vars"].items() if not key.startswith("RAY_")}
    assert variables == {"A": "one", "OMP_NUM_THREADS": "3", "B": "two=2"}
    assert int(told["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60, "a stopped run has time for its checkpoint"


@pytest.mark.parametrize("variable", ["HF_TOKEN=x", "AWS_SECRET_ACCESS_KEY=x", "MLFLOW_TRACKING_URI=http://me:x@host"])
def test_a_job_carries_no_secret(tmp_path: Path, variable: str) -> None:
    with pytest.raises(ConfigError, match="variables that are no secrets") as caught:
        job_environment("", (variable,), str(tmp_path), ())
    assert "x@" not in str(caught.value)
    (tmp_path / "env.yaml").write_text("env_vars: {WANDB_API_KEY: x}")
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        job_environment(str(tmp_path / "env.yaml"), (), str(tmp_path), ())


@pytest.mark.parametrize(
    ("file", "variables", "folder", "key"),
    [("", ("NOT_SET_ANYWHERE",), ".", "--env"), ("missing.yaml", (), ".", "--runtime-env"), ("", (), "no such folder", "--working-dir")],
)
def test_what_is_not_there_is_named(file: str, variables: tuple[str, ...], folder: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_environment(file, variables, folder, ())
    assert caught.value.key == key


def test_a_verb_that_does_not_exist_is_refused_before_the_cluster_is_asked() -> None:
    for verb in ("trian", "submit"):
        with pytest.raises(ConfigError, match="train") as caught:
            run(verb, [])
        assert caught.value.key == "VERB"


def test_a_cluster_that_does_not_answer_is_named_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "diptych").mkdir()
    command = [sys.executable, "-m", "diptych.pipelines.submit", "--address", "http://127.0.0.1:1", "train", "coca", "--recipe", "smoke"]
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    answer = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 2
    assert "--address: received 'http://127.0.0.1:1'; allowed: a running cluster's job server" in answer.stderr


class Cluster:
    """A client of a cluster with one job, which writes two lines; Ctrl-C is pressed after the first, `presses` times in all."""

    def __init__(self, presses: int) -> None:
        self.presses, self.stopped, self.done = presses, False, False

    def get_job_status(self, _: str) -> JobStatus:
        return JobStatus.STOPPED if self.stopped else JobStatus.SUCCEEDED if self.done else JobStatus.RUNNING

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield "one\n"
        if self.presses:
            self.presses -= 1
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)
        yield "two\n"
        self.done = True

    def get_job_logs(self, _: str) -> str:
        return "one\ntwo\n" if self.done else "one\n"

    def stop_job(self, _: str) -> None:
        self.stopped = True


class Terminal(io.StringIO):
    """Somebody who answers."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "stopped", "printed", "told"),
    [
        ("s\n", True, "one\n", "asked to stop: the run writes a checkpoint and ends"),
        ("l\n", False, "one\n", "the job goes on; `diptych submit --stop JOB` stops it"),
        ("c\n", False, "one\ntwo\n", ""),
        ("", False, "one\n", "the job goes on"),
        (None, False, "one\n", "the job goes on"),
    ],
)
def test_ctrl_c_asks_what_becomes_of_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str | None, stopped: bool, printed: str, told: str
) -> None:
    """In a terminal; elsewhere, and where nobody answers, the job goes on. Every line is shown once."""
    monkeypatch.setattr(sys, "stdin", io.StringIO() if typed is None else Terminal(typed))
    client: Any = Cluster(presses=1)
    follow(client, "JOB")
    shown = capsys.readouterr()
    asked = "\n[s]top the job, [l]eave it running, or [c]ontinue to follow? "
    assert (asked in shown.out) is (typed is not None)
    assert shown.out.replace(asked, "") == printed
    assert client.stopped is stopped
    assert told in shown.err
