"""Painters judged on held-out captions: what is saved, the grids, and the log that keeps what people wrote."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image
from support_pictures import StripePainter
from support_runs import make_shards

from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.pipelines import evaluate_pictures
from diptych.pipelines.evaluate_pictures import PictureEvaluation, assess, held_out_pairs, write_log
from diptych.trainers.picture_files import read_about, read_metadata


class Words:
    """A judge that knows colours: a picture's mean colour against the colours of the caption. Stands in for a CLIP of gigabytes."""

    modalities = ("image", "text")
    device = "cpu"

    def pixels(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.convert("RGB").resize((8, 8)))

    def images(self, pixels: np.ndarray) -> np.ndarray:
        return self._unit(pixels.reshape(len(pixels), -1, 3).mean(1))

    def texts(self, captions: list[str]) -> np.ndarray:
        from diptych.datasets.scenes import COLOURS

        colours = [
            [COLOURS[word] for word in caption.replace(",", " ").split() if word in COLOURS] or [(128, 128, 128)] for caption in captions
        ]
        return self._unit(np.array([np.mean(found, axis=0) for found in colours]))

    def _unit(self, vectors: np.ndarray) -> np.ndarray:
        vectors = vectors.astype(np.float32) - 127
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-6)


class GreyPainter(StripePainter):
    """What nobody trained: the same grey, whatever the prompt."""

    def paint(self, requests, settings):
        return super().paint([type(request)("", request.seed) for request in requests], settings)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    shards = make_shards(tmp_path_factory.mktemp("pictures") / "shards", 90)
    config = apply_overrides(load_recipe("coca", "smoke"), [f"data.shards={shards}", "data.validation_share=0.4"])
    return held_out_pairs(config, "", 30)


def facts(model: str, **more: object) -> dict:
    return {"model": model, "task": "stripes", "checkpoint": "step_1", "step": 1, "lr": 0.1} | more


def test_the_painter_that_listens_scores_above_the_one_that_does_not(pairs, tmp_path):
    wanted = PictureEvaluation("words", pictures=30)
    heard, left_out = assess(StripePainter, pairs, Words(), wanted, facts("stripes"), tmp_path / "heard")
    deaf, _ = assess(GreyPainter, pairs, Words(), wanted, facts("grey"), tmp_path / "deaf")
    assert heard["clip_score"] > deaf["clip_score"] + 20
    assert heard["caption_match"] > 3 * deaf["caption_match"]
    assert heard["pictures"] == len(pairs.captions) == 30
    assert {"cmmd", "fid_clip"} <= heard.keys()
    assert [text.split(":")[0] for text in left_out] == ["FID, KID and IS", "LPIPS"]
    lines = read_metadata(tmp_path / "heard")
    assert len(lines) == 30
    again = Words().images(np.stack([Words().pixels(Image.open(tmp_path / "heard" / line["file_name"])) for line in lines]))
    scores = np.maximum(100 * (again * Words().texts([line["prompt"] for line in lines])).sum(1), 0)
    np.testing.assert_allclose([line["clip_score"] for line in lines], scores, atol=1e-2)
    assert np.mean(scores) == pytest.approx(heard["clip_score"], abs=1e-2), "of the very pictures that were saved"
    assert read_about(tmp_path / "heard" / lines[0]["file_name"])["prompt"] == lines[0]["prompt"]
    for name in ("prompts", "seeds"):
        assert Image.open(tmp_path / "heard" / f"{name}.jpg").size == (5 * 34 + 2,) * 2
    assert json.loads((tmp_path / "heard" / "metrics.json").read_text())["clip_score"] == heard["clip_score"]


def test_blank_and_failed_pictures_are_flagged(pairs, tmp_path):
    captions = ["a red boat", "nan", "black", "a blue boat"]
    some = evaluate_pictures.Pairs(captions, lambda *shape: (pairs.real(*shape)[0][:4], pairs.real(*shape)[1][:4]))
    row, _ = assess(StripePainter, some, Words(), PictureEvaluation("words"), facts("stripes"), tmp_path / "out")
    assert (row["nan_share"], row["flagged_share"]) == (0.25, 0.5)
    assert len(read_metadata(tmp_path / "out")) == 3
    nothing = evaluate_pictures.Pairs(["nan", "nan"], some.real)
    row, _ = assess(StripePainter, nothing, Words(), PictureEvaluation("words"), facts("diverged"), tmp_path / "none")
    assert row["flagged_share"] == 1
    assert "clip_score" not in row


def test_the_log_grows_and_keeps_assessments(pairs, tmp_path):
    path = tmp_path / "model_log.csv"
    row, _ = assess(StripePainter, pairs, Words(), PictureEvaluation("words"), facts("a <b>run</b>"), tmp_path / "out")
    write_log(path, [row, row | {"model": "other", "folder": ""}])
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    found[0]["assessment"] = "hands are fine"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, found[0])
        table.writeheader()
        table.writerows(found)
    write_log(path, [row | {"cmmd": 1.25}, row | {"model": "third"}])
    with path.open(newline="") as file:
        after = list(csv.DictReader(file))
    assert [entry["model"] for entry in after] == ["a <b>run</b>", "other", "third"]
    assert (after[0]["assessment"], after[0]["cmmd"], after[1]["assessment"]) == ("hands are fine", "1.25", "")
    page = path.with_suffix(".html").read_text()
    assert "hands are fine" in page
    assert "a &lt;b&gt;run&lt;/b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 4
    assert "http" not in page.replace("http-equiv", "")


def test_runs_without_captions_are_refused(tmp_path, pairs):
    config = apply_overrides(load_recipe("coca", "smoke"), [f"data.shards={tmp_path}", "data.validation_share=0"])
    make_shards(tmp_path, 9)
    with pytest.raises(ConfigError, match="held-out samples that have captions"):
        held_out_pairs(config, "", 5)
    assert len(held_out_pairs(config, str(tmp_path), 5).captions) == 5
