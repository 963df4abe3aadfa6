"""Two or more runs side by side, and one run's page in MLflow: for `diptych runs`."""

from __future__ import annotations

import json
import subprocess
import sys
import webbrowser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diptych.config import ConfigError
from diptych.pipelines.console import note
from diptych.pipelines.runs_folder import read_driver

_PORT = 5000


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """`configuration: {key: [value of each run]}` where they differ, and `metrics: {name: [newest value of each run]}`.

    `runs` are entries of `runs.run`. A value is None where a run has none.
    """
    flat = [_flat(json.loads((Path(facts["run_dir"]) / "config.json").read_text())) for facts in runs]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key != "name"]
    different = {key: [each.get(key) for each in flat] for key in keys if len({json.dumps(each.get(key)) for each in flat}) > 1}
    names = sorted({name for facts in runs for name in facts["metrics"]})
    return {"configuration": different, "metrics": {name: [facts["metrics"].get(name) for facts in runs] for name in names}}


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return leaves


def chosen(listed: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """The entries of `listed` with these names; `ConfigError` for one that is not there."""
    by_name = {facts["name"]: facts for facts in listed}
    for name in names:
        if name not in by_name:
            raise ConfigError("RUN", name, ", ".join(by_name) or "a run; there is none here")
    return [by_name[name] for name in names]


def page(facts: dict[str, Any]) -> dict[str, str]:
    """`url` of the run in MLflow and, where its store is a file, the `command` that serves it on the loopback address."""
    driver = read_driver(Path(facts["run_dir"]))
    if not driver.get("run_id"):
        raise ConfigError("--open", facts["name"], "a run that was tracked in MLflow", f"Its folder is {facts['run_dir']}.")
    uri, run_id = driver["uri"], driver["run_id"]
    from diptych.pipelines.tracking import client

    experiment = client(uri).get_run(run_id).info.experiment_id
    served = uri if urlsplit(uri).scheme in ("http", "https") else f"http://127.0.0.1:{_PORT}"
    command = "" if served == uri else f"mlflow server --backend-store-uri {uri} --host 127.0.0.1 --port {_PORT}"
    return {"url": f"{served.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}", "command": command}


def show(found: dict[str, str]) -> None:
    """Open the page in a browser; a store that is a file is served from here until Ctrl-C."""
    if not found["command"]:
        webbrowser.open(found["url"])
        return
    note(f"serving MLflow on the loopback address until Ctrl-C; the run is at {found['url']}")
    words = found["command"].split()[1:]
    subprocess.run([sys.executable, "-m", "mlflow", *words], check=False)
