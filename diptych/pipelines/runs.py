"""`diptych runs`: the run folders under a folder, what became of each, and MLflow set right about runs that died."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.config import ConfigError
from diptych.pipelines import runs_compare, runs_folder, tracking
from diptych.pipelines.console import finish, note, show_table
from diptych.pipelines.options import AsJson
from diptych.redaction import without_credentials

_DEPTH = 3
"""Folders between `output` and a run: a sweep keeps its trials in a folder of its own."""


def run(output: str = "runs", tracking_uri: str = "") -> dict[str, Any]:
    """`runs: [{name, run_dir, task, status, step, steps, metrics, run_id, tracking_uri}]`, newest last, and `ended`.

    `status` is `prepared`, `running`, `interrupted` (its driver is dead; the same name resumes it), `stopped`, `killed`, `failed`,
    `early_stopped` or `finished`. `ended` holds the ids of MLflow runs that were still RUNNING although their driver is dead, in
    the stores that the runs name and in `tracking_uri`; they are caught up and ended. `unreachable` holds stores that did not answer.
    """
    folder = Path(output)
    if not folder.is_dir():
        raise ConfigError("OUTPUT", output, "a folder that holds runs", "Runs stand under `output`, by default ./runs.")
    found = [_describe(run_dir, folder) for run_dir in _run_folders(folder, _DEPTH)]
    found.sort(key=lambda facts: facts.pop("changed"))
    ended, unreachable = _reconcile({facts["tracking_uri"] for facts in found} | {tracking_uri})
    shown = [facts | {"tracking_uri": without_credentials(facts["tracking_uri"])} for facts in found]
    return {"runs": shown, "ended": ended, "unreachable": unreachable}


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.json").is_file():
        yield folder
    elif depth:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from _run_folders(inner, depth - 1)


def _describe(run_dir: Path, output: Path) -> dict[str, Any]:
    config_file = run_dir / "config.json"
    driver = runs_folder.read_driver(run_dir)
    status = driver.get("status", "prepared")
    if status == "running" and tracking.driver_is_gone(driver.get("driver", "")):
        status = "interrupted"
    facts: dict[str, Any] = {
        "name": str(run_dir.relative_to(output)) if run_dir != output else run_dir.name,
        "run_dir": str(run_dir.absolute()),
        "status": status,
        "run_id": driver.get("run_id", ""),
        "tracking_uri": driver.get("uri", ""),
        "changed": config_file.stat().st_mtime,
    }
    facts |= _reached(run_dir)
    # Read as plain JSON: an old run with a key that is gone since must not hide the others.
    try:
        stored = json_module.loads(config_file.read_text())
        return facts | {"task": stored["task"]["name"], "steps": stored["train"]["steps"]}
    except (json_module.JSONDecodeError, KeyError, TypeError):
        return facts | {"task": "", "steps": 0, "status": "unreadable config.json"}


def _reached(run_dir: Path) -> dict[str, Any]:
    """The last logged step of the history that counts, and the newest value of every figure."""
    from diptych.trainers.journal import read_metrics

    metrics: dict[str, float] = {}
    step = 0
    for line in read_metrics(runs_folder.records(run_dir)):
        step, metrics = line["step"], metrics | line["metrics"]
    return {"step": step, "metrics": metrics}


def _reconcile(stores: set[str]) -> tuple[list[str], list[str]]:
    """End dead runs in each store that exists; a store that does not answer is named, not waited for."""
    ended: list[str] = []
    unreachable: list[str] = []
    for uri in sorted(stores - {""}):
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            unreachable.append(uri)
            continue
        try:
            ended += tracking.reconcile(tracking.tracking_uri(uri))
        except ConfigError:
            raise
        except Exception as error:  # The run folders are the record; a server that is away must not hide them.
            note(f"{without_credentials(uri)} does not answer: {tracking.explain(error, uri)}")
            unreachable.append(without_credentials(uri))
    return ended, unreachable


_SHOWN = ("train/loss", "val/loss", "train/samples_per_second")


def report(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    head = ["name", "task", "status", "step", *_SHOWN, "MLflow run"]
    rows = [head]
    for facts in result["runs"]:
        metrics = [f"{facts['metrics'][key]:.4g}" if key in facts["metrics"] else "" for key in _SHOWN]
        step = f"{facts['step']}/{facts['steps']}"
        rows.append([facts["name"], facts["task"], facts["status"], step, *metrics, facts["run_id"]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if result["ended"]:
        lines += ["", f"ended in MLflow, because their driver is dead: {', '.join(result['ended'])}"]
    interrupted = [facts["name"] for facts in result["runs"] if facts["status"] == "interrupted"]
    if interrupted:
        lines += ["", f"interrupted: {', '.join(interrupted)}. `diptych train TASK --config RUN/config.json name=NAME` resumes one."]
    return "\n".join(lines)


def command(
    output: Annotated[str, typer.Argument(help="folder that holds the runs")] = "runs",
    *,
    compare: Annotated[list[str] | None, typer.Option(metavar="RUN", help="show where runs differ, and their figures (repeatable)")] = None,
    open_run: Annotated[str, typer.Option("--open", metavar="RUN", help="open the run's page in MLflow")] = "",
    tracking_uri: Annotated[str, typer.Option(help="another MLflow store to set right; default: those that the runs name")] = "",
    json: AsJson = False,
) -> None:
    """List runs with status, step and metrics, compare some, or open one; end in MLflow what died without a word.

    Example: diptych runs --compare first --compare second
    """
    result = run(output, tracking_uri)
    if compare:
        result |= {"compared": compare, **runs_compare.compare(runs_compare.chosen(result["runs"], compare))}
        for kind in ("configuration", "metrics"):
            show_table(kind, ["key", *compare], [[key, *values] for key, values in result[kind].items()])
    elif open_run:
        result |= runs_compare.page(runs_compare.chosen(result["runs"], [open_run])[0])
        if not json:
            runs_compare.show({key: result[key] for key in ("url", "command")})
    elif not json:
        print(report(result) if result["runs"] else f"no runs under {output}")
    finish(result, json)


if __name__ == "__main__":
    from diptych.cli import main

    main(["runs", *sys.argv[1:]])
