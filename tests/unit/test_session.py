"""A training session that was superseded ends by itself, on every worker: raised, its end would make Ray start it again."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support_distributed import run_workers
from support_runs import make_shards, overrides
from support_training import denormal_product, fresh_pages

from diptych.batches import StepBatch
from diptych.config import RunConfig
from diptych.datasets.stream import LocalStream, StreamSpec
from diptych.pipelines.runs_folder import write_driver
from diptych.pipelines.session import payload_of, run_session
from diptych.trainers.attempts import newest_attempt
from diptych.trainers.checkpoint import begin_attempt, newest_whole
from diptych.trainers.runfolder import RunFolder

TAKEN_OVER = 5


def session(payload: dict[str, Any]) -> dict[str, Any]:
    """On each worker: another group begins an attempt while this one is at step `TAKEN_OVER`."""

    def stream(spec: StreamSpec, rank: int, size: int, first: int, stop: int | None) -> Iterator[StepBatch]:
        for share in LocalStream(spec, rank, size, first, stop):
            if share.step == TAKEN_OVER and rank == 0:
                _wait_for_checkpoint(payload["run_dir"])
                begin_attempt(payload["run_dir"], size)
            yield share

    return run_session(payload, RunConfig.from_json(payload["config"]), torch.device("cpu"), stream)


def _wait_for_checkpoint(run_dir: str) -> None:
    """It is written beside training, and one that comes after the takeover is fenced."""
    deadline = time.monotonic() + 60
    while newest_whole(RunFolder(run_dir)) is None and time.monotonic() < deadline:
        time.sleep(0.05)


def payload_in(folder: Path) -> dict[str, Any]:
    """Of a run that has not begun."""
    from diptych.pipelines import train
    from diptych.pipelines.prepare import prepare

    settings = overrides(make_shards(folder / "shards", 24), "run", train__steps=12, checkpoint__every_steps=3)
    config = train.resolve("coca", "smoke", "", [*settings, "task.tokenizer=train:64", "data.validation_share=0"])
    (folder / "run").mkdir()
    return payload_of(prepare(config, folder / "run"), folder / "run")


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return payload_in(tmp_path_factory.mktemp("fenced"))


def test_a_fenced_group_ends_together_and_leaves_the_run_to_the_newer_attempt(payload: dict[str, Any]) -> None:
    folder = RunFolder(payload["run_dir"])
    results = run_workers(session, 2, payload)
    assert [result["status"] for result in results] == ["fenced", "fenced"]
    assert all("superseded by attempt 2" in result["error"] for result in results)
    assert newest_attempt(folder) == 2
    assert folder.names("checkpoints") == ["step_00000003-a0001"], "the last one before the takeover"
    assert not Path(payload["run_dir"], "result.json").exists(), "which is the newer attempt's to write"


def test_workers_of_a_driver_that_was_replaced_begin_no_attempt(payload: dict[str, Any]) -> None:
    run_dir = Path(payload["run_dir"])
    before = newest_attempt(RunFolder(payload["run_dir"]))
    write_driver(run_dir, {"driver": "elsewhere:1:2", "status": "running"})
    result = run_session(payload, RunConfig.from_json(payload["config"]), torch.device("cpu"), LocalStream)
    assert (result["status"], "elsewhere:1:2" in result["error"]) == ("fenced", True)
    assert newest_attempt(RunFolder(payload["run_dir"])) == before
    assert json.loads((run_dir / "driver.json").read_text())["driver"] == "elsewhere:1:2"


def test_a_session_trains_with_denormals_flushed_and_sets_them_back(tmp_path: Path) -> None:
    """Else the steps of a model that has learned its data get slower and slower on a CPU."""
    found = []

    def stream(*given: Any) -> Iterator[StepBatch]:
        for share in LocalStream(*given):
            found.append(denormal_product())
            yield share

    payload = payload_in(tmp_path)
    run_session(payload, RunConfig.from_json(payload["config"]), torch.device("cpu"), stream)
    assert found
    assert not any(found)
    assert denormal_product() > 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such switches")
def test_a_session_on_a_cpu_keeps_the_memory_of_its_steps(tmp_path: Path) -> None:
    """Else each step touches anew what the last one has freed."""
    payload = payload_in(tmp_path)
    run_session(payload, RunConfig.from_json(payload["config"]), torch.device("cpu"), LocalStream)
    assert fresh_pages() < 100


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["cluster.data_cpus=0"], "LocalStream {'threads': 1} False"),
        (["cluster.data_cpus=0", "cluster.read_threads=3"], "LocalStream {'threads': 3} False"),
        (["cluster.data_cpus=3"], "RayStream {'cpus': 1.5, 'claims': True} True"),
    ],
)
def test_workers_without_data_cpus_read_for_themselves_and_leave_ray_data_out(chosen: list[str], expected: str) -> None:
    code = (
        "import sys; from diptych.config import apply_overrides, load_recipe; from diptych.pipelines.session import _make_stream\n"
        f"made = _make_stream(apply_overrides(load_recipe('coca', 'smoke'), {chosen}), 2)\n"
        "print(made.func.__name__, made.keywords, 'ray.data' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
