"""The worked example of a new task on its page: short, whole, and trained without a line changed elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support_runs import make_shards

from diptych import recipes
from diptych.config import apply_overrides, load_recipe, task_names
from diptych.datasets.manifest import open_manifest
from diptych.pipelines import evaluate, export
from diptych.pipelines.local import train_here
from diptych.trainers import tasks
from diptych.trainers.journal import read_metrics


def example(repository: Path) -> dict[str, str]:
    """The page's files by path."""
    text = (repository / "docs" / "new_task.md").read_text()
    return dict(re.findall(r"^`(diptych/[\w/]+\.py)`:\n\n```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


@pytest.fixture
def installed(repository, tmp_path, monkeypatch):
    """The two files where the package looks for tasks."""
    for path, text in example(repository).items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path / "diptych" / "recipes")])
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "diptych" / "trainers" / "tasks")])
    yield
    for name in ("diptych.recipes.mapper", "diptych.trainers.tasks.mapper"):
        sys.modules.pop(name, None)
    for package in (recipes, tasks):
        if hasattr(package, "mapper"):
            delattr(package, "mapper")


def test_the_example_is_short(repository):
    files = example(repository)
    assert sorted(files) == ["diptych/recipes/mapper.py", "diptych/trainers/tasks/mapper.py"]
    lines = [line for text in files.values() for line in text.splitlines() if line.strip()]
    assert len(lines) < 60


def test_the_example_trains_validates_evaluates_and_exports(installed, tmp_path):
    shards = make_shards(tmp_path / "shards")
    manifest = open_manifest(str(shards))
    keys = manifest.rows(np.arange(manifest.samples), ["key", "caption"])
    vectors = np.random.default_rng(0).normal(size=(manifest.samples, 8)).astype(np.float16)
    for part in ("img_emb", "text_emb", "metadata"):
        (tmp_path / "emb" / part).mkdir(parents=True)
    for part, scale in (("img_emb", 1), ("text_emb", -1)):
        np.save(tmp_path / "emb" / part / f"{part}_0.npy", scale * vectors)
    keys.rename_columns(["image_path", "caption"]).to_pandas().to_parquet(tmp_path / "emb" / "metadata" / "metadata_0.parquet")
    assert "mapper" in task_names()
    overrides = [f"data.shards={shards}", f"data.embeddings={tmp_path / 'emb'}", "train.steps=60"]
    assert train_here(apply_overrides(load_recipe("mapper", "smoke"), overrides), tmp_path / "run")["status"] == "finished"
    losses = [line["metrics"]["train/loss"] for line in read_metrics(str(tmp_path / "run")) if "train/loss" in line["metrics"]]
    assert losses[-1] < 0.5 * losses[0]
    assert evaluate.run([str(tmp_path / "run")], track=False)["metrics"]["cosine"] < 1
    assert "model.safetensors" in export.run(str(tmp_path / "run"), str(tmp_path / "out"))["files"]
