"""`diptych evaluate`: every figure of trained runs on held-out samples, as tables on the screen, in files and in MLflow.

What is measured is the task's own business (`validate`, `summarise`, `evaluate`): a new task needs nothing here. Runs in this
process, on one device.
"""

from __future__ import annotations

import csv
import functools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diptych.config import ConfigError, RunConfig, set_path
from diptych.pipelines.console import finish, note, progress, show_faults, show_table, would
from diptych.pipelines.options import AsJson, Averaged, Checkpoint, Device, DryRun

if TYPE_CHECKING:
    from diptych.batches import Fault
    from diptych.datasets.stream import StreamSpec
    from diptych.pipelines.evaluate_pictures import PictureEvaluation
    from diptych.pipelines.trained import Trained
    from diptych.trainers.task import Batch, Evaluation

_SHOWN, _SHOWN_PIXELS = 32, 128
"""Samples with their pictures, and the side of those."""


def run(
    runs: list[str],
    shards: str = "",
    *,
    embeddings: str = "",
    samples: int = 0,
    checkpoint: str = "best",
    averaged: bool = True,
    device: str = "auto",
    track: bool = True,
    pictures: PictureEvaluation | None = None,
) -> dict[str, Any]:
    """Evaluate each of `runs` (folders, or names under `runs`); returns `metrics, runs, faults, seconds`.

    With `pictures`, those of `runs` that paint also make pictures of held-out captions, and `pictures` of the result tells of them.

    Takes the run's held-out samples, as many as its validation (or `samples`), or all of `shards` (with `embeddings`).
    `metrics` are those of the only run, or of each by its name. Tables go to the run's `evaluation/` and, with `track`, to its
    MLflow run. Raises `ConfigError` for no such run, and for data that the task cannot use.
    """
    from diptych.pipelines.runs_folder import find_run

    started = time.monotonic()
    folders = [find_run(name) for name in runs]
    found = [_evaluate(folder, shards, embeddings, samples, checkpoint, averaged, _device(device), track) for folder in folders]
    metrics: dict[str, Any] = found[0]["metrics"] if len(found) == 1 else {each["run"]: each["metrics"] for each in found}
    faults = [fault for each in found for fault in each.pop("faults")]
    result: dict[str, Any] = {"metrics": metrics, "runs": found, "faults": faults}
    if pictures is not None:
        from diptych.pipelines import evaluate_pictures
        from diptych.pipelines.painters import painter_specs

        specs = painter_specs(folders, clip=pictures.clip, checkpoint=checkpoint, averaged=averaged, device=device)
        result["pictures"] = evaluate_pictures.run(specs, shards, pictures)
        for model in result["pictures"]["models"]:
            if track and model["checkpoint"]:
                figures = {name: value for name, value in model.items() if isinstance(value, float) and name != "lr"}
                run_dir = Path(model["folder"]).parents[1]
                _track(run_dir, Path(model["folder"]), figures, int(model["step"]), ("*.json", "*.jpg"))
    return result | {"seconds": time.monotonic() - started}


def plan(
    runs: list[str], shards: str = "", *, embeddings: str = "", samples: int = 0, checkpoint: str = "best", averaged: bool = True,
    device: str = "auto", track: bool = True, pictures: PictureEvaluation | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `run` would do with these arguments; no model is loaded and nothing is written. Raises `ConfigError` as `run` does."""
    from diptych.pipelines.runs_folder import find_run

    folders = [find_run(name) for name in runs]
    found = [_described(folder, shards, embeddings, samples, checkpoint, averaged) for folder in folders]
    result: dict[str, Any] = {"runs": found, "device": device, "track": track}
    if pictures is not None:
        from diptych.pipelines import evaluate_pictures
        from diptych.pipelines.painters import painter_specs

        specs = painter_specs(folders, clip=pictures.clip, checkpoint=checkpoint, averaged=averaged, device=device)
        result["pictures"] = evaluate_pictures.plan(specs, shards, pictures)
    return result


def _described(run_dir: Path, shards: str, embeddings: str, samples: int, checkpoint: str, averaged: bool) -> dict[str, Any]:
    """What would be evaluated of one run, with the first held-out caption."""
    import tempfile

    import numpy as np

    from diptych.pipelines.trained import described, read_config

    about, config = described(run_dir, checkpoint, averaged), read_config(run_dir)
    with tempfile.TemporaryDirectory() as inputs:
        spec = _spec(config, run_dir, Path(inputs), shards, embeddings, samples)
        caption = spec.source.opened().manifest.rows(spec.selection[np.array([0])], ["caption"])["caption"][0].as_py()
    about |= {"shards": shards or config.data.shards, "samples": min(spec.selection.samples, samples or spec.selection.samples)}
    return about | {"first caption": caption, "writes": str(_folder(run_dir, shards))}


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class HeldOut:
    """The held-out batches of a run, read anew at each pass."""

    spec: StreamSpec
    trained: Trained
    faults: dict[tuple[str, str, str], Fault]
    """By shard, key and kind: each is told once, however often the batches are read."""

    def __iter__(self) -> Iterator[Batch]:
        from diptych.datasets.stream import LocalStream
        from diptych.trainers.micro_batches import to_device

        device = next(self.trained.task.parameters()).device
        for share in LocalStream(self.spec, 0, 1, 0, None):
            self.note(0, share.faults)
            yield to_device(share.arrays, device)

    def note(self, _: int, faults: list[Fault]) -> None:
        """Remember faults."""
        self.faults |= {(fault.shard, fault.key, fault.kind): fault for fault in faults}


def held_out(trained: Trained, shards: str = "", embeddings: str = "", samples: int = 0) -> HeldOut:
    """The run's validation samples (at most `samples`; 0 = as many as its validation takes), or all samples of `shards`."""
    return HeldOut(_spec(trained.config, trained.run_dir, _folder(trained.run_dir, shards), shards, embeddings, samples), trained, {})


def _spec(config: RunConfig, run_dir: Path, folder: Path, shards: str, embeddings: str, samples: int) -> StreamSpec:
    """The stream of `held_out`, whose inputs go to `folder`."""
    from diptych.datasets.stream import StreamSpec
    from diptych.pipelines.prepare import prepare

    count = samples or config.validation.samples or 512
    if shards:
        for key, value in (("shards", shards), ("embeddings", embeddings), ("manifest", ""), ("keep", ()), ("validation_share", 0.0)):
            config = set_path(config, f"data.{key}", value)
        count = samples or sys.maxsize
    config = set_path(config, "validation.samples", count)
    config = set_path(config, "data.fault_budget", max(config.data.fault_budget, count))
    prepared = prepare(config, folder)
    spec = prepared.validation
    if shards:
        spec = StreamSpec.of(prepared.train.source, prepared.train.selection, prepared.config, finite=True)
    if spec is None:
        raise ConfigError("RUN", str(run_dir), "a run with held-out samples (data.validation_share above 0)", "Name others with --shards.")
    return spec


def _folder(run_dir: Path, shards: str) -> Path:
    """Where an evaluation is written: other shards do not replace the figures of the held-out samples."""
    name = Path(shards.rstrip("/")).name
    return run_dir / "evaluation" / f"on-{name}" if shards else run_dir / "evaluation"


def _evaluate(
    run_dir: Path, shards: str, embeddings: str, samples: int, checkpoint: str, averaged: bool, device: str, track: bool
) -> dict[str, Any]:
    from diptych.pipelines.trained import load_trained

    trained = load_trained(run_dir, checkpoint, averaged, device)
    batches = held_out(trained, shards, embeddings, samples)
    with progress(f"evaluating {run_dir.name}", None):
        metrics, evaluation = measure(trained, batches)
    about = {
        "run": run_dir.name,
        "task": trained.config.task.name,
        "checkpoint": trained.checkpoint,
        "step": trained.state["step"],
        "samples": batches.spec.selection.samples,
        "shards": shards or trained.config.data.shards,
    }
    folder = _folder(run_dir, shards)
    _write(folder, about, metrics, evaluation, batches)
    if track:
        _track(run_dir, folder, metrics, about["step"])
    return about | {
        "metrics": metrics,
        "tables": [table._asdict() for table in evaluation.tables],
        "faults": [asdict(fault) for fault in batches.faults.values()],
    }


def measure(trained: Trained, batches: HeldOut) -> tuple[dict[str, float], Evaluation]:
    """Figures of `Task.validate` and `Task.summarise` over the batches, and what `Task.evaluate` adds."""
    import torch

    from diptych.datasets.stream import LocalStream
    from diptych.trainers.strategies import make_strategy
    from diptych.trainers.validation import validate

    # One process, and the weights as they were loaded: no averaging on top.
    config = trained.config
    for key, value in (("train.strategy", "ddp"), ("train.offload", False), ("train.compile", False), ("optim.ema_decay", 0.0)):
        config = set_path(config, key, value)
    strategy = make_strategy(config, trained.task, next(trained.task.parameters()).device)
    figures, _ = validate(strategy, LocalStream(batches.spec, 0, 1, 0, None), config.seed, batches.note)
    trained.task.eval()
    with torch.no_grad():
        evaluation = trained.task.evaluate(batches)
    return {name.removeprefix("val/"): value for name, value in figures.items()} | evaluation.metrics, evaluation


def _write(folder: Path, about: dict[str, Any], metrics: dict[str, float], evaluation: Evaluation, batches: HeldOut) -> None:
    """`metrics.json`, `tables.json`, a csv per table, one HTML page, and pictures of the first batch with what the task shows."""
    import torch

    from diptych.batches import Needs
    from diptych.datasets.reader import read_rows
    from diptych.pipelines.report import render_tables
    from diptych.pipelines.samples import write_grid, write_samples

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    tables = [{"title": "Figures", "columns": ["figure", "value"], "rows": [list(item) for item in metrics.items()]}]
    tables += [table._asdict() for table in evaluation.tables]
    (folder / "tables.json").write_text(json.dumps({"about": about, "tables": tables}, indent=2, ensure_ascii=False, default=str))
    for number, table in enumerate(tables):
        with (folder / f"table_{number:02d}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([table["columns"], *table["rows"]])
    (folder / "evaluation.html").write_text(render_tables(f"Evaluation of {about['run']}", about, tables))
    first = _first(batches)
    with torch.no_grad():
        write_samples(folder, about["step"], batches.trained.task, first)
    need = batches.spec.needs.image
    if need is not None:
        # People see more in the pictures than the model is given.
        larger = Needs(image=replace(need, size=max(need.size, _SHOWN_PIXELS), flip=0.0, buckets=None))
        found = read_rows(batches.spec.source, first["row"].cpu().numpy(), first["slot"].cpu().numpy(), larger, batches.spec.seed)
        write_grid(folder / f"step_{about['step']:08d}.jpg", found.arrays["image"])


def _first(batches: HeldOut) -> Batch:
    """The first samples, as many as are shown, padding left out."""
    import torch

    taken: list[Batch] = []
    for batch in batches:
        rows = batch["weight"] > 0
        taken.append({key: value[rows] for key, value in batch.items()})
        if sum(len(part["weight"]) for part in taken) >= _SHOWN:
            break
    return {key: torch.cat([part[key] for part in taken])[:_SHOWN] for key in taken[0]}


def _track(run_dir: Path, folder: Path, metrics: dict[str, float], step: int, patterns: tuple[str, ...] = ("*",)) -> None:
    """Add the figures as `eval/…` (or `eval/on-…/…`) and the files to the run in MLflow; a server that is away costs a note."""
    from diptych.pipelines.runs_folder import read_driver

    driver = read_driver(run_dir)
    if not driver.get("run_id"):
        return
    from mlflow.entities import Metric

    from diptych.pipelines.tracking import client

    now = int(time.time() * 1000)
    prefix = "/".join(["eval", *folder.relative_to(run_dir / "evaluation").parts])
    try:
        store = client(driver["uri"])
        store.log_batch(driver["run_id"], metrics=[Metric(f"{prefix}/{name}", float(value), now, step) for name, value in metrics.items()])
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
            store.log_artifact(driver["run_id"], str(path), str(folder.relative_to(run_dir)))
    except Exception as error:
        note(f"not copied to MLflow ({error}); the evaluation stands in {folder}")


def command(
    arguments: Annotated[list[str], typer.Argument(metavar="RUN... [KEY=VALUE]...", help="run folders, or names under runs/; steps=30, …")],
    *,
    shards: Annotated[str, typer.Option(help="evaluate on all of these shards instead of the run's held-out samples")] = "",
    embeddings: Annotated[str, typer.Option(help="embeddings of those shards, for tasks that need them")] = "",
    samples: Annotated[int, typer.Option(help="samples at most; 0 = as many as the run's validation, or all of --shards")] = 0,
    checkpoint: Checkpoint = "best",
    averaged: Averaged = True,
    device: Device = "auto",
    track: Annotated[bool, typer.Option(help="add the figures to the run in MLflow")] = True,
    clip: Annotated[str, typer.Option(help="runs that paint: make pictures of held-out captions, judged by this CLIP")] = "",
    judge: Annotated[str, typer.Option(help="another CLIP that judges than the one that the prior and decoder know")] = "",
    pictures: Annotated[int, typer.Option(help="pictures at most")] = 100,
    seed: Annotated[int, typer.Option(help="seed of the first picture")] = 0,
    inception: Annotated[str, typer.Option(help="file of Inception weights for FID, KID and IS; default: torch's cache")] = "",
    log: Annotated[str, typer.Option(help="csv of the model log, its page beside; default: model_log.csv beside the runs")] = "",
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Measure RUN on held-out samples; tables go to its evaluation/ folder and to MLflow.

    Example: diptych evaluate runs/coca-20250101-120000 --samples 1000
    """
    from diptych.pipelines.evaluate_pictures import PictureEvaluation

    runs, settings = [text for text in arguments if "=" not in text], [text for text in arguments if "=" in text]
    if settings and not clip:
        raise ConfigError("KEY=VALUE", settings[0], "settings of pictures beside --clip", "Without it no pictures are made.")
    wanted = PictureEvaluation(clip, judge, pictures, tuple(settings), seed, inception, log) if clip else None
    call = functools.partial(
        plan if dry_run else run, runs, shards, embeddings=embeddings, samples=samples, checkpoint=checkpoint, averaged=averaged, device=device, track=track,
        pictures=wanted,
    )  # fmt: skip
    if dry_run:
        would("evaluate", call, json)
    result = call()
    names = list(dict.fromkeys(name for each in result["runs"] for name in each["metrics"]))
    rows = [[name, *(f"{each['metrics'][name]:.4g}" if name in each["metrics"] else "" for each in result["runs"])] for name in names]
    show_table(f"{result['runs'][0]['samples']:,} held-out samples", ["figure", *(each["run"] for each in result["runs"])], rows)
    for each in result["runs"]:
        for table in each["tables"]:
            show_table(f"{each['run']}: {table['title']}", table["columns"], [[_short(cell) for cell in row] for row in table["rows"]])
    if wanted is not None:
        _show_pictures(result["pictures"])
    show_faults(result["faults"])
    finish(result, json)


def _show_pictures(found: dict[str, Any]) -> None:
    models = found["models"]
    names = list(dict.fromkeys(name for model in models for name, value in model.items() if isinstance(value, float)))
    rows = [[name, *(_short(model.get(name, "")) for model in models)] for name in names]
    show_table(f"{models[0]['pictures']} pictures of held-out captions", ["figure", *(model["model"] for model in models)], rows)
    for sentence in found["left_out"]:
        note(f"not measured: {sentence}")
    note(f"model log: {found['log']} and its page beside")


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


if __name__ == "__main__":
    from diptych.cli import main

    main(["evaluate", *sys.argv[1:]])
