"""The studio in a real browser on a prior with a decoder: guidance of each stage, prompts, variations, inpainting, scores by their CLIP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from support_browser import Browser, chromium
from support_runs import embed_shards, make_shards
from support_studio import draw, finish, green_ramp, pictures_in

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines import export, studio
from diptych.pipelines.local import train_here
from diptych.trainers.picture_files import read_about, read_metadata

pytestmark = pytest.mark.browser
SIDE = 16
"""Of what the second U-Net paints, in pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("dalle2")


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Browser]:
    """The studio on a prior and a decoder of two U-Nets, with the exported CoCa that they learned from."""
    shards = make_shards(folder / "shards")
    common = [f"data.shards={shards}", "train.steps=3", "validation.samples=0"]
    train_here(apply_overrides(load_recipe("coca", "smoke"), common), folder / "judge")
    export.run(str(folder / "judge"))
    vectors = embed_shards(shards, str(folder / "judge" / "export"), folder / "emb")
    for task in ("dalle2_prior", "dalle2_decoder"):
        train_here(apply_overrides(load_recipe(task, "smoke"), [*common, f"data.embeddings={vectors}"]), folder / task)
    runs = [str(folder / "dalle2_prior"), str(folder / "dalle2_decoder")]
    opened = studio.run(runs, clip=str(folder / "judge"), out=str(folder / "pictures"), device="cpu", block=False)
    with chromium() as window:
        window.open(opened["address"])
        yield window
    opened["app"].close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return green_ramp(tmp_path / "picture.png")


def pixels_of(folder: Path, line: dict) -> np.ndarray:
    return np.asarray(Image.open(folder / "pictures" / line["file_name"])).astype(int)


def test_each_stage_begins_at_its_own_guidance(browser: Browser) -> None:
    browser.tab("Dream")
    labels = browser.wait(lambda: [e.text for e in browser.driver.find_elements(By.TAG_NAME, "label") if e.text.startswith("Guidance")])
    stages = ("prior", "base", "upsampler")
    assert labels == [f"Guidance: {stage} (1: none)" for stage in stages]
    assert [browser.slider(f"Guidance: {stage}").get_attribute("value") for stage in stages] == ["1", "1", "1"]
    assert browser.errors() == []


def test_a_dream_is_scored_and_can_be_made_again_and_guidance_changes_it(browser: Browser, folder: Path) -> None:
    browser.tab("Dream")
    browser.type("dream-prompts", "a red circle above a blue star")
    browser.type("dream-seed", "11", "input")
    for guidance in ("3", "3", "1"):
        browser.slide("Guidance: base", guidance)
        finish(browser, "dream", folder, 2)
    browser.wait(lambda: pictures_in(browser, "dream-pictures") == 2)
    browser.screenshot("studio-dalle2-dream")
    lines = read_metadata(folder / "pictures")[-6:]
    assert [line["seed"] for line in lines] == [11, 12] * 3
    assert all(np.isfinite(line["clip_score"]) for line in lines)
    first, again, unguided = (np.stack([pixels_of(folder, line) for line in lines[start : start + 2]]) for start in (0, 2, 4))
    assert first.shape == (2, SIDE, SIDE, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != unguided).any()
    assert read_about(folder / "pictures" / lines[-1]["file_name"])["guidance"] == [1, 1, 1]
    assert browser.errors() == []


def test_variations_with_and_without_words(browser: Browser, picture: Path, folder: Path) -> None:
    browser.tab("Variation")
    browser.upload("vary-picture", picture)
    finish(browser, "vary", folder, 2)
    browser.type("vary-prompt", "a green ring")
    finish(browser, "vary", folder, 2)
    browser.screenshot("studio-dalle2-variation")
    lines = read_metadata(folder / "pictures")[-4:]
    assert [(line["mode"], line["prompt"]) for line in lines] == [("variation", "")] * 2 + [("variation", "a green ring")] * 2
    assert browser.errors() == []


def test_inpainting_keeps_what_was_not_drawn_over(browser: Browser, picture: Path, folder: Path) -> None:
    draw(browser, picture)
    finish(browser, "inpaint", folder, 2)  # without words the picture's own embedding leads
    browser.type("inpaint-prompt", "a red circle")
    finish(browser, "inpaint", folder, 2)
    browser.screenshot("studio-dalle2-inpaint")
    one, other = (pixels_of(folder, line) for line in read_metadata(folder / "pictures")[-2:])
    kept = (one == other).all(axis=2)
    assert 0.05 < kept.mean() < 0.98, "two seeds differ where the mask was drawn, and agree elsewhere"
    # The middle square of the upload, three of its pixels for one, in the corners that no stroke reached.
    greens = np.asarray(Image.open(picture))[0, 8:56, 1].reshape(SIDE, 3).mean(axis=1)
    for column in (0, SIDE - 1):
        np.testing.assert_allclose(one[0, column], (0, greens[column], 0), atol=12)
    assert browser.errors() == []
