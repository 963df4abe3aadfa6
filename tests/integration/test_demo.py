"""The demo end to end: small here, to see that every stage hands over to the next; whole with its targets as a slow test."""

from __future__ import annotations

import html
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diptych.config import ConfigError
from diptych.pipelines import demo

SMALL = {"samples": 700, "size": 48, "coca_steps": 6, "prior_steps": 8}


@pytest.fixture(scope="module")
def made(ray_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo too short to reach its targets."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    demo.run(str(folder), SMALL)
    return folder


def test_every_stage_leaves_what_the_next_one_needs(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    stages = [stage["stage"] for stage in summary["stages"]]
    assert stages == ["scenes → shards", "index", "train CoCa", "export CoCa and embed", "train prior", "evaluate"]
    assert "700 samples, 700 captions, 0 faults" in summary["stages"][1]["result"]
    assert all("2 workers" in stage["result"] for stage in summary["stages"] if stage["stage"].startswith("train"))
    assert "700 images and captions embedded" in summary["stages"][3]["result"]


def test_each_figure_stands_beside_its_target_and_its_baseline(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    targets = [figure for figure in summary["figures"] if figure["target"]]
    assert len(targets) == 5
    for figure in targets:
        assert figure["reached"] == (figure["value"] >= float(figure["target"].removeprefix("target: at least ")))
        assert any(character.isdigit() for character in figure["baseline"])
    # So few steps teach nothing, and the summary says so.
    assert summary["reached"] is False
    page = html.unescape((made / "report.html").read_text())
    assert all(figure["name"] in page for figure in summary["figures"])
    assert page.count("data:image/jpeg") >= 40  # captions made of pictures, and pictures found by captions
    assert summary["mlflow"] in page


def test_its_runs_stand_finished_in_mlflow(made: Path) -> None:
    from mlflow import MlflowClient

    store = MlflowClient(f"sqlite:///{made / 'mlflow.db'}")
    runs = store.search_runs([experiment.experiment_id for experiment in store.search_experiments()])
    assert {run.info.run_name: run.info.status for run in runs} == {"coca": "FINISHED", "prior": "FINISHED"}
    for run in runs:
        assert any(name.startswith("eval/") for name in run.data.metrics)
        assert "evaluation" in [artifact.path for artifact in store.list_artifacts(run.info.run_id)]


def test_called_again_it_passes_over_what_is_done(made: Path, ray_session: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    started = time.monotonic()
    summary = demo.run(str(made), SMALL)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")} == before
    assert all("already" in summary["stages"][index]["result"] for index in (0, 2, 4))
    assert time.monotonic() - started < 60


def test_a_folder_of_other_things_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--out"):
        demo.run(str(tmp_path))
    with pytest.raises(ConfigError, match="same options"):
        demo.run(str(made), SMALL | {"samples": 900})


@pytest.mark.slow
def test_the_whole_demo_reaches_its_targets(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diptych.pipelines.demo", "--out", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["reached"] is True
    assert Path(summary["report"]).is_file()
