"""A call that cannot work ends with status 2 within seconds, before any Ray, and says what to do."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support_runs import make_shards

from diptych import cli


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards", samples=12)


@pytest.fixture(scope="module")
def silent_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures without captions."""
    from diptych.datasets.shards import ShardWriter

    folder = tmp_path_factory.mktemp("silent")
    ShardWriter(str(folder), 10).write_all({"jpg": b"\xff\xd8\xff\xd9"} for _ in range(3))
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_embeddings(folder: Path, shards: Path, dims: tuple[int, int]) -> Path:
    from diptych.datasets.manifest import open_manifest

    keys = open_manifest(str(shards)).column("key")
    for name in ("metadata", "img_emb", "text_emb"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image_path": keys}), folder / "metadata/metadata_0.parquet")
    for name, dim in zip(("img_emb", "text_emb"), dims, strict=True):
        np.save(folder / name / f"{name}_0.npy", np.ones((len(keys), dim), np.float16))
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What standard error says of a call that must be refused."""
    begin = time.monotonic()
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    text = capsys.readouterr().err
    assert end.value.code == 2, text
    assert time.monotonic() - begin < 20
    assert not Path("mlflow.db").exists(), "a refused call leaves no run behind"
    import ray

    assert not ray.is_initialized()
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["train.stepz=5"], ["train.stepz", "Did you mean train.steps"]),
        (["train.steps=many"], ["train.steps", "many", "integer"]),
        (["train.strategy=zero9"], ["train.strategy", "zero9", "ddp, zero1, zero2, zero3"]),
        (["data.shards=nowhere/"], ["nowhere", "folder"]),
        (["data.shards="], ["data.shards", "diptych pack"]),
        (["workers=500"], ["workers", "500", "at most", "CPUs"]),
        (["workers=4", "cluster.logical_cpus=2"], ["cluster.logical_cpus", "4 workers × 1 + 2 for data = 6 CPUs"]),
        (["cluster.gpus_per_worker=64"], ["cluster.gpus_per_worker", "64", "cluster.gpus_per_worker=0"]),
        (["workers=2..64", "checkpoint.every_steps=5", "cluster.gpus_per_worker=1"], ["at most", "64 workers"]),
        (["workers=2..4", "checkpoint.every_steps=0"], ["checkpoint.every_steps", "at least 1 with workers=2..4"]),
        (["output=s3://bucket/runs"], ["output", "checkpoint.storage=s3://"]),
        (["tracking.uri=file:///x"], ["tracking.uri", "sqlite"]),
        (["train.offload=true"], ["train.offload", "zero1"]),
        (["nonsense"], ["nonsense", "KEY=VALUE"]),
    ],
)
def test_a_wrong_configuration(shards: Path, capsys: pytest.CaptureFixture[str], changes: list[str], expected: list[str]) -> None:
    begin = time.process_time()
    message = refused(["train", "coca", f"data.shards={shards}", *changes], capsys)
    assert time.process_time() - begin < 5, "refused before anything heavy is begun"
    for part in expected:
        assert part in message


def test_wrong_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean train" in refused(["trian"], capsys)
    assert "Did you mean coca" in refused(["train", "cocoa"], capsys)
    assert "Did you mean smoke" in refused(["train", "coca", "--recipe", "smok"], capsys)
    assert "config.json" in refused(["train", "coca", "--config", "missing.json"], capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["--space", "smoke: Four trials", "--vary KEY=VALUE"]),
        (["--space", "smok"], ["Did you mean smoke"]),
        (["--space", "smoke", "--method", "ash"], ["--method", "grid, random, asha, pbt, optuna"]),
        (["--space", "smoke", "data.shards=nowhere/"], ["nowhere", "folder"]),
        (["--space", "smoke", "--at-once", "64"], ["--at-once", "64", "a trial = 1 workers × 1 + 2 for data = 3 CPUs"]),
        (["--vary", "seed=1,2", "--method", "pbt"], ["seed", "a clone goes on with its donor's samples"]),
        (["--space", "smoke", "--resume", "name=never"], ["--resume", "never", "a sweep that has begun"]),
    ],
)
def test_a_wrong_sweep(shards: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]) -> None:
    message = refused(["tune", "coca", f"data.shards={shards}", *arguments], capsys)
    for part in expected:
        assert part.lower() in message.lower()


def test_shards_without_captions(silent_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "captions" in refused(["train", "coca", f"data.shards={silent_shards}"], capsys)


def test_a_tokenizer_or_a_model_that_is_not_there(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["train", "gpt2", "--recipe", "smoke", f"data.shards={shards}"]
    assert f"task.tokenizer: received '{tmp_path}/none'" in refused([*call, f"task.tokenizer={tmp_path}/none"], capsys)
    assert f"task.model: received '{tmp_path}/none'" in refused([*call, f"task.model={tmp_path}/none", "task.tokenizer="], capsys)


def test_captions_that_will_be_cut_are_counted(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diptych.config import apply_overrides, load_recipe
    from diptych.pipelines.prepare import prepare

    config = apply_overrides(load_recipe("gpt2", "smoke"), [f"data.shards={shards}", "task.length=5", "data.validation_share=0"])
    prepare(config, tmp_path / "run")
    assert "12 of all captions are longer than 5 tokens and are cut to that" in capsys.readouterr().err


def test_embeddings_that_do_not_fit(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["train", "dalle2_prior", f"data.shards={shards}"]
    assert "data.embeddings" in refused(call, capsys)
    mixed = write_embeddings(tmp_path / "mixed", shards, (8, 16))
    assert "images of 8 and texts of 16" in refused([*call, f"data.embeddings={mixed}"], capsys)
    even = write_embeddings(tmp_path / "even", shards, (8, 8))
    assert "task.embed_dim: received 768; allowed: 8" in refused([*call, f"data.embeddings={even}", "task.embed_dim=768"], capsys)


def test_a_run_keeps_what_it_began_with(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diptych.pipelines import runs_folder, train

    config = train.resolve("coca", "smoke", "", [f"data.shards={shards}", "name=begun"])
    run_dir = runs_folder.run_folder(config)
    runs_folder.claim(run_dir, config)
    (run_dir / "config.json").write_text(config.to_json())
    runs_folder.write_driver(run_dir, {"driver": "elsewhere:1:1", "status": "stopped", "digest": "", "run_id": ""})
    message = refused(["train", "coca", f"data.shards={shards}", "name=begun", "train.global_batch_size=16"], capsys)
    assert "train.global_batch_size" in message
    assert "another name" in message
