"""The main job on real data: img2dataset's shards with clip-retrieval's scrambled embeddings, and captioned photos."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def train(task: str, recipe: str, *overrides: str) -> dict[str, Any]:
    from diptych.pipelines import train as verb

    return verb.run(verb.resolve(task, recipe, "", list(overrides)))


def train_losses(run_dir: str) -> list[float]:
    from diptych.trainers.journal import read_metrics

    return [line["metrics"]["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line["metrics"]]


def mlflow_run(result: dict[str, Any], store: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store}").get_run(result["run_id"])


def test_index_agrees_with_img2datasets_own_statistics(shared_data: Path) -> None:
    from diptych.pipelines import index

    result = index.run(str(shared_data / "pomological/shards"))
    assert (result["shards"], result["samples"], result["failed_downloads"], result["faults"]) == (8, 7501, 79, [])


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "zero2"])
def test_the_prior_learns_from_scrambled_embeddings(
    shared_data: Path, ray_session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    real = shared_data / "pomological"
    result = train(
        "dalle2_prior", "base", f"data.shards={real / 'shards'}", f"data.embeddings={real / 'embeddings'}", "name=prior", "workers=2",
        f"train.strategy={strategy}", "train.steps=120", "train.global_batch_size=64", "optim.lr=1e-3", "train.precision=fp32",
        "task.depth=2", "task.heads=2", "task.dim_head=32", "task.timesteps=100", "task.sample_timesteps=8", "validation.samples=128",
    )  # fmt: skip
    assert "7,501 of 7,501 samples joined by key" in capsys.readouterr().err
    assert (result["status"], result["step"], result["world_size"]) == ("finished", 120, 2)
    losses = train_losses(result["run_dir"])
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    run = mlflow_run(result, tmp_path / "mlflow.db")
    assert run.info.status == "FINISHED"
    assert run.data.params["train.strategy"] == strategy
    assert run.inputs.dataset_inputs[0].dataset.digest
    assert run.data.metrics["val/cosine_image_predicted"] == pytest.approx(result["metrics"]["val/cosine_image_predicted"])


def test_photos_are_packed_trained_on_and_evaluated(shared_data: Path, ray_session: Any, tmp_path: Path) -> None:
    from diptych.pipelines import evaluate, pack

    packed = pack.run(
        str(shared_data / "coco_captions"), str(tmp_path / "shards"), {"samples_per_shard": 32, "resize": "center_crop", "size": 64}
    )
    assert (packed["samples_in"], packed["samples_out"], packed["faults"]) == (94, 94, [])
    result = train(
        "coca", "smoke", "data.shards=shards", "name=photos", "workers=2", "train.steps=60", "task.image_size=32", "task.tokenizer=train:512",
        "data.validation_share=0.2", "train.global_batch_size=16",
    )  # fmt: skip
    assert result["status"] == "finished"
    losses = train_losses(result["run_dir"])
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    figures = evaluate.run([result["run_dir"]])["metrics"]
    metrics = figures.get("photos", figures)
    assert 0 <= metrics["image_to_text_r1"] <= 1
    assert (Path(result["run_dir"]) / "evaluation").is_dir()
    assert mlflow_run(result, tmp_path / "mlflow.db").info.status == "FINISHED"


def test_verify_accepts_the_peers_embeddings_and_finds_one_swapped_row(shared_data: Path, ray_session: Any, tmp_path: Path) -> None:
    from diptych.pipelines import embed_verify

    real = shared_data / "pomological"
    options = {"model": str(real / "tiny_clip"), "manifest": str(tmp_path / "manifest")}
    honest = embed_verify.run(str(real / "shards"), str(real / "embeddings"), 32, options)
    assert honest["faults"] == []
    assert min(figures["min"] for figures in honest["cosine"].values()) >= 0.99
    swapped = shutil.copytree(real / "embeddings", tmp_path / "swapped", copy_function=shutil.copyfile)
    swapped.joinpath("img_emb").chmod(0o755)
    file = swapped / "img_emb/img_emb_1.npy"
    vectors = np.load(file)
    # Random weights embed all pictures alike; the two rows that differ most are swapped, so that the cosine can tell.
    similarity = vectors[:400].astype(np.float32) @ vectors[:400].astype(np.float32).T
    first, second = np.unravel_index(similarity.argmin(), similarity.shape)
    vectors[[first, second]] = vectors[[second, first]]
    file.unlink()
    np.save(file, vectors)
    found = embed_verify.run(str(real / "shards"), str(swapped), 0, options)
    assert len(found["faults"]) == 2
