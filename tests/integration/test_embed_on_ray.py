"""`embed` on Ray: a pool of actors fills the folder, and a call that was killed is gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from diptych.datasets import scenes
from diptych.datasets.embeddings import join
from diptych.datasets.manifest import open_manifest
from diptych.datasets.shards import ShardWriter
from diptych.pipelines import embed, embed_verify


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CoCa with random weights in open_clip's layout, as `export` writes one."""
    from diptych.config import load_recipe, set_path
    from diptych.datasets.tokens import train_tokenizer
    from diptych.recipes.coca import CocaConfig
    from diptych.trainers.tasks.coca import CocaTask

    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([scenes.describe(0, index).caption for index in range(200)], 256, folder / "tokenizer")
    config = set_path(load_recipe("coca", "smoke"), "task.tokenizer", str(folder / "tokenizer")).task
    assert isinstance(config, CocaConfig)
    CocaTask(config, seed=0).export(folder / "export")
    return str(folder / "export")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """400 scenes, of which one is broken."""
    folder = tmp_path_factory.mktemp("shards")
    rows: list[dict[str, Any]] = list(scenes.samples(0, 0, 400, size=32))
    rows[123]["jpg"] = b"broken"
    ShardWriter(str(folder), 100).write_all(rows)
    return str(folder)


def test_two_actors_embed_every_sample_and_a_second_call_only_what_is_missing(
    ray_session: Any, shards: str, model: str, tmp_path: Path
) -> None:
    options = {"model": model, "actors": 2, "cpus_per_actor": 1, "partition_size": 50, "batch_size": 16, "precision": "fp32"}
    first = embed.run(shards, str(tmp_path), options)
    assert (first["samples_in"], first["samples_out"], first["partitions"], first["partitions_skipped"]) == (400, 399, 8, 0)
    assert [(fault["shard"], fault["key"], fault["kind"]) for fault in first["faults"]] == [("00001.tar", "0000123", "undecodable_image")]
    joined = join(open_manifest(shards), str(tmp_path))
    whole = joined.read(np.arange(400), "image")[0]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    (tmp_path / "metadata" / "metadata_3.parquet").unlink()
    again = embed.run(shards, str(tmp_path), options)
    assert (again["partitions_skipped"], again["samples_out"], again["faults"]) == (7, 399, first["faults"])
    changed = {path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"img_emb_3.npy", "text_emb_3.npy"}
    assert np.abs(join(open_manifest(shards), str(tmp_path)).read(np.arange(400), "image")[0] - whole).max() < 2e-3
    assert embed_verify.run(shards, str(tmp_path), 32, {"cpus_per_actor": 1})["faults"] == []


@pytest.mark.slow
def test_a_killed_call_is_gone_on_with(ray_session: Any, shards: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "embeddings"
    arguments = [
        shards,
        str(out),
        "--model",
        model,
        "--partition-size",
        "10",
        "--actors",
        "1",
        "--cpus-per-actor",
        "1",
        "--precision",
        "fp32",
    ]
    driver = subprocess.Popen(
        [sys.executable, "-m", "diptych.pipelines.embed", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 180
    while len(list(out.glob("metadata/*.parquet"))) < 3 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    started = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    for process in psutil.wait_procs(started, timeout=30)[1]:
        process.kill()
    done = {path: path.stat().st_mtime_ns for path in out.glob("metadata/*.parquet")}
    assert 3 <= len(done) < 40, "the call ended before it was killed; raise the number of scenes"
    result = embed.run(shards, str(out), {"model": model, "partition_size": 10, "actors": 1, "cpus_per_actor": 1, "precision": "fp32"})
    assert (result["partitions_skipped"], result["samples_out"]) == (len(done), 399)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    assert json.loads((out / "embed.json").read_text())["partition_size"] == 10
