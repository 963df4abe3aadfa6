"""Runs on pictures: a coca run's captions, a clip_vit run's competition rows and nearest prompts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.datasets.manifest import open_manifest
from diptych.pipelines import generate, pack
from diptych.pipelines.local import train_here
from diptych.trainers.nearest_prompts import PromptIndex, submission_rows

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """`in/`: plain pictures in four colours with captions; `shards/`; `emb/`: a one-hot text embedding per colour."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "in").mkdir()
    rows = []
    for index in range(24):
        name = list(COLOURS)[index % 4]
        shade = np.clip(np.array(COLOURS[name]) + index, 0, 255).astype(np.uint8)
        Image.fromarray(np.full((40, 40, 3), shade, np.uint8)).save(folder / "in" / f"{index:02d}.png")
        rows.append({"file_name": f"{index:02d}.png", "text": f"a {name} wall"})
    pd.DataFrame(rows).to_csv(folder / "in" / "metadata.csv", index=False)
    pack.run(str(folder / "in"), str(folder / "shards"), jobs=1)
    manifest = open_manifest(str(folder / "shards"))
    table = manifest.rows(np.arange(manifest.samples), ["key", "caption"])
    captions = table["caption"].to_pylist()
    for part in ("text_emb", "metadata"):
        (folder / "emb" / part).mkdir(parents=True)
    vectors = np.eye(8, dtype=np.float16)[[list(COLOURS).index(caption.split()[1]) for caption in captions]]
    np.save(folder / "emb" / "text_emb" / "text_emb_0.npy", vectors)
    about = pd.DataFrame({"image_path": table["key"].to_pylist(), "caption": captions})
    about.to_parquet(folder / "emb" / "metadata" / "metadata_0.parquet")
    return folder


@pytest.fixture(scope="module")
def embedding_run(pictures) -> Path:
    overrides = [f"data.shards={pictures}/shards", f"data.embeddings={pictures}/emb", "train.steps=60", "optim.lr=0.003"]
    assert train_here(apply_overrides(load_recipe("clip_vit", "smoke"), overrides), pictures / "embedding")["status"] == "finished"
    return pictures / "embedding"


def test_predictions_are_competition_rows_and_the_nearest_prompts(embedding_run, pictures, tmp_path):
    result = generate.run(str(embedding_run), [], images=str(pictures / "in"), out=str(tmp_path / "submission.csv"), neighbours=2)
    assert (result["samples_in"], result["samples_out"], result["faults"]) == (24, 24, [])
    with (tmp_path / "submission.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["imgId_eId", "val"]
    assert [row[0] for row in rows[1:10]] == [*(f"00_{index}" for index in range(8)), "01_0"]
    values = np.array([float(row[1]) for row in rows[1:]]).reshape(24, 8)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)
    with (tmp_path / "submission.prompts.csv").open() as file:
        near = list(csv.DictReader(file))
    assert len(near) == 48
    best = [row["text"] for row in near if row["rank"] == "1"]
    assert np.mean([text == f"a {list(COLOURS)[index % 4]} wall" for index, text in enumerate(best)]) > 0.9


def test_bad_pictures_are_named_and_left_out(embedding_run, tmp_path):
    Image.new("RGB", (30, 50), "red").save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:200])
    result = generate.run(str(embedding_run), [], images=str(tmp_path), neighbours=1)
    assert [row["image"] for row in result["texts"]] == ["good"]
    assert [(fault["key"], fault["kind"]) for fault in result["faults"]] == [("bad", "undecodable_image")]


def test_a_coca_run_captions_pictures(pictures, tmp_path):
    config = apply_overrides(load_recipe("coca", "smoke"), [f"data.shards={pictures}/shards", "train.steps=4"])
    train_here(config, pictures / "captions")
    result = generate.run(str(pictures / "captions"), [], images=str(pictures / "in"), out=str(tmp_path / "captions.csv"))
    with (tmp_path / "captions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{index:02d}" for index in range(24)]
    assert result["samples_out"] == 24


def test_wrong_calls_say_what_the_run_takes(embedding_run, pictures, tmp_path):
    with pytest.raises(ConfigError, match="takes pictures, not prompts"):
        generate.run(str(embedding_run), ["a cat"])
    with pytest.raises(ConfigError, match="a picture, or a folder with pictures"):
        generate.run(str(embedding_run), [], images=str(tmp_path))
    with pytest.raises(ConfigError, match=r"ends in \.csv"):
        generate.run(str(embedding_run), [], images=str(pictures / "in"), out=str(tmp_path / "x.jsonl"))


def test_the_index_is_exact_and_knows_each_prompt_once():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 6))
    prompts = [f"p{index % 40}" for index in range(50)]
    index = PromptIndex(prompts, vectors)
    assert len(index.prompts) == 40
    query = rng.normal(size=(3, 6))
    unit = vectors[:40] / np.linalg.norm(vectors[:40], axis=1, keepdims=True)
    for row, found in zip(query / np.linalg.norm(query, axis=1, keepdims=True), index.nearest(query, 5), strict=True):
        cosines = unit @ row
        assert [text for text, _ in found] == [f"p{place}" for place in np.argsort(-cosines)[:5]]
        assert [cosine for _, cosine in found] == pytest.approx(sorted(cosines, reverse=True)[:5], abs=1e-5)
    assert list(submission_rows(["x"], np.array([[0.5, -1.0]]))) == [("x_0", 0.5), ("x_1", -1.0)]
