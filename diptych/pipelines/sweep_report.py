"""What a sweep ends with: a table, one self-contained page of plots, and for tasks that show pictures a grid of them.

Everything is read from the sweep's folder and its trials' run folders, so it can be made again at any time.
"""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from typing import Any

from diptych.pipelines.report import environment
from diptych.pipelines.sweep_plots import importance, importance_plot, metric_plot, parallel_plot
from diptych.pipelines.sweep_record import Definition, SweepFolder, TrialRecord, ranked, values_of


def table(definition: Definition, trials: list[TrialRecord]) -> tuple[list[str], list[list[Any]]]:
    """(columns, a row per trial), best first, those without a value last."""
    keys = list(definition.space.parameters)
    columns = ["trial", "status", "step", definition.metric, "at step", *keys]
    columns += ["cloned"] if definition.space.method == "pbt" else []
    best = ranked(trials, definition.mode)
    rows = []
    for trial in [*best, *[trial for trial in trials if trial not in best]]:
        # A trial that failed does not count, whatever it reached before.
        value = f"{trial.value:.5g}" if trial in best and trial.value is not None else trial.error
        row = [trial.name, trial.status, trial.step, value, trial.best_step, *[_cell(trial.parameters[key]) for key in keys]]
        if definition.space.method == "pbt":
            row.append(", ".join(f"{clone['donor']} at {clone['step']}" for clone in trial.clones))
        rows.append(row)
    return columns, rows


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(definition: Definition, folder: SweepFolder) -> Path:
    """Write `table.csv`, `sweep.html` and, where trials have pictures, `grid.jpg`; returns the page's path."""
    columns, rows = table(definition, folder.trials)
    with (folder.path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    grid = _write_grid(definition, folder)
    curves = {trial.name: values_of(folder.run_dir(trial.name), definition.metric) for trial in folder.trials}
    known = ranked(folder.trials, definition.mode)
    weights = importance(definition.space.parameters, known)
    page = (
        environment()
        .get_template("sweep.html")
        .render(
            title=f"Sweep {definition.name}",
            lead=f"{len(folder.trials)} trials of {definition.base.task.name} by {definition.space.method}; compared by "
            f"{definition.metric}, {definition.mode} is better. {sum(trial.samples for trial in folder.trials):,} samples in {folder.seconds:.0f} s.",
            table={"title": "Trials, best first", "columns": columns, "rows": rows},
            plots=[
                parallel_plot(definition, known),
                metric_plot(definition.metric, curves, known[0].name if known else ""),
                importance_plot(weights),
            ],
            grid=_data_uri(grid) if grid else "",
            best=(folder.path / "best.json").read_text() if known else "",
        )
    )
    (folder.path / "sweep.html").write_text(page)
    return folder.path / "sweep.html"


def _data_uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


def _newest_picture(run_dir: Path) -> Path | None:
    """The first of the pictures that the newest validation left."""
    found = sorted((run_dir / "samples").glob("step_*.jpg"), key=lambda path: (-int(path.stem.split("_")[1]), path.name))
    return found[0] if found else None


def _write_grid(definition: Definition, folder: SweepFolder) -> Path | None:
    """The newest samples of every trial: two swept keys as rows and columns, else a row of labelled cells."""
    from diptych.pipelines.sweep_pictures import Cell, compose

    keys = [key for key, domain in definition.space.parameters.items() if domain.kind == "choice"]
    down, across = (keys[0], keys[1]) if len(keys) == len(definition.space.parameters) == 2 else ("", "")
    cells = []
    for number, trial in enumerate(folder.trials):
        place = (number // 4, number % 4)
        if across:
            values = definition.space.parameters
            place = (values[down].values.index(trial.parameters[down]), values[across].values.index(trial.parameters[across]))
        lines = [f"{key.rpartition('.')[2]} {_cell(value)}" for key, value in trial.parameters.items()]
        value = f"{definition.metric} {trial.value:.4g}" if trial.value is not None else trial.status
        cells.append(Cell(*place, _newest_picture(folder.run_dir(trial.name)), [f"{trial.name} · {value}", *lines]))
    if not any(cell.picture for cell in cells):
        return None
    sheet = compose(cells)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=90)
    (folder.path / "grid.jpg").write_bytes(buffer.getvalue())
    return folder.path / "grid.jpg"
