"""`diptych export`: a run's model as a folder that its ecosystem's own library loads, with a model card.

The averaged weights are exported where the run kept some. The folder appears whole or not at all; pushing it to a hub is off unless
asked for.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diptych.config import ConfigError
from diptych.pipelines.console import finish, note, would
from diptych.pipelines.options import AsJson, Averaged, Checkpoint, DryRun

if TYPE_CHECKING:
    from diptych.pipelines.trained import Trained

_NOTABLE = ("val/", "train/loss")
"""Metrics that the card lists, by prefix."""


def run(
    run_dir: str,
    out: str = "",
    push_to_hub: str = "",
    *,
    checkpoint: str = "newest",
    averaged: bool = True,
    private: bool = True,
    track: bool = True,
    register: str = "",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Export the run `run_dir` (a folder, or a name under `runs`) to `out` (empty = its `export/`).

    Returns `folder, files, checkpoint, averaged, pushed, registered`. `push_to_hub` is `org/name` (empty = nowhere). Raises `ConfigError` for no
    such run or an `out` that holds other files, `ValueError` for a hub that refuses. With `track` the folder becomes an artifact of
    the run in MLflow; `register` names a model of MLflow's registry that gets it as its next version. With `dry_run` nothing is
    loaded or written, and what would be is returned.
    """
    from diptych.pipelines import registry
    from diptych.pipelines.runs_folder import find_run
    from diptych.pipelines.trained import described, load_trained

    folder = find_run(run_dir)
    target = Path(out).absolute() if out else folder / "export"
    _check_target(target, replace=not out)
    if register:
        registry.tracked(folder)
    if dry_run:
        about = described(folder, checkpoint, averaged) | {"writes": str(target), "replaces": target.exists()}
        return about | {"push_to_hub": push_to_hub, "private": private, "track": track, "register": register}
    trained = load_trained(folder, checkpoint, averaged)
    uses_averages = averaged and bool(trained.config.optim.ema_decay)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
        trained.task.export(temporary)
        (temporary / "diptych_run.json").write_text(trained.config.to_json(public=True))
        (temporary / "README.md").write_text(model_card(trained, target.name, uses_averages))
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if track:
        _log_artifact(folder, target)
    pushed = _push(target, push_to_hub, private) if push_to_hub else ""
    version = registry.register(folder, target, register, trained.checkpoint) if register else 0
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    told = {"folder": str(target), "files": files, "checkpoint": trained.checkpoint, "averaged": uses_averages, "pushed": pushed}
    return told | {"registered": f"models:/{register}/{version}" if register else ""}


def _check_target(target: Path, replace: bool) -> None:
    """Refuse a folder that holds anything but an earlier export of ours."""
    if not target.exists():
        return
    ours = (target / "diptych_run.json").is_file()
    if not target.is_dir() or (any(target.iterdir()) and not ours):
        raise ConfigError("OUT", str(target), "a new folder, an empty one, or an earlier export", "Name another folder.")
    if ours and not replace:
        note(f"replacing the export in {target}")


def model_card(trained: Trained, name: str, averaged: bool) -> str:
    """`README.md` of the export: what it is, how it was made, what it scored, how it is loaded."""
    config, state = trained.config, trained.state
    task = config.task.name
    weights = "averaged (EMA) weights" if averaged else "weights"
    lines = ["---", "tags:", "- diptych", f"- {task}", "---", "", f"# {name}", ""]
    lines += [
        f"A `{task}` model trained with Diptych: the {weights} after {state['step']:,} steps of {config.train.global_batch_size} samples."
    ]
    if trained.task.usage:
        lines += ["", "## Use", "", "```python", trained.task.usage.replace("{folder}", name), "```"]
    figures = _figures(trained)
    if figures:
        lines += ["", "## Figures", "", "| figure | value |", "|---|---|", *(f"| {key} | {value:.6g} |" for key, value in figures.items())]
    lines += [
        "",
        "## Origin",
        "",
        f"- data digest: `{state['digest']}`",
        f"- run: `{trained.run_dir.name}`, checkpoint `{trained.checkpoint}`",
    ]
    lines += [f"- {package}: {version}" for package, version in _versions().items()]
    lines += ["", "<details><summary>Configuration</summary>", "", "```json", config.to_json(public=True), "```", "", "</details>", ""]
    return "\n".join(lines)


def _figures(trained: Trained) -> dict[str, float]:
    """Newest value of each validation figure up to the checkpoint's step, then those of `diptych evaluate`."""
    from diptych.pipelines.runs_folder import records
    from diptych.trainers.journal import read_metrics

    figures: dict[str, float] = {}
    for line in read_metrics(records(trained.run_dir)):
        if line["step"] <= trained.state["step"]:
            figures |= {key: value for key, value in line["metrics"].items() if key.startswith(_NOTABLE)}
    evaluated = trained.run_dir / "evaluation" / "metrics.json"
    if evaluated.is_file():
        stored = json.loads(evaluated.read_text())
        figures |= {key: value for key, value in stored.items() if isinstance(value, int | float)}
    return figures


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("diptych", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _log_artifact(run_dir: Path, folder: Path) -> None:
    """Copy the export to the run's artifacts in MLflow, if it was tracked; a server that is away costs a note, not the export."""
    from diptych.pipelines.runs_folder import read_driver
    from diptych.pipelines.tracking import client

    driver = read_driver(run_dir)
    if not driver.get("run_id"):
        return
    try:
        client(driver["uri"]).log_artifacts(driver["run_id"], str(folder), "export")
    except Exception as error:
        note(f"not copied to MLflow ({error}); the export stands in {folder}")


def _push(folder: Path, repository: str, private: bool) -> str:
    """Upload the folder to `repository` of the Hugging Face hub; returns its URL. The local export stays whatever happens."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Export from Diptych")
    except HFValidationError as error:
        raise ConfigError("--push-to-hub", repository, "org/name", str(error)) from None
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"push to {repository} failed: {reason}. The export stands in {folder}; log in with `hf auth login`, then repeat"
        ) from None
    return str(url)


def command(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or a name under runs/")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="folder to write; default: RUN/export")] = "",
    *,
    checkpoint: Checkpoint = "newest",
    averaged: Averaged = True,
    push_to_hub: Annotated[str, typer.Option(help="also upload to this repository of the Hugging Face hub (org/name)")] = "",
    private: Annotated[bool, typer.Option(help="make that repository private")] = True,
    track: Annotated[bool, typer.Option(help="copy the folder to the run's artifacts in MLflow, if it was tracked")] = True,
    register: Annotated[str, typer.Option(metavar="NAME", help="also a new version of this model in MLflow's registry")] = "",
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Write RUN's model in the layout that its ecosystem's own library loads, with a model card.

    Example: diptych export runs/prompts exported/prompts
    """
    call = functools.partial(
        run, run_dir, out, push_to_hub, checkpoint=checkpoint, averaged=averaged, private=private, track=track, register=register
    )
    if dry_run:
        would("export", functools.partial(call, dry_run=True), json)
    result = call()
    note(f"{len(result['files'])} files of {result['checkpoint']} in {result['folder']}")
    if result["pushed"]:
        note(f"pushed to {result['pushed']}")
    if result["registered"]:
        note(f"registered: mlflow.pyfunc.load_model({result['registered']!r}) opens it")
    finish(result, json)


if __name__ == "__main__":
    from diptych.cli import main

    main(["export", *sys.argv[1:]])
