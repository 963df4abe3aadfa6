"""`diptych tune`: search a task's configurations with trials that are ordinary runs, and end with the best one as a file.

What each trial is and when it runs is `sweep.py`'s; this module prepares, tracks and concludes.
"""

from __future__ import annotations

import sys
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.config import ConfigError, RunConfig, apply_overrides, dotted_keys, get_path, load_config_file, load_recipe, set_path
from diptych.pipelines import ray_context, runs_folder, tracking, train
from diptych.pipelines.console import finish, note, show_table, would
from diptych.pipelines.options import AsJson, DryRun
from diptych.pipelines.prepare import Inputs, prepare
from diptych.pipelines.sweep import Budget, Sweep
from diptych.pipelines.sweep_record import Definition, SweepFolder, TrialRecord, ranked
from diptych.pipelines.sweep_resources import cluster_places, demand, estimated_worker_gb, local_places
from diptych.pipelines.sweep_search import check_installed, first_trials, grid_size
from diptych.redaction import without_credentials, without_secrets
from diptych.tune_spaces import METHODS, Domain, Space, combined, load_space, parse_vary, spaces_of

_MAY_CHANGE = ("cluster.", "tracking.", "workers", "name", "output")
"""What a call that goes on with a sweep may set."""


def define(
    task: str, space: str, recipe: str, config_file: str, overrides: list[str], vary: list[str], changes: dict[str, Any]
) -> Definition:
    """The sweep of a call; raises `ConfigError` for keys, values and methods that do not go together."""
    varied = [parse_vary(text) for text in vary]
    named = load_space(task, space) if space else None
    fixed = [override.partition("=")[0].strip() for override in overrides]
    if both := set(fixed) & {key for key, _ in varied}:
        raise ConfigError("--vary", sorted(both), "keys that KEY=VALUE does not fix at the same time")
    found = combined(named, varied, fixed, {key: value for key, value in changes.items() if value})
    base = load_config_file(config_file) if config_file else load_recipe(task, recipe or found.recipe)
    if base.task.name != task:
        raise ConfigError("TASK", task, f"{base.task.name}, the task of {config_file}")
    for key, value in found.config.items():
        base = set_path(base, key, value)
    base = apply_overrides(base, overrides)
    name = base.name or f"tune-{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    base = set_path(base, "name", name)
    found.check(base)
    check_installed(found)
    return _aligned(found, base, name)


def _aligned(space: Space, base: RunConfig, name: str) -> Definition:
    """Let every rung, or every end of a generation, be a step at which the metric is measured."""
    metric, mode = space.metric or base.train.monitor, space.mode or base.train.monitor_mode
    if metric.startswith("val/") and not (base.validation.samples and base.data.validation_share):
        raise ConfigError("data.validation_share", base.data.validation_share, f"above 0: trials are compared by {metric}", "Example: 0.1")
    if space.method not in ("asha", "pbt"):
        return Definition(name, space, base, metric, mode, 0)
    steps = max((value for value in space.parameters["train.steps"].bounds()), default=0) if "train.steps" in space.parameters else 0
    steps = steps or base.train.steps
    wanted = space.interval_steps or max(1, steps // (space.reduction**2 if space.method == "asha" else 4))
    key = "validation.every_steps" if metric.startswith("val/") else "train.log_every"
    every = get_path(base, key) or wanted
    every = min(every, wanted) if key == "train.log_every" else every
    interval = -(-wanted // every) * every
    if interval >= steps:
        raise ConfigError(key, every, f"below train.steps = {steps}, so that {space.method} has something to judge")
    return Definition(name, space, set_path(base, key, every), metric, mode, interval)


def run(definition: Definition, budget: Budget, *, at_once: int = 0, worker_gb: float = 0.0, resume: bool = False) -> dict[str, Any]:
    """Run or resume a sweep; returns `sweep_dir, run_id, status, trials, best, metric, samples, seconds, report`.

    `worker_gb`: memory of a training worker; 0 = what the size of its model tells.

    `status` is `finished`, `stopped` (asked to, or the budget of samples or time is spent; `resume` goes on) or `failed` (no trial
    brought a value). Raises `ConfigError` for what cannot start.
    """
    folder = SweepFolder(runs_folder.run_folder(definition.base))
    definition = _open(folder, definition, resume)
    count = min(budget.trials, grid_size(definition.space)) if definition.space.method == "grid" else budget.trials
    budget = Budget(count, budget.samples, budget.seconds)
    planned = first_trials(definition.space, count, definition.base.seed)
    # What no estimate could make fit is refused before anything is looked at.
    places = _places(definition, planned, at_once, worker_gb or ray_context.WORKER_GB)
    base = definition.base
    if base.tracking.enabled:
        tracking.tracking_uri(base.tracking.uri)
    former = _claim(folder)
    inputs = Inputs(folder.path / "inputs")
    facts = prepare(base, folder.path / "inputs" / "base", inputs).facts
    if not worker_gb and (found := estimated_worker_gb(_configs(definition, planned), facts)) > ray_context.WORKER_GB:
        places = _places(definition, planned, at_once, found)
    if not folder.begun:
        folder.begin(definition)
    for parameters in planned[len(folder.trials) :] if definition.space.method != "pbt" or not folder.trials else []:
        folder.add(parameters)
    folder.save()
    return _drive(definition, folder, inputs, budget, places, facts, former)


def _open(folder: SweepFolder, definition: Definition, resume: bool) -> Definition:
    if not folder.begun:
        if resume:
            raise ConfigError("--resume", folder.path.name, "a sweep that has begun", "Leave --resume out to begin it.")
        if (folder.path / "config.json").is_file():
            raise ConfigError("name", folder.path.name, "a name that no run has", "Choose another name for the sweep.")
        return definition
    if not resume:
        raise ConfigError("name", folder.path.name, "a new name", "Add --resume to go on with the sweep of that name.")
    stored = folder.read()
    # What is stored has no credentials, so what is given is compared without them, and used with them.
    before, now = dotted_keys(stored.base), dotted_keys(RunConfig.from_json(definition.base.to_json(public=True)))
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(_MAY_CHANGE)]
    if changed or stored.space.model_copy(update={"trials": definition.space.trials}) != definition.space:
        what = f"{changed[0]}={now[changed[0]]!r}" if changed else "another search space"
        remedy = "Give the options that the sweep began with; budgets, --at-once and cluster.* may differ."
        raise ConfigError("--resume", what, f"what {folder.path.name} began with", remedy)
    return replace(stored, base=definition.base)


def _places(definition: Definition, planned: list[dict[str, Any]], at_once: int, worker_gb: float) -> int:
    """Trials at once, or a refusal; nothing is started for a local Ray."""
    configs = _configs(definition, planned)
    for config in configs:
        ray_context.preflight(config)
    need = demand(configs, worker_gb)
    if not ray_context.joins_cluster(definition.base):
        places = min(local_places(need, definition.base, at_once), max(1, len(configs)) if planned else 10**6)
        note(f"{places} trials at once: {need.text}")
        return places
    with ray_context.ray_session(need.cpus, definition.base.cluster.address):
        return cluster_places(need, at_once)


def _configs(definition: Definition, planned: list[dict[str, Any]]) -> list[RunConfig]:
    """Of the trials that are known beforehand."""
    return [definition.config_of(parameters) for parameters in planned] or [definition.base]


def _claim(folder: SweepFolder) -> dict[str, Any]:
    former = runs_folder.read_driver(folder.path)
    alive = former.get("status") == "running" and not tracking.driver_is_gone(former["driver"])
    if alive and former["driver"] != tracking.driver_identity():
        raise ConfigError("name", folder.path.name, "a sweep that nobody drives", f"It is driven by {former['driver']}; stop that first.")
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "stop").unlink(missing_ok=True)
    return former


def _drive(
    definition: Definition, folder: SweepFolder, inputs: Inputs, budget: Budget, places: int, facts: dict[str, Any], former: dict[str, Any]
) -> dict[str, Any]:
    from diptych.pipelines.sweep_tracking import SweepTracker

    base = definition.base
    driver: dict[str, Any] = {"driver": tracking.driver_identity(), "status": "running", "digest": facts["digest"]}
    driver |= {"facts": without_secrets(facts), "mark": former.get("mark") or uuid.uuid4().hex}
    driver |= {"run_id": former.get("run_id", ""), "uri": former.get("uri", "")}
    # Before MLflow is asked, as for a run.
    runs_folder.write_driver(folder.path, driver)
    with suppress(Exception):  # A server that is away is told of where the parent is made.
        if base.tracking.enabled:
            tracking.reconcile(tracking.tracking_uri(base.tracking.uri))
    tracker = SweepTracker(definition, folder.path, driver, facts) if base.tracking.enabled else None
    driver |= {"run_id": tracker.run_id if tracker else "", "uri": without_credentials(tracker.uri) if tracker else ""}
    runs_folder.write_driver(folder.path, driver)
    status, result = "failed", {}
    try:
        cpus = places * ray_context.required_cpus(base)
        with ray_context.ray_session(cpus, base.cluster.address, base.cluster.logical_cpus), train.stopping(folder.path):
            changed = tracker.trial_changed if tracker else _ignore
            sweep = Sweep(definition, folder, inputs, budget, places, changed, tracker.run_id if tracker else None, facts["digest"])
            sweep.run()
        status = "stopped" if sweep.reason else "finished" if ranked(folder.trials, definition.mode) else "failed"
        result = _conclude(definition, folder, tracker, sweep.reason)
    except KeyboardInterrupt:
        status = "killed"
        raise
    finally:
        runs_folder.write_driver(folder.path, driver | {"status": status})
        if tracker:
            tracker.close(folder.trials, status)
    return {"sweep_dir": str(folder.path), "run_id": driver["run_id"], "status": status} | result


def _ignore(_: TrialRecord) -> None:
    """Nothing is tracked."""


def _conclude(definition: Definition, folder: SweepFolder, tracker: Any, reason: str) -> dict[str, Any]:
    from diptych.pipelines import sweep_report

    best = next(iter(ranked(folder.trials, definition.mode)), None)
    if best is not None:
        config = set_path(set_path(definition.config_of(best.parameters), "name", ""), "output", definition.base.output)
        runs_folder.replace_text(folder.path / "best.json", config.to_json(public=True))
    report = sweep_report.write(definition, folder)
    if tracker:
        tracker.log_results(folder.path, best)
    trials = [asdict(trial) | {"run_dir": str(folder.run_dir(trial.name))} for trial in folder.trials]
    found = {"name": best.name, "value": best.value, "step": best.best_step, "parameters": best.parameters} if best else None
    if best and found:
        found |= {"run_dir": str(folder.run_dir(best.name)), "config": str(folder.path / "best.json")}
    return {
        "metric": definition.metric,
        "trials": trials,
        "best": found,
        "reason": reason,
        "samples": sum(trial.samples for trial in folder.trials),
        "seconds": folder.seconds,
        "report": str(report),
    }


def command(
    task: Annotated[str, typer.Argument(help="coca, gpt2, … (`diptych recipes` lists them)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="fixed in every trial")] = None,
    *,
    space: Annotated[str, typer.Option(help="named search space of the task")] = "",
    vary: Annotated[list[str] | None, typer.Option(help="KEY=1e-4,1e-3 or KEY=loguniform(1e-5,1e-2); repeatable")] = None,
    method: Annotated[str, typer.Option(help="grid, random, asha, pbt or optuna; default: the space's")] = "",
    trials: Annotated[int, typer.Option(min=0, help="trials in all; default: the space's")] = 0,
    samples: Annotated[int, typer.Option(min=0, help="samples trained on, over all trials; 0 = no bound")] = 0,
    minutes: Annotated[float, typer.Option(min=0, help="time for the sweep; 0 = no bound")] = 0.0,
    at_once: Annotated[int, typer.Option(min=0, help="trials side by side; 0 = as many as fit")] = 0,
    worker_gb: Annotated[float, typer.Option(min=0, help="memory of a training worker, in GB; 0 = by the size of its model")] = 0.0,
    metric: Annotated[str, typer.Option(help="figure to compare by; default: the space's, or train.monitor")] = "",
    mode: Annotated[str, typer.Option(help="min or max")] = "",
    interval: Annotated[int, typer.Option(min=0, help="steps to ASHA's first rung, or of a PBT generation")] = 0,
    recipe: Annotated[str, typer.Option(help="starting configuration; default: the space's")] = "",
    config: Annotated[str, typer.Option(help="stored configuration to start from instead")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="go on with the sweep of that name=")] = False,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Sweep TASK's configurations: grid, random, ASHA, PBT or Optuna.

    Example: diptych tune coca --space smoke data.shards=shards/ name=first
    """
    if not space and not vary:
        _list_spaces(task)
    if method and method not in METHODS:
        raise ConfigError("--method", method, ", ".join(METHODS))
    changes = {"method": method, "trials": trials, "metric": metric, "mode": mode, "interval_steps": interval}
    definition = define(task, space, recipe, config, overrides or [], vary or [], changes)
    budget = Budget(definition.space.trials if definition.space.method != "grid" else trials or 10**6, samples, 60 * minutes)
    if dry_run:
        would("tune", lambda: _dry_run(definition, budget, at_once, worker_gb), json)
    result = run(definition, budget, at_once=at_once, worker_gb=worker_gb, resume=resume)
    _show(definition, result)
    finish(result, json, failed=result["status"] == "failed")


def _list_spaces(task: str) -> None:
    spaces = spaces_of(task)
    text = "; ".join(f"{name}: {(function.__doc__ or '').strip().splitlines()[0]}" for name, function in spaces.items())
    raise ConfigError("--space", "", text or f"{task} has no named spaces", "Or give --vary KEY=VALUE,VALUE…")


def _dry_run(definition: Definition, budget: Budget, at_once: int, worker_gb: float) -> dict[str, Any]:
    planned = first_trials(definition.space, budget.trials, definition.base.seed)
    places = _places(definition, planned, at_once, worker_gb or estimated_worker_gb(_configs(definition, planned), {}))
    searched: dict[str, Domain] = definition.space.parameters
    return {"trials": planned, "at_once": places, "space": {key: str(domain) for key, domain in searched.items()}}


def _show(definition: Definition, result: dict[str, Any]) -> None:
    from diptych.pipelines.sweep_report import table

    folder = SweepFolder(Path(result["sweep_dir"]))
    folder.read()
    columns, rows = table(definition, folder.trials)
    show_table(f"{result['status']} · {definition.metric}, {definition.mode} is better · {result['sweep_dir']}", columns, rows)
    if result.get("best"):
        note(f"best: {result['best']['name']}; diptych train {definition.base.task.name} --config {result['best']['config']}")
        note(f"report: {result['report']}")


if __name__ == "__main__":
    from diptych.cli import main

    main(["tune", *sys.argv[1:]])
