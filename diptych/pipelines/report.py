"""`diptych report`: one self-contained HTML page of runs: figures, curves, pictures, throughput, bad samples, configuration.

Everything is read from the run folders, so a report needs no tracking server; it opens from a file, in light and dark, on a phone.
"""

from __future__ import annotations

import base64
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.config import RunConfig
from diptych.pipelines.console import finish, note
from diptych.pipelines.options import AsJson

_SHOWN = 24
"""Samples with their pictures, per run."""
_HEADLINES = ("loss", "image_to_text_r1", "cosine_image_predicted", "exact_match", "accuracy", "perplexity")
"""Figures of an evaluation that stand on top, where a run has them."""


@dataclass(frozen=True)
class Figure:
    """A headline: a value, what it should reach, and what it is to be compared with."""

    name: str
    value: float
    target: str = ""
    reached: bool = True
    baseline: str = ""


def run(runs: Sequence[str], out: str = "report.html") -> dict[str, Any]:
    """Write the report of `runs` (folders, or names under `runs`) to `out`; returns `report, runs`."""
    from diptych.pipelines.runs_folder import find_run

    folders = [find_run(name) for name in runs]
    figures = [figure for folder in folders for figure in _headlines(folder)]
    lead = "Figures of diptych evaluate where it was run, curves and samples of training." if figures else "Curves and samples of training."
    write(Path(out), "Diptych: " + ", ".join(folder.name for folder in folders), lead, folders, figures)
    return {"report": str(Path(out).absolute()), "runs": [str(folder) for folder in folders]}


def write(path: Path, title: str, lead: str, runs: Sequence[Path], figures: Sequence[Figure] = (), closing: str = "") -> None:
    """Write one page: `figures` on top, a section for each run folder, and `closing` as the last words."""
    page = (
        environment()
        .get_template("report.html")
        .render(title=title, lead=lead, figures=figures, runs=[_section(folder) for folder in runs], closing=closing)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def render_tables(title: str, about: dict[str, Any], tables: Sequence[dict[str, Any]]) -> str:
    """A page of tables (`title`, `columns`, `rows`)."""
    return environment().get_template("tables.html").render(title=title, about=about, tables=tables)


def render_model_log(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """A page of models: a table of `columns`, and the `grids` (`title`, `data`) and `prompts` of each row."""
    return environment().get_template("model_log.html").render(title="Model log", columns=columns, rows=rows)


def environment() -> Any:
    """Templates of the pages that are written here and elsewhere."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    environment.filters["figure"] = lambda value: f"{value:.4g}" if isinstance(value, float) else value
    return environment


def _headlines(run_dir: Path) -> list[Figure]:
    return [Figure(f"{run_dir.name}: {name}", value) for name, value in _evaluated(run_dir).items() if name in _HEADLINES]


def _evaluated(run_dir: Path) -> dict[str, float]:
    stored = run_dir / "evaluation" / "metrics.json"
    return json.loads(stored.read_text()) if stored.is_file() else {}


def _section(run_dir: Path) -> dict[str, Any]:
    from diptych.datasets.ledger import read_ledger, summary
    from diptych.pipelines.runs_folder import read_driver, records
    from diptych.trainers.journal import read_metrics

    config = RunConfig.from_json((run_dir / "config.json").read_text())
    driver, lines = read_driver(run_dir), read_metrics(records(run_dir))
    facts = driver.get("facts", {})
    tables = run_dir / "evaluation" / "tables.json"
    found = json.loads(tables.read_text())["tables"] if tables.is_file() else []
    return {
        "name": run_dir.name,
        "task": config.task.name,
        "status": driver.get("status", "unknown"),
        "step": lines[-1]["step"] if lines else 0,
        "digest": str(driver.get("digest", ""))[:16],
        "samples_known": f"{facts['train_samples']:,} samples, {facts['validation_samples']:,} held out"
        if "train_samples" in facts
        else "",
        "rates": _rates(lines, config),
        "curves": _curves(lines),
        "shown": _shown(run_dir),
        # The captions of the evaluation stand with their pictures already.
        "tables": [one for one in found if len(one["rows"]) <= 40 and one["columns"] != ["true", "made"]],
        "ledger": summary(read_ledger(records(run_dir))),
        "config": config.to_json(public=True),
    }


def _rates(lines: list[dict[str, Any]], config: RunConfig) -> list[dict[str, str]]:
    """Throughput over the logged lines, the first left out: it holds the workers' warm-up."""

    def mean(name: str) -> float | None:
        values = [line["metrics"][name] for line in lines if name in line["metrics"]]
        values = values[1:] or values
        return sum(values) / len(values) if values else None

    samples, waiting, mfu = mean("train/samples_per_second"), mean("train/data_wait_share"), mean("train/mfu")
    rates = []
    if samples is not None:
        workers = f"{config.workers} worker{'' if config.workers == 1 else 's'}, {config.train.strategy}, waiting for data included"
        rates.append({"name": "samples per second", "value": f"{samples:,.0f}", "note": workers})
    if waiting is not None:
        rates.append({"name": "time spent waiting for data", "value": f"{100 * waiting:.1f} %", "note": "share of the time of training"})
    if mfu is not None:
        rates.append({"name": "model FLOPs utilisation", "value": f"{100 * mfu:.1f} %", "note": "of the devices' peak"})
    return rates


def _curves(lines: list[dict[str, Any]]) -> list[str]:
    """An SVG for each figure that training or validation logged at two or more steps, train and validation in one."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for key, value in line["metrics"].items():
            side, _, name = key.partition("/")
            if name and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, {}).setdefault(side, []).append((line["step"], float(value)))
    left_out = ("samples_per_second", "tokens_per_second", "data_wait_share", "mfu", "step_seconds")
    shown = [name for name, sides in series.items() if name not in left_out and any(len(points) > 1 for points in sides.values())]
    return [_svg(name, series[name]) for name in shown]


@contextmanager
def styled_axes(title: str, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """(canvas, axes) of a plot of `size` inches in colours that stand on light and dark pages; `finished_svg` ends it within the block."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": title}):
        canvas = Canvas(figsize=size, layout="constrained")
        axes = canvas.subplots()
        axes.set_title(title, color="#808894")
        axes.tick_params(colors="#808894")
        axes.grid(alpha=0.25)
        for spine in axes.spines.values():
            spine.set_color("#808894")
        yield canvas, axes


def finished_svg(canvas: Any, name: str) -> str:
    """The drawing as SVG to stand in a page; `name` is its own among the drawings of that page."""
    drawn = io.StringIO()
    canvas.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    # Several drawings share a page, so the names of their clip paths must differ; the XML prologue does not belong in HTML.
    prefix = "c" + "".join(character for character in name if character.isalnum())
    text = text[text.index("<svg") :]
    return text.replace('id="', f'id="{prefix}-').replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'xlink:href="#{prefix}-')


def _svg(name: str, sides: dict[str, list[tuple[int, float]]]) -> str:
    with styled_axes(name.replace("_", " "), (4.2, 2.6)) as (canvas, axes):
        for side, points in sorted(sides.items()):
            steps, values = zip(*points, strict=True)
            style = {"marker": "o", "markersize": 3} if side == "val" else {"linewidth": 1.2}
            axes.plot(steps, values, label={"val": "held out", "train": "training"}.get(side, side), **style)
        axes.set_xlabel("step", color="#808894")
        if len(sides) > 1:
            axes.legend(frameon=False, labelcolor="#808894")
        return finished_svg(canvas, name)


def _shown(run_dir: Path) -> dict[str, Any] | None:
    """The newest table of samples with their pictures: the evaluation's, else that of the last validation."""
    tables = sorted((run_dir / "evaluation").glob("step_*.json")) or sorted((run_dir / "samples").glob("step_*.json"))
    if not tables:
        return None
    table = json.loads(tables[-1].read_text())
    pictures = _cut_grid(tables[-1].with_suffix(".jpg"), len(table["rows"]))
    samples = [
        {"picture": picture, "cells": list(zip(table["columns"], row, strict=True))}
        for picture, row in zip(pictures, table["rows"][:_SHOWN], strict=False)
    ]
    return {"title": f"{table['title']}, step {table['step']}", "samples": samples}


def _cut_grid(path: Path, count: int) -> list[str]:
    """Pictures of a grid that `samples.write_grid` wrote, as data URIs; empty strings where there is none."""
    from PIL import Image

    from diptych.pipelines.samples import grid_boxes

    if not path.is_file():
        return [""] * count
    found = []
    with Image.open(path) as sheet:
        for box in grid_boxes(sheet.size, count)[:_SHOWN]:
            data = io.BytesIO()
            picture = sheet.crop(box)
            # Small pictures are enlarged here: browsers would blur them.
            scale = max(1, 128 // picture.width)
            picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS).save(data, "JPEG", quality=88)
            found.append("data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode())
    return found


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run folders, or names under runs/")],
    *,
    out: Annotated[str, typer.Option(help="HTML file to write")] = "report.html",
    json: AsJson = False,
) -> None:
    """Write one self-contained HTML page of RUNs.

    Example: diptych report runs/coca-20250101-120000 --out report.html
    """
    result = run(runs, out)
    note(f"report: {result['report']}")
    finish(result, json)


if __name__ == "__main__":
    from diptych.cli import main

    main(["report", *sys.argv[1:]])
