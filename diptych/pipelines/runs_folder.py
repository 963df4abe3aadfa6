"""The run folder: where it lies, who drives it, and what of it an outside caller may read.

```
runs/<name>/
  config.json          the resolved configuration; `train --config` takes it
  driver.json          the process that drives the run, its MLflow run, its data's identity
  attempts/ checkpoints/ metrics/ trace/ ledger/    written by the workers (trainers/checkpoint.py)
  inputs/              selections, joins and tokenizer that the run was prepared with
  evaluation/ export/  written by those verbs
```
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diptych.config import ConfigError, RunConfig
from diptych.pipelines import tracking


def run_folder(config: RunConfig) -> Path:
    """Folder of the run: `output`/`name`, or a new name from the task and the time."""
    name = config.name or f"{config.task.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if "/" in name or name in (".", ".."):
        raise ConfigError("name", name, "a folder name without '/'", "Use output= for the folder that holds the run.")
    if "://" in config.output:
        remedy = "Checkpoints, metrics and traces may lie in an object store: checkpoint.storage=s3://bucket/runs."
        raise ConfigError("output", config.output, "a folder, on a cluster one that all nodes share", remedy)
    return Path(config.output).absolute() / name


def find_run(run: str, output: str = "runs") -> Path:
    """The folder of `run`: a path, or a name under `output`; `ConfigError` if it is no run."""
    for candidate in (Path(run), Path(output) / run):
        if (candidate / "config.json").is_file():
            return candidate.absolute()
    known = sorted(path.parent.name for path in Path(output).glob("*/config.json"))
    raise ConfigError("RUN", run, f"a run folder, or one of {', '.join(known) or f'(none under {output})'}", "`diptych runs` lists them.")


def records_url(config: RunConfig, run_dir: Path) -> str:
    """Where attempts, checkpoints, metrics and traces lie: the run folder, or the folder of its name in `checkpoint.storage`."""
    storage = config.checkpoint.storage
    return f"{storage.rstrip('/')}/{run_dir.name}" if storage else str(run_dir)


def records(run_dir: Path) -> str:
    """The same for a run that was made before."""
    # Plain JSON, so that a run with a key that is gone since, or with a damaged file, can still be listed.
    try:
        storage = json.loads((run_dir / "config.json").read_text())["checkpoint"]["storage"]
    except (OSError, ValueError, KeyError, TypeError):
        storage = ""
    return f"{storage.rstrip('/')}/{run_dir.name}" if storage else str(run_dir)


def read_driver(run_dir: Path) -> dict[str, Any]:
    """What `write_driver` wrote, or an empty mapping."""
    file = run_dir / "driver.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write_driver(run_dir: Path, facts: dict[str, Any]) -> None:
    """Record the driver (`driver`), the MLflow run (`run_id`, `uri`), the status and the data's identity."""
    replace_text(run_dir / "driver.json", json.dumps(facts, indent=2))


def replace_text(file: Path, text: str) -> None:
    """Write a small file so that a process killed meanwhile leaves the old content or the new one."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text)
    temporary.replace(file)


def latest_state(run_dir: Path) -> dict[str, Any]:
    """`state.json` of the newest checkpoint of the history that counts; empty before the first."""
    from diptych.trainers.attempts import candidates
    from diptych.trainers.runfolder import RunFolder

    folder = RunFolder(records(run_dir))
    names = candidates(folder)
    return json.loads(folder.read(f"checkpoints/{names[0]}/state.json")) if names else {}


def last_line(run_dir: Path) -> dict[str, Any]:
    """The newest logged line `{step, time, metrics}`, read from the end of the newest file; empty before the first."""
    from diptych.trainers.runfolder import RunFolder

    folder = RunFolder(records(run_dir))
    names = [name for name in folder.names("metrics") if name.startswith("a") and name.endswith(".jsonl")]
    if not names:
        return {}
    place = folder.path(f"metrics/{names[-1]}")
    lines = folder.fs.cat_file(place, start=max(0, folder.size(f"metrics/{names[-1]}") - 16384)).splitlines()
    for line in reversed(lines):
        if line.startswith(b'{"step"') and line.endswith(b"}"):
            return json.loads(line)
    return {}


def claim(run_dir: Path, config: RunConfig, mutable: Collection[str] = ()) -> dict[str, Any]:
    """Make or reopen the run folder for this driver; returns what a former driver recorded.

    Raises `ConfigError` if another driver is alive, if the run is finished, or if the configuration changes what may not
    change within a run, keys in `mutable` aside.
    """
    former = read_driver(run_dir)
    if former:
        if (
            former["status"] == "running"
            and not tracking.driver_is_gone(former["driver"])
            and former["driver"] != tracking.driver_identity()
        ):
            raise ConfigError("name", run_dir.name, "a run that nobody drives", f"It is driven by {former['driver']}; stop that first.")
        stored = RunConfig.from_json((run_dir / "config.json").read_text())
        if former["status"] in ("finished", "early_stopped") and config.train.steps <= stored.train.steps:
            raise ConfigError("name", run_dir.name, "an unfinished run or a new name", "Raise train.steps to continue a finished run.")
        _check_unchanged(stored, config, mutable)
    run_dir.mkdir(parents=True, exist_ok=True)
    return former


_FIXED = (
    "task.",
    "data.shards",
    "data.keep",
    "data.validation_share",
    "data.split_seed",
    "data.shuffle",
    "train.global_batch_size",
    "seed",
)


def _check_unchanged(stored: RunConfig, config: RunConfig, mutable: Collection[str]) -> None:
    """A run keeps its model, its data's order and its seed; workers, strategy, length and cadence may change."""
    from diptych.config import dotted_keys

    before, after = dotted_keys(stored), dotted_keys(RunConfig.from_json(config.to_json(public=True)))
    for key, value in after.items():
        changed = key in before and before[key] != value and key not in mutable
        # The tokenizer and dimensions were resolved from the data when the run began, so the stored value is the later one.
        derived = (isinstance(value, str) and value.startswith("train:")) or value is None
        if changed and key.startswith(_FIXED) and not derived:
            raise ConfigError(key, value, f"{before[key]!r}, as the run began", "Start a new run under another name to change it.")
