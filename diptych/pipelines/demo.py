"""`diptych demo`: the main job end to end on generated data, in minutes on two cores.

Captioned scenes → shards → index → CoCa on 2 workers → export → embeddings → DALL-E 2 prior on 2 workers → evaluation → one
page. Every stage is the verb that a user would call; one Ray serves them all. Called again, finished stages are passed over.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diptych.config import Config, ConfigError, RunConfig, apply_overrides, load_recipe
from diptych.pipelines.console import console, finish, note, progress, show_table, would
from diptych.pipelines.options import AsJson, DryRun

if TYPE_CHECKING:
    from diptych.pipelines.report import Figure

HELD_OUT = 200
"""Scenes that retrieval, captions and cosines are measured on."""
_PER_SHARD = 400


class DemoOptions(Config):
    """What the demo makes; recorded in its folder, so that a call that goes on with it makes the same."""

    samples: int = 4800
    """Scenes."""
    size: int = 128
    """Side of their pictures, in pixels."""
    coca_steps: int = 0
    """Optimizer steps of the CoCa; 0 = its recipe's."""
    prior_steps: int = 0
    """Optimizer steps of the prior; 0 = its recipe's."""
    workers: int = 2
    """Training workers."""
    seed: int = 0
    """Seed of scenes and models."""


def run(out: str = "demo", options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the demo in the folder `out`; returns what `summary.json` holds: `figures, reached, stages, report, mlflow, …`.

    Raises `ConfigError` if `out` holds something else than a demo of the same options.
    """
    from diptych.pipelines import ray_context
    from diptych.pipelines.demo_figures import measure

    chosen, folder = DemoOptions(**(options or {})), Path(out).absolute()
    _claim(folder, chosen)
    stages: list[dict[str, Any]] = []
    coca, prior = _configs(folder, chosen)
    with ray_context.ray_session(max(ray_context.required_cpus(coca), ray_context.required_cpus(prior))):
        with _stage(stages, "scenes → shards") as done:
            done(_write_scenes(folder / "shards", chosen))
        with _stage(stages, "index") as done:
            done(_index(folder / "shards"))
        with _stage(stages, "train CoCa") as done:
            done(_train(coca))
        with _stage(stages, "export CoCa and embed") as done:
            done(_embed(folder))
        with _stage(stages, "train prior") as done:
            done(_train(prior))
    with _stage(stages, "evaluate") as done:
        figures = measure(folder)
        done(f"{HELD_OUT} held-out scenes")
    return _conclude(folder, figures, stages)


def plan(out: str = "demo", options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `run` would do with these arguments; nothing is written. Raises `ConfigError` as `run` does."""
    from diptych.datasets import scenes
    from diptych.pipelines import ray_context

    chosen, folder = DemoOptions(**(options or {})), Path(out).absolute()
    begun = _is_begun(folder, chosen)
    configs = _configs(folder, chosen)
    for config in configs:
        ray_context.preflight(config)
    return {
        "out": str(folder),
        "begun": begun,
        "writes": ["shards/", "runs/coca/", "coca_model/", "embeddings/", "runs/prior/", "mlflow.db", "summary.json", "report.html"],
        "options": chosen.model_dump(),
        "steps": {config.name: config.train.steps for config in configs},
        "cpus": max(map(ray_context.required_cpus, configs)),
        "models": "none: both are trained from scratch",
        "first caption": scenes.describe(chosen.seed, 0).caption,
    }


def _is_begun(folder: Path, options: DemoOptions) -> bool:
    """Whether `folder` holds a demo of these options; `ConfigError` where it holds anything else."""
    recorded = folder / "demo.json"
    if recorded.is_file():
        former = json.loads(recorded.read_text())
        if former != options.model_dump():
            raise ConfigError("--out", str(folder), "a new folder, or a demo of the same options", f"It was begun with {former}.")
        return True
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError("--out", str(folder), "a new or empty folder, or an earlier demo", "Choose another folder with --out.")
    return False


def _claim(folder: Path, options: DemoOptions) -> None:
    """Record what the folder is for; say whether this call begins or goes on."""
    recorded = folder / "demo.json"
    if _is_begun(folder, options):
        note(f"going on with the demo in {folder}: finished stages are passed over")
        return
    folder.mkdir(parents=True, exist_ok=True)
    recorded.write_text(json.dumps(options.model_dump()))
    note(f"beginning a demo in {folder}")


def _configs(folder: Path, options: DemoOptions) -> tuple[RunConfig, RunConfig]:
    common = [
        f"data.shards={folder / 'shards'}",
        f"output={folder / 'runs'}",
        f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
        f"workers={options.workers}",
        f"seed={options.seed}",
        f"validation.samples={HELD_OUT}",
    ]
    coca = [*common, "name=coca", *([f"train.steps={options.coca_steps}"] if options.coca_steps else [])]
    prior = [*common, "name=prior", f"data.embeddings={folder / 'embeddings'}"]
    prior += [f"train.steps={options.prior_steps}"] if options.prior_steps else []
    return apply_overrides(load_recipe("coca", "demo"), coca), apply_overrides(load_recipe("dalle2_prior", "demo"), prior)


@contextmanager
def _stage(stages: list[dict[str, Any]], name: str) -> Iterator[Callable[[str], None]]:
    """Announce a stage, time it, and print what it says was done."""
    console.rule(f"[bold]{len(stages) + 1} · {name}", align="left", style="dim")
    started = time.monotonic()
    said: list[str] = []
    yield said.append
    stages.append({"stage": name, "result": "".join(said), "seconds": round(time.monotonic() - started, 1)})
    note(f"{stages[-1]['result']} ({stages[-1]['seconds']} s)")


def _write_scenes(folder: Path, options: DemoOptions) -> str:
    import concurrent.futures
    import multiprocessing

    from diptych.datasets.shards import ShardWriter

    writer = ShardWriter(str(folder), _PER_SHARD)
    count = -(-options.samples // _PER_SHARD)
    missing = [shard for shard in range(count) if not writer.is_finished(shard)]
    context = multiprocessing.get_context("spawn")
    jobs = max(1, min(os.cpu_count() or 1, len(missing)))
    with progress("drawing scenes", len(missing) * _PER_SHARD) as advance, concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        for done in concurrent.futures.as_completed([pool.submit(_write_shard, writer, shard, options) for shard in missing]):
            advance(done.result())
    return f"{options.samples:,} scenes in {count} shards, {count - len(missing)} of them there already"


def _write_shard(writer: Any, shard: int, options: DemoOptions) -> int:
    from diptych.datasets.scenes import samples

    start = shard * writer.samples_per_shard
    stop = min(start + writer.samples_per_shard, options.samples)
    writer.write_shard(shard, samples(options.seed, start, stop, options.size))
    return stop - start


def _index(shards: Path) -> str:
    from diptych.datasets.manifest import open_manifest

    manifest = open_manifest(str(shards))
    facts = manifest.facts()
    return f"{facts['samples']:,} samples, {facts['captions']:,} captions, {facts['faults']} faults, digest {manifest.digest[:12]}"


def _train(config: RunConfig) -> str:
    from diptych.pipelines import train
    from diptych.pipelines.runs_folder import read_driver, run_folder

    driver = read_driver(run_folder(config))
    if driver.get("status") == "finished":
        return f"run {config.name} was finished already"
    result = train.run(config)
    if result["status"] != "finished":
        raise ValueError(f"the run {config.name} ended as {result['status']}: {result.get('error', '')}; the same command resumes it")
    rate = result["metrics"].get("train/samples_per_second", 0)
    return f"{result['step']} steps on {result['world_size']} workers, {rate:,.0f} samples/s, loss {result['metrics']['train/loss']:.3f}"


def _embed(folder: Path) -> str:
    from diptych.pipelines import embed, export

    target = folder / "coca_model"
    if not (target / "open_clip_config.json").is_file():
        export.run(str(folder / "runs" / "coca"), str(target))
    result = embed.run(str(folder / "shards"), str(folder / "embeddings"), {"model": str(target), "precision": "fp32"})
    if result["faults"]:
        raise ValueError(f"{len(result['faults'])} scenes could not be embedded, the first: {result['faults'][0]}")
    return f"{result['samples_out']:,} images and captions embedded"


def _conclude(folder: Path, figures: list[Figure], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Write `summary.json` and `report.html`, and say what to look at."""
    from dataclasses import asdict

    from diptych.pipelines import report

    page = folder / "report.html"
    mlflow = f"mlflow ui --backend-store-uri sqlite:///{folder / 'mlflow.db'}"
    reached = all(figure.reached for figure in figures)
    seconds = sum(stage["seconds"] for stage in stages)
    lead = f"Generated scenes, a CoCa and a DALL-E 2 prior trained on {os.cpu_count()} cores: {len(stages)} stages in {seconds:.0f} s."
    closing = f"{mlflow}\ndiptych evaluate {folder / 'runs' / 'coca'}\ndiptych train coca --recipe demo data.shards={folder / 'shards'}"
    report.write(page, "Diptych demo", lead, [folder / "runs" / name for name in ("coca", "prior")], figures, closing)
    summary = {
        "figures": [asdict(figure) for figure in figures],
        "reached": reached,
        "seconds": seconds,
        "stages": stages,
        "report": str(page),
        "mlflow": mlflow,
        "runs": {name: str(folder / "runs" / name) for name in ("coca", "prior")},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    rows = [[figure.name, f"{figure.value:.3f}", figure.target, _verdict(figure), figure.baseline] for figure in figures]
    show_table(f"{HELD_OUT} held-out scenes", ["figure", "value", "target", "", "baseline"], rows)
    note(f"look at  {page}")
    note(f"runs     {mlflow}")
    return summary


def _verdict(figure: Figure) -> str:
    return "" if not figure.target else "✓" if figure.reached else "✗ missed"


def command(
    *,
    out: Annotated[str, typer.Option(help="folder for everything that the demo makes")] = "demo",
    samples: Annotated[int, typer.Option(help="scenes")] = 4800,
    coca_steps: Annotated[int, typer.Option(help="optimizer steps of the CoCa; 0 = its recipe's")] = 0,
    prior_steps: Annotated[int, typer.Option(help="optimizer steps of the prior; 0 = its recipe's")] = 0,
    workers: Annotated[int, typer.Option(help="training workers")] = 2,
    seed: Annotated[int, typer.Option(help="seed of scenes and models")] = 0,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Run the main job end to end on generated scenes; status 1 if a figure misses its target.

    Example: diptych demo --out demo
    """
    options = {"samples": samples, "coca_steps": coca_steps, "prior_steps": prior_steps, "workers": workers, "seed": seed}
    if dry_run:
        would("run the demo", lambda: plan(out, options), json)
    summary = run(out, options)
    finish(summary, json, failed=not summary["reached"])


if __name__ == "__main__":
    from diptych.cli import main

    main(["demo", *sys.argv[1:]])
