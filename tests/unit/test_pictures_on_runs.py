"""Pictures from real runs by the command line: files, scores by an exported CoCa, evaluation with the base beside a LoRA, one log."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support_runs import embed_shards, make_shards

from diptych.cli import main
from diptych.config import apply_overrides, load_recipe
from diptych.pipelines import export
from diptych.pipelines.local import train_here
from diptych.trainers.picture_files import read_metadata


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`painter` from scratch, `lora` on its export, `judge`: an exported coca run; all of a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    shards = make_shards(folder / "shards")

    def train(name: str, task: str, recipe: str, *overrides: str) -> None:
        common = [f"data.shards={shards}", "train.steps=2", "data.validation_share=0.2", "train.precision=fp32"]
        train_here(apply_overrides(load_recipe(task, recipe), [*common, *overrides]), folder / name)

    train("judge", "coca", "smoke")
    export.run(str(folder / "judge"))
    train("painter", "stable_diffusion", "smoke", "validation.samples=0")
    export.run(str(folder / "painter"))
    small = ["task.image_size=16", "task.context_length=16", "task.show_count=0", "validation.samples=8"]
    train("lora", "stable_diffusion", "lora_reports", f"task.pretrained={folder}/painter/export", *small)
    vectors = embed_shards(shards, str(folder / "judge" / "export"), folder / "emb")
    for task in ("dalle2_prior", "dalle2_decoder"):
        train(task, task, "smoke", f"data.embeddings={vectors}", "validation.samples=0")
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    """The JSON that a verb prints."""
    with pytest.raises(SystemExit) as end:
        main([*words, "--json"])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    return json.loads(output.out.splitlines()[-1])


def test_generate_paints_scores_and_repeats(runs, tmp_path, capsys):
    words = [
        "generate",
        f"{runs}/painter",
        "--prompt",
        "a red circle",
        "--samples-per-prompt",
        "2",
        "--seed",
        "5",
        "--clip",
        f"{runs}/judge",
    ]
    result = call(capsys, *words, "--out", str(tmp_path / "one"), "steps=2")
    assert [row["seed"] for row in result["texts"]] == [5, 6]
    assert all(row["clip_score"] >= 0 and row["model"] == "painter" for row in result["texts"])
    again = call(capsys, *words, "--out", str(tmp_path / "two"), "steps=2")
    pictures = [[np.asarray(Image.open(row["file"])) for row in each["texts"]] for each in (result, again)]
    np.testing.assert_array_equal(*pictures)
    assert (pictures[0][0] != pictures[0][1]).any()


def test_prior_and_decoder_dream_vary_and_inpaint(runs, tmp_path, capsys):
    models = [f"{runs}/dalle2_prior", f"{runs}/dalle2_decoder"]
    words = ["--clip", f"{runs}/judge", "--seed", "3", "steps=2"]
    dreamt = call(capsys, "generate", *models, *words, "--prompt", "a red circle", "--out", str(tmp_path / "dream"))
    (row,) = dreamt["texts"]
    assert row["model"] == "dalle2_prior + dalle2_decoder"
    side = Image.open(row["file"]).width
    picture = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    keep = np.zeros((side, side), np.uint8)
    keep[: side // 2] = 255
    Image.fromarray(picture).save(tmp_path / "in.png")
    Image.fromarray(keep).save(tmp_path / "keep.png")
    source = ["--init-image", str(tmp_path / "in.png")]
    varied = call(capsys, "generate", models[1], *words, *source, "--samples-per-prompt", "2", "--out", str(tmp_path / "vary"))
    one, other = (np.asarray(Image.open(each["file"])) for each in varied["texts"])
    assert (one != other).any()
    call(
        capsys,
        "generate",
        *models,
        *words,
        *source,
        "--mask",
        str(tmp_path / "keep.png"),
        "--prompt",
        "a star",
        "--out",
        str(tmp_path / "mask"),
    )
    (made,) = (np.asarray(Image.open(path)) for path in (tmp_path / "mask").glob("*.png"))
    np.testing.assert_array_equal(made[keep > 0], picture[keep > 0])
    found = call(capsys, "evaluate", *models, "--clip", f"{runs}/judge", "--pictures", "4", "--samples", "4", "--shards", f"{runs}/shards",
                 "--embeddings", f"{runs}/emb", "steps=2")["pictures"]["models"]  # fmt: skip
    assert [model["model"] for model in found] == ["dalle2_prior + dalle2_decoder"]


def test_evaluate_puts_the_base_beside_the_fine_tuned_in_one_log(runs, tmp_path, capsys):
    log = tmp_path / "log.csv"
    words = ["evaluate", f"{runs}/painter", f"{runs}/lora", "--clip", f"{runs}/judge", "--pictures", "6", "--log", str(log), "steps=2"]
    result = call(capsys, *words, "--samples", "8")
    models = result["pictures"]["models"]
    assert [model["model"] for model in models] == ["painter", "lora (base)", "lora"]
    assert all({"clip_score", "cmmd", "fid_clip", "caption_match", "flagged_share"} <= model.keys() for model in models)
    assert len(read_metadata(runs / "lora" / "evaluation" / "pictures")) == 6
    with log.open(newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["painter", "lora (base)", "lora"]
    assert log.with_suffix(".html").read_text().count("data:image/jpeg") == 6
