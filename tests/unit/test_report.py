"""The report is one page that needs nothing else, and `evaluate` leaves files that people and programs can read."""

from __future__ import annotations

import csv
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.datasets import scenes
from diptych.datasets.shards import ShardWriter
from diptych.pipelines import demo, evaluate, report
from diptych.pipelines.local import train_here
from diptych.pipelines.report import Figure
from diptych.pipelines.samples import grid_boxes, write_grid


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CoCa of the smoke recipe, trained for a few steps on scenes of which one is broken."""
    folder = tmp_path_factory.mktemp("run")
    rows: list[dict[str, Any]] = list(scenes.samples(0, 0, 120, size=32))
    rows[5]["jpg"] = rows[5]["jpg"][:200]
    ShardWriter(str(folder / "shards"), 60).write_all(rows)
    overrides = [f"data.shards={folder / 'shards'}", f"output={folder}", "name=small <b>run</b>", "train.steps=16"]
    overrides += ["train.log_every=2", "validation.every_steps=8", "data.validation_share=0.2", "tracking.enabled=false"]
    config = apply_overrides(load_recipe("coca", "smoke"), overrides)
    run_dir = folder / "small"
    assert train_here(config, run_dir)["status"] == "finished"
    return run_dir


class Page(html.parser.HTMLParser):
    """What a page refers to, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> dict[str, Any]:
    """The evaluation of that run."""
    return evaluate.run([str(trained)], samples=12, checkpoint="newest")


def test_evaluate_measures_what_the_task_measures(evaluated: dict[str, Any], trained: Path) -> None:
    metrics = evaluated["metrics"]
    assert {"loss", "image_to_text_r1", "text_to_image_r10", "caption_accuracy", "bleu4", "exact_match"} <= set(metrics)
    assert (evaluated["runs"][0]["samples"], evaluated["runs"][0]["step"]) == (12, 16)
    stored = json.loads((trained / "evaluation" / "metrics.json").read_text())
    assert stored == metrics
    with (trained / "evaluation" / "table_00.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert {name: float(value) for name, value in rows[1:]} == pytest.approx(metrics)


def test_evaluating_the_same_samples_again_gives_the_same_figures(evaluated: dict[str, Any], trained: Path) -> None:
    assert evaluate.run([str(trained)], samples=12, checkpoint="newest")["metrics"] == evaluated["metrics"]


def test_the_loss_is_that_of_validation_in_the_loop(trained: Path) -> None:
    from diptych.trainers.journal import read_metrics

    logged = read_metrics(str(trained))[-1]["metrics"]
    found = evaluate.run([str(trained)], checkpoint="newest")["metrics"]
    assert found["loss"] == pytest.approx(logged["val/loss"], rel=1e-5)
    assert found["image_to_text_r1"] == pytest.approx(logged["val/image_to_text_r1"])


def test_other_shards_are_evaluated_whole(trained: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = list(scenes.samples(1, 0, 21, size=32))
    rows[3]["jpg"] = b"broken"
    ShardWriter(str(tmp_path / "other"), 60).write_all(rows)
    found = evaluate.run([str(trained)], str(tmp_path / "other"))
    assert found["runs"][0]["samples"] == 21
    assert [fault["kind"] for fault in found["faults"]] == ["undecodable_image"]


def test_a_run_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="RUN"):
        evaluate.run(["no-such-run"])


def test_the_report_is_one_page_that_needs_nothing_else(trained: Path, evaluated: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    report.run([str(trained)], str(out))
    text = out.read_text()
    page = Page(text)
    assert page.open == []
    outside = [link for link in page.links if not link.startswith(("data:", "#"))]
    assert outside == []
    assert not re.search(r"url\((?!#)", text)
    assert page.counts["svg"] >= 4  # loss, its two terms, retrieval
    shown = json.loads((trained / "evaluation" / "step_00000016.json").read_text())["rows"]
    assert page.counts["img"] == len(shown) >= 12
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for figure in ("samples per second", "time spent waiting for data", "Configuration"):
        assert figure in text


def test_ids_of_the_curves_do_not_clash(trained: Path, tmp_path: Path) -> None:
    report.run([str(trained)], str(tmp_path / "report.html"))
    text = (tmp_path / "report.html").read_text()
    curves = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    ids = [set(re.findall(r'id="([^"]+)"', curve)) for curve in curves]
    assert len(set().union(*ids)) == sum(map(len, ids))
    for curve, own in zip(curves, ids, strict=True):
        assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", curve)) <= own


def test_what_comes_from_data_is_escaped(trained: Path, tmp_path: Path) -> None:
    figures = [Figure("<script>alert(1)</script>", 0.5, "target: at least 0.7", reached=False, baseline="chance: 0.005")]
    report.write(tmp_path / "page.html", "a < b", "lead", [trained], figures, "mlflow ui")
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "<b>run</b>" not in text  # the run's name stands in its configuration
    assert "✗ target: at least 0.7" in text
    assert "chance: 0.005" in text


def test_the_demo_judges_figures_that_have_a_target(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("coca", "prior"):
        (tmp_path / "runs" / name).symlink_to(trained)
    figures = [Figure("first", 0.5, "at least 0.4"), Figure("second", 0.3, "at least 0.4", reached=False), Figure("third", 0.2)]
    assert demo._conclude(tmp_path, figures, [])["reached"] is False
    lines = "".join(capfd.readouterr()).splitlines()
    told = {name: next(line for line in lines if name in line) for name in ("first", "second", "third")}
    assert [("✓" in line, "missed" in line) for line in told.values()] == [(True, False), (False, True), (False, False)]


@pytest.mark.parametrize("count", [1, 8, 9, 24])
def test_a_grid_is_cut_back_into_its_pictures(count: int, tmp_path: Path) -> None:
    from PIL import Image

    pictures = np.stack([np.full((20, 24, 3), 10 * index, np.uint8) for index in range(count)])
    write_grid(tmp_path / "grid.png", pictures)
    with Image.open(tmp_path / "grid.png") as sheet:
        cut = [np.asarray(sheet.crop(box)) for box in grid_boxes(sheet.size, count)]
    assert all(np.array_equal(one, other) for one, other in zip(cut, pictures, strict=True))
