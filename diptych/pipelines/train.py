"""`diptych train`: prepare the data, start Ray Train, follow the run, end it in order.

The driver prepares, tracks and ends; the workers (`session.py`) train. What is true of a run stands in its folder, written by
the workers: a driver that dies loses nothing, and the same command resumes at the last whole checkpoint.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from diptych.config import ConfigError, RunConfig, apply_overrides, load_config_file, load_recipe, set_path
from diptych.pipelines import ray_context, runs_folder, tracking
from diptych.pipelines.console import finish, note, show_table, would
from diptych.pipelines.environment import cluster as cluster_facts
from diptych.pipelines.follow import following
from diptych.pipelines.options import AsJson, DryRun
from diptych.pipelines.prepare import Prepared, prepare
from diptych.redaction import without_credentials, without_secrets

if TYPE_CHECKING:
    from diptych.pipelines.trial import Trial

T = TypeVar("T")


def run(config: RunConfig, parent_run_id: str | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Train, or resume the unfinished run of that name; returns `run_id, run_dir, step, samples, world_size, status, metrics`.

    `status` is `finished`, `early_stopped`, `stopped` (asked to) or `failed`; for a `trial` of the sweep `parent_run_id` also `pruned`
    or `paused`. Raises `ConfigError` for what cannot start.
    """
    ray_context.preflight(config)
    with ray_context.joined(config):
        return _run(config, parent_run_id, trial)


def _run(config: RunConfig, parent_run_id: str | None, trial: Trial | None) -> dict[str, Any]:
    if config.tracking.enabled:
        tracking.tracking_uri(config.tracking.uri)
    run_dir = runs_folder.run_folder(config)
    former = runs_folder.claim(run_dir, config, trial.mutable if trial else frozenset())
    prepared = prepare(config, run_dir, trial.inputs if trial else None)
    config = prepared.config
    if former and former["digest"] != prepared.facts["digest"]:
        raise ConfigError(
            "data.shards", config.data.shards, f"the data that the run began with (digest {former['digest'][:12]})", "Use a new name."
        )
    runs_folder.replace_text(run_dir / "config.json", config.to_json(public=True))
    (run_dir / "stop").unlink(missing_ok=True)
    if config.train.start_from:
        _start_from(config, run_dir, prepared.facts["digest"])
    driver = {
        "driver": tracking.driver_identity(),
        "status": "running",
        "digest": prepared.facts["digest"],
        "facts": without_secrets(prepared.facts),
        "mark": former.get("mark") or uuid.uuid4().hex,
        "run_id": former.get("run_id", "") if config.tracking.enabled else "",
        "uri": former.get("uri", "") if config.tracking.enabled else "",
    }
    # Before MLflow is asked, so that a driver that is killed meanwhile leaves the mark by which its run is found again.
    runs_folder.write_driver(run_dir, driver)
    # Ray comes up meanwhile.
    tracker = _beside(lambda: _tracker(config, run_dir, driver, prepared.facts, parent_run_id) if config.tracking.enabled else None)
    status, result = "failed", {"status": "failed", "error": ""}
    try:
        result = _train(prepared, run_dir, tracker, trial)
        status = result["status"]
    except KeyboardInterrupt:
        status = "killed"
        raise
    finally:
        # Waits for it, which writes the same file.
        tracked = tracker.result() if tracker.exception() is None else None
        runs_folder.write_driver(run_dir, driver | {"status": status})
        _conclude(prepared, run_dir, tracked, status)
    return {"run_id": driver["run_id"], "run_dir": str(run_dir)} | result


def _beside(make: Callable[[], T]) -> Future[T]:
    """What `make` returns, made in a thread that a process which ends does not wait for."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(make())
        except BaseException as error:  # Raised where the result is asked for.
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _tracker(config: RunConfig, run_dir: Path, driver: dict[str, Any], facts: dict[str, Any], parent: str | None) -> tracking.Tracker:
    """This run's run in MLflow, noted in `driver` and its file; first, runs are ended that dead drivers left RUNNING."""
    if parent is None:
        try:
            tracking.reconcile(tracking.tracking_uri(config.tracking.uri))
        except Exception as error:
            note(f"runs of dead drivers stay as they are for now ({tracking.explain(error, config.tracking.uri)})")
    tracker = tracking.Tracker(config, run_dir, driver["run_id"], facts, parent, driver["mark"])
    driver |= {"run_id": tracker.run_id, "uri": without_credentials(tracker.uri)}
    runs_folder.write_driver(run_dir, driver)
    return tracker


def _start_from(config: RunConfig, run_dir: Path, digest: str) -> None:
    """Put a run that has no checkpoint yet where `train.start_from` stands."""
    from diptych.trainers.adoption import adopt
    from diptych.trainers.checkpoint import newest_whole
    from diptych.trainers.runfolder import RunFolder

    own, donor = runs_folder.records_url(config, run_dir), config.train.start_from
    if newest_whole(RunFolder(own)) is None:
        run, separator, name = donor.partition("/checkpoints/")
        donor = runs_folder.records(Path(run)) + separator + name if Path(run).is_dir() else donor
        note(f"starting from {config.train.start_from}: {adopt(own, donor, config, digest)}")


def _train(prepared: Prepared, run_dir: Path, tracker: Future[tracking.Tracker | None], trial: Trial | None) -> dict[str, Any]:
    config = prepared.config
    cluster = config.cluster
    outlived = ray_context.is_up(config) or trial is not None
    # Ray, which `is_up` has imported with its settings, comes up meanwhile.
    _beside(lambda: importlib.import_module("diptych.pipelines.ray_trainer"))
    with ray_context.ray_session(ray_context.required_cpus(config), cluster.address, cluster.logical_cpus):
        ray_context.preflight_cluster(config)
        with tracker.result() or nullcontext() as tracked:
            if tracked:
                tracked.log_environment(cluster_facts())
            with stopping(run_dir):
                return _as_trial(_fit(prepared, run_dir, trial, outlived), run_dir, trial)


def _as_trial(result: dict[str, Any], run_dir: Path, trial: Trial | None) -> dict[str, Any]:
    """A trial that stopped without being asked to has reached the end of its generation, or failed at a rung."""
    if trial is None or result["status"] != "stopped" or (run_dir / "stop").exists():
        return result
    return result | {"status": "paused" if 0 < trial.until <= result["step"] else "pruned"}


def _fit(prepared: Prepared, run_dir: Path, trial: Trial | None, outlived: bool) -> dict[str, Any]:
    """Run Ray Train in a thread of its own, so that signals and the progress bar stay with us. `outlived`: the Ray goes on without us."""
    outcome = run_dir / "result.json"
    outcome.unlink(missing_ok=True)
    errors: list[BaseException] = []
    thread = threading.Thread(target=_fit_thread, args=(prepared, run_dir, trial, outlived, errors), name="ray-train", daemon=True)
    thread.start()
    with following(run_dir, prepared.config, f"{run_dir.name}: " if trial else "") as show:
        while thread.is_alive():
            thread.join(0.5)
            show()
    if errors:
        note(f"the run stands in {run_dir}; the same command with name={run_dir.name} resumes it")
        return _failure(run_dir, prepared.config, errors[0])
    # Without one the workers were fenced: another driver has the run.
    fenced = {"status": "failed", "step": 0, "samples": 0, "metrics": {}, "error": f"another driver has taken over the run in {run_dir}"}
    result = json.loads(outcome.read_text()) if outcome.is_file() else fenced
    if result["error"]:
        note(f"failed: {result['error']}")
        result |= {key: runs_folder.latest_state(run_dir).get(key, 0) for key in ("step", "samples")}
    return result


def _fit_thread(prepared: Prepared, run_dir: Path, trial: Trial | None, outlived: bool, errors: list[BaseException]) -> None:
    from diptych.pipelines import ray_trainer
    from diptych.pipelines.session import payload_of

    config, payload = prepared.config, payload_of(prepared, run_dir, trial)
    try:
        if trial is not None and config.workers == 1 and config.train.strategy == "ddp":
            ray_trainer.fit_alone(config, payload, run_dir)
        else:
            ray_trainer.fit(config, payload, run_dir, outlived)
    except BaseException as error:  # Handed to the main thread, which decides.
        errors.append(error)


def _failure(run_dir: Path, config: RunConfig, error: BaseException) -> dict[str, Any]:
    """The result of a run whose retries are spent: what it reached, and the workers' own message."""
    from diptych.pipelines.failures import explain, reason

    state = runs_folder.latest_state(run_dir) or {"step": 0, "samples": 0}
    failures = getattr(error, "worker_failures", None)
    message = reason(failures) if failures else explain(error)
    note(f"failed after {config.cluster.max_failures} retries: {message}")
    reached = {
        "step": state["step"],
        "samples": state["samples"],
        "world_size": state.get("world_size", config.least_workers),
        "metrics": {},
    }
    return reached | {"status": "failed", "error": message}


@contextmanager
def stopping(run_dir: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the workers to checkpoint and stop; a second one ends the driver at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _: Any) -> None:
        if (run_dir / "stop").exists():
            raise KeyboardInterrupt
        (run_dir / "stop").touch()
        note(f"{signal.Signals(number).name}: writing a checkpoint, then stopping; resume with name={run_dir.name}. Again = at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(prepared: Prepared, run_dir: Path, tracker: tracking.Tracker | None, status: str) -> None:
    """Merge the trace, copy artifacts, end the MLflow run with the right status."""
    from diptych.pipelines.trace import write_trace

    if prepared.config.data.trace:
        write_trace(run_dir, prepared.manifest)
    if tracker is None:
        return
    try:
        tracker.log_artifacts(run_dir / "samples", "samples")
        tracker.log_artifacts(run_dir / "ledger", "ledger")
    except Exception as error:  # A tracking server that is away must not turn a finished run into a failed one.
        note(f"artifacts not copied to MLflow ({error}); they stand in {run_dir}")
    tracker.end(tracking.mlflow_status(status))


def resolve(task: str, recipe: str, config_file: str, overrides: list[str]) -> RunConfig:
    """The configuration of a call: a stored file or a recipe, with `KEY=VALUE` applied."""
    if config_file:
        config = load_config_file(config_file, note)
        if config.task.name != task:
            raise ConfigError("TASK", task, f"{config.task.name}, the task of {config_file}")
    else:
        config = load_recipe(task, recipe)
    return apply_overrides(config, overrides)


def command(
    task: Annotated[str, typer.Argument(help="coca, dalle2_prior, … (`diptych recipes` lists them)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted configuration keys")] = None,
    *,
    recipe: Annotated[str, typer.Option(help="starting configuration")] = "smoke",
    config: Annotated[str, typer.Option(help="stored configuration, or DALLE2-pytorch's JSON, to start from instead")] = "",
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Train TASK; an unfinished run of the same name= is resumed.

    Example: diptych train coca --recipe smoke data.shards=shards/ workers=2 train.steps=50
    """
    resolved = resolve(task, recipe, config, overrides or [])
    if dry_run:
        would("train", lambda: _dry_run(resolved), json)
    result = run(resolved)
    figures = [[key, f"{value:.5g}"] for key, value in result["metrics"].items() if isinstance(value, int | float)]
    show_table(f"{result['status']} at step {result['step']} · {result['run_dir']}", ["metric", "value"], figures)
    finish(result, json, failed=result["status"] == "failed")


def _dry_run(config: RunConfig) -> dict[str, Any]:
    """What the call would do: resolved configuration, resources and data, with nothing started and no run made."""
    import tempfile

    import numpy as np

    ray_context.preflight(config)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config, Path(folder))
        resolved, facts = prepared.config, prepared.facts
        caption = prepared.manifest.rows(np.array([0]), ["caption"])["caption"][0].as_py()
    tokenizer = str(getattr(config.task, "tokenizer", ""))
    if tokenizer.startswith("train:"):
        # The one that was trained to look at the captions is gone with its folder.
        resolved = set_path(resolved, "task.tokenizer", tokenizer)
    resources = {
        "workers": config.workers,
        "cpus": ray_context.required_cpus(config),
        "gpus": config.most_workers * config.cluster.gpus_per_worker,
    }
    return {"config": json.loads(resolved.to_json(public=True)), "resources": resources, "data": facts, "first caption": caption}


if __name__ == "__main__":
    from diptych.cli import main

    main(["train", *sys.argv[1:]])
