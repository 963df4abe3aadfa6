"""The report of runs and the model log as people open them: files, no network, desktop and phone, light and dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support_browser import Browser, chromium
from support_runs import make_shards

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines import evaluate, report
from diptych.pipelines.evaluate_pictures import write_log
from diptych.pipelines.local import train_here
from diptych.pipelines.samples import write_grid
from diptych.trainers.picture_files import save_picture

pytestmark = pytest.mark.browser
_CONTRAST = """
const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
const style = getComputedStyle(document.body);
const [one, other] = [light(rgb(style.color)), light(rgb(style.backgroundColor))];
return [(Math.max(one, other) + .05) / (Math.min(one, other) + .05), light(rgb(style.backgroundColor))];
"""
"""Contrast of the text with the page (WCAG's formula), and the page's luminance."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    shards = make_shards(folder / "shards")
    runs = []
    for name, rate in (("first", "0.001"), ("second", "0.003")):
        overrides = [f"data.shards={shards}", "train.steps=12", "validation.every_steps=6", f"optim.lr={rate}"]
        train_here(apply_overrides(load_recipe("coca", "smoke"), overrides), folder / name)
        runs.append(str(folder / name))
    evaluate.run(runs[:1], track=False)
    report.run(runs, str(folder / "report.html"))
    pictures = np.random.default_rng(0).integers(0, 255, (25, 32, 32, 3), np.uint8)
    for name in ("prompts.jpg", "seeds.jpg"):
        write_grid(folder / name, pictures, 5)
    save_picture(folder, pictures[0], {"prompt": "a red boat", "seed": 1})
    row = {"model": "painter", "checkpoint": "step_1", "clip_score": 31.25, "folder": str(folder)}
    write_log(folder / "model_log.csv", [row, row | {"model": "painter (base)", "clip_score": 22.5}])
    return {"report": folder / "report.html", "model_log": folder / "model_log.html"}


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.mark.parametrize("page", ["report", "model_log"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 900, False), (390, 844, True)], ids=["desktop", "phone"])
def test_a_page_is_whole_and_fits(browser: Browser, pages, page: str, dark: bool, width: int, height: int, phone: bool) -> None:
    browser.emulate(width, height, dark=dark, phone=phone)
    browser.open(pages[page].as_uri())
    script = browser.driver.execute_script
    assert script("return document.documentElement.scrollWidth") <= width, "nothing scrolls sideways but what is meant to"
    pictures = script("return [...document.images].map(each => [each.complete, each.naturalWidth])")
    assert len(pictures) >= 4
    assert all(complete and natural > 0 for complete, natural in pictures)
    assert script("return performance.getEntriesByType('resource').filter(each => !each.name.startsWith('data:')).length") == 0
    contrast, luminance = script(_CONTRAST)
    assert contrast > 7
    assert (luminance < 0.2) == dark
    if page == "report":
        assert script("return document.querySelectorAll('svg').length") >= 4, "curves of two runs"
        assert "second" in script("return document.body.innerText")
    browser.screenshot(f"{page}-{'phone' if phone else 'desktop'}-{'dark' if dark else 'light'}")
    assert browser.errors() == []
