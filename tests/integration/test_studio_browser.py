"""The studio in a real browser, on small trained runs: each tab as a person would use it, errors, cancel, two users at once."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from support_browser import Browser, chromium
from support_runs import make_shards
from support_studio import draw, finish, green_ramp, message, pictures_in

from diptych.config import apply_overrides, load_recipe
from diptych.datasets.manifest import open_manifest
from diptych.pipelines import studio
from diptych.pipelines.local import train_here
from diptych.trainers.picture_files import read_about, read_metadata

pytestmark = pytest.mark.browser


def train(folder: Path, shards: Path, task: str, *overrides: str) -> str:
    config = apply_overrides(load_recipe(task, "smoke"), [f"data.shards={shards}", "train.steps=3", *overrides])
    train_here(config, folder / task)
    return str(folder / task)


def embeddings(shards: Path, folder: Path) -> Path:
    """A text embedding for each caption, as clip-retrieval lays them out."""
    manifest = open_manifest(str(shards))
    table = manifest.rows(np.arange(manifest.samples), ["key", "caption"])
    for part in ("text_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    vectors = np.random.default_rng(0).normal(size=(manifest.samples, 8)).astype(np.float16)
    np.save(folder / "text_emb" / "text_emb_0.npy", vectors)
    about = pd.DataFrame({"image_path": table["key"].to_pylist(), "caption": table["caption"].to_pylist()})
    about.to_parquet(folder / "metadata" / "metadata_0.parquet")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The studio on a run of each task that it knows."""
    shards = make_shards(folder / "shards")
    runs = [
        train(folder, shards, "gpt2", "task.tokenizer=train:128"),
        train(folder, shards, "coca"),
        train(folder, shards, "clip_vit", f"data.embeddings={embeddings(shards, folder / 'emb')}"),
        train(folder, shards, "stable_diffusion", "validation.samples=0"),
    ]
    opened = studio.run(runs, out=str(folder / "pictures"), device="cpu", block=False)
    yield opened["address"]
    opened["app"].close()


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Browser]:
    with chromium() as opened:
        opened.open(address)
        yield opened


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return green_ramp(tmp_path / "picture.png")


def test_tabs_are_what_the_runs_can_do(browser: Browser) -> None:
    tabs = browser.wait(lambda: [e.text for e in browser.driver.find_elements(By.CSS_SELECTOR, "button[role=tab]") if e.text])
    assert tabs == ["Keywords", "Dream", "Variation", "Inpaint", "Prompt from picture", "Gallery"]
    requests = browser.driver.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    assert len(requests) > 5
    assert not [url for url in requests if not url.startswith(("http://127.0.0.1", "data:", "blob:"))], "nothing from elsewhere"


def test_keywords_become_a_prompt_and_its_picture(browser: Browser, folder: Path) -> None:
    browser.tab("Keywords")
    browser.type("complete-prompt", "a red circle")
    browser.find("complete-start").click()
    browser.wait(lambda: "seed" in browser.text("complete-status"))
    assert browser.value("complete-text").startswith("a red circle")
    finish(browser, "keywords", folder, 1)
    browser.wait(lambda: pictures_in(browser, "keywords-pictures") == 1)
    browser.screenshot("studio-keywords")
    assert browser.errors() == []


def test_a_dream_can_be_made_again_from_its_seed(browser: Browser, folder: Path) -> None:
    browser.tab("Dream")
    browser.type("dream-prompts", "a red circle above a blue star\na green ring")
    browser.type("dream-seed", "77", "input")
    for _ in range(2):
        assert "seeds from 77" in finish(browser, "dream", folder, 4)
    browser.wait(lambda: pictures_in(browser, "dream-pictures") == 4)
    browser.screenshot("studio-dream")
    lines = [line for line in read_metadata(folder / "pictures") if line["seed"] in range(77, 81)]
    assert [line["seed"] for line in lines] == [77, 78, 79, 80] * 2
    files = [(folder / "pictures" / line["file_name"]) for line in lines]
    for one, other in zip(files[:4], files[4:], strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
    assert browser.errors() == []


def test_mistakes_are_told_on_the_page(browser: Browser, tmp_path: Path) -> None:
    browser.tab("Dream")
    browser.type("dream-prompts", " ")
    browser.find("dream-start").click()
    assert "1 to 8 lines" in message(browser)
    browser.type("dream-prompts", "\n".join(f"prompt {number}" for number in range(9)))
    browser.find("dream-start").click()
    assert "received 9" in message(browser)
    browser.tab("Variation")
    browser.find("vary-start").click()
    assert "a picture" in message(browser)
    (tmp_path / "notes.png").write_text("this is no picture")
    browser.inside("vary-picture", "input[type=file]").send_keys(str(tmp_path / "notes.png"))
    browser.find("vary-start").click()
    assert "cannot be decoded" in message(browser)
    browser.tab("Inpaint")
    browser.find("inpaint-start").click()
    assert "draw over what is to be painted anew" in message(browser).lower()
    browser.screenshot("studio-mistake")
    browser.errors()  # a refused upload is told by the browser too


def test_a_variation_and_an_inpainting_of_an_uploaded_picture(browser: Browser, picture: Path, folder: Path) -> None:
    browser.driver.refresh()
    browser.tab("Variation")
    browser.upload("vary-picture", picture)
    finish(browser, "vary", folder, 2)
    browser.screenshot("studio-variation")
    draw(browser, picture)
    finish(browser, "inpaint", folder, 2)
    browser.screenshot("studio-inpaint")
    lines = read_metadata(folder / "pictures")
    assert [line["mode"] for line in lines[-4:]] == ["variation", "variation", "inpaint", "inpaint"]
    one, other = (np.asarray(Image.open(folder / "pictures" / line["file_name"])).astype(int) for line in lines[-2:])
    kept = (one == other).all(axis=2).mean()
    assert 0.05 < kept < 0.98, "two seeds differ where the mask was drawn, and agree elsewhere"
    assert browser.errors() == []


def test_a_picture_is_read(browser: Browser, picture: Path) -> None:
    browser.tab("Prompt from picture")
    browser.upload("read-picture", picture)
    browser.find("read-start").click()
    browser.wait(lambda: "background" in browser.text("read-prompts"))
    browser.screenshot("studio-read")
    assert browser.errors() == []


def test_the_gallery_shows_settings_and_gives_the_file(browser: Browser) -> None:
    browser.tab("Gallery")
    browser.wait(lambda: pictures_in(browser, "gallery-pictures") >= 4)
    browser.wait(lambda: next(iter(browser.driver.find_elements(By.CSS_SELECTOR, "#gallery-pictures button.thumbnail-lg")), None)).click()
    browser.wait(lambda: "seed" in browser.text("gallery-about"))
    link = browser.wait(lambda: browser.driver.find_elements(By.ID, "gallery-one"))
    assert link
    browser.screenshot("studio-gallery")
    assert browser.errors() == []


def test_a_cancelled_dream_keeps_what_was_made(browser: Browser, folder: Path) -> None:
    browser.tab("Dream")
    browser.type("dream-prompts", "\n".join(f"a red circle {number}" for number in range(8)))
    browser.type("dream-seed", "500", "input")
    browser.find("dream-start").click()
    browser.wait(lambda: "seed 500" in browser.text("dream-status") or "seeds from 500" in browser.text("dream-status"))
    browser.find("dream-cancel").click()
    browser.wait(lambda: "Cancelled" in browser.text("dream-status"))
    time.sleep(2)
    made = sum(500 <= line["seed"] < 516 for line in read_metadata(folder / "pictures"))
    assert made < 16
    assert browser.errors() == []


def test_two_users_at_once_get_their_own_pictures(browser: Browser, address: str, folder: Path) -> None:
    with chromium() as second:
        second.open(address)
        users = ((browser, "a red circle", 900), (second, "a blue star", 950))
        for user, prompt, seed in users:
            user.tab("Dream")
            user.type("dream-prompts", prompt)
            user.type("dream-seed", str(seed), "input")
        for user, _, _ in users:
            user.find("dream-start").click()
        for user, prompt, seed in users:
            user.wait(functools.partial(lambda user, seed: f"s, seeds from {seed}" in user.text("dream-status"), user, seed))
            found = [line for line in read_metadata(folder / "pictures") if line["seed"] in (seed, seed + 1)]
            assert [line["prompt"] for line in found] == [prompt, prompt]
            assert read_about(folder / "pictures" / found[0]["file_name"])["seed"] == seed
        assert second.errors() == []
    assert browser.errors() == []
