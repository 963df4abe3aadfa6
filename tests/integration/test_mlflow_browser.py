"""A sweep in MLflow's own pages, in a real browser: runs nested under their sweep, named, comparable; pictures and tables open."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from support_browser import Browser, chromium
from support_runs import make_shards

from diptych.pipelines import evaluate, tune
from diptych.pipelines.sweep import Budget

pytestmark = [pytest.mark.browser, pytest.mark.slow]
RATES = ("0.0001", "0.001", "0.01")


@contextmanager
def mlflow_ui(folder: Path) -> Iterator[str]:
    """The page that docs/quickstart.md opens, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = shutil.which("mlflow", path=str(Path(sys.executable).parent)) or "mlflow"
    log, url = folder / "mlflow-ui.log", f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        command = [program, "ui", "--backend-store-uri", "sqlite:///mlflow.db", "--port", str(port)]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while not answers(f"{url}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    """Whether the server is up."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def text(browser: Browser) -> str:
    """All that the page says at the moment."""
    return browser.driver.execute_script("return document.body.innerText")


def shown(browser: Browser, url: str, *words: str) -> None:
    """Open a page of MLflow and wait until it says all the words; its chat panel is closed."""
    browser.open(url)
    browser.driver.refresh()  # another place in the same page is no new page
    browser.wait(lambda: all(word in text(browser) for word in words))
    browser.driver.execute_script("document.querySelector('[data-component-id=\"mlflow.assistant.chat_panel.close\"]')?.click()")


def test_a_sweep_can_be_read_in_mlflow(ray_session: Any, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    fixed = [f"data.shards={shards}", "name=first", "train.steps=20", "validation.every_steps=10", "train.log_every=2"]
    definition = tune.define("coca", "", "smoke", "", fixed, [f"optim.lr={','.join(RATES)}"], {"method": "grid"})
    result = tune.run(definition, Budget(10**6))
    evaluate.run([result["trials"][0]["run_dir"]])
    runs = {trial["name"]: trial["run_id"] for trial in result["trials"]}
    experiment = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(result["run_id"]).info.experiment_id
    with mlflow_ui(tmp_path) as url, chromium(1400, 900) as browser:
        check_runs(browser, f"{url}/#/experiments/{experiment}/runs", list(runs))
        check_comparison(browser, url, experiment, list(runs.values()))
        sweep, trial = (f"{url}/#/experiments/{experiment}/runs/{run}/artifacts" for run in (result["run_id"], runs["t000"]))
        for place, name, words in (
            (sweep, "grid.jpg", ()),
            (sweep, "table.csv", ("optim.lr", "t001")),
            (trial, "samples/step_00000020.jpg", ()),
            (trial, "samples/step_00000020.json", ("columns", "rows")),
        ):
            check_artifact(browser, place, name, words)


def check_runs(browser: Browser, url: str, names: list[str]) -> None:
    """Named, and the trials under their sweep once it is unfolded."""
    shown(browser, url, "first")
    place = "const link = [...document.querySelectorAll('.ag-row a')].find(each => each.innerText.trim() === arguments[0]);"
    script = browser.driver.execute_script

    def left_edges() -> list[float]:
        """Of the names, the sweep's first; unfolds it where the page, which folds it whenever it has loaded, has done so."""
        edges = [script(f"{place} return link?.getBoundingClientRect().left", name) for name in ("first", *names)]
        if None in edges:
            script(f"{place} link?.closest('.ag-row').querySelector('button[data-component-id*=runnamecell]')?.click()", "first")
            time.sleep(1)
        return [] if None in edges else edges

    browser.wait(left_edges)
    time.sleep(3)  # what was still loading has arrived
    sweep, *trials = browser.wait(left_edges)
    assert set(trials) == {trials[0]}
    assert trials[0] > sweep, "set in below the sweep"
    browser.screenshot("mlflow-runs")


def check_comparison(browser: Browser, url: str, experiment: str, runs: list[str]) -> None:
    """What differs side by side: the searched parameter, the figures, and nothing of each run's own folder."""
    chosen = urllib.parse.urlencode({"runs": json.dumps(runs), "experiments": json.dumps([experiment])})
    shown(browser, f"{url}/#/compare-runs?{chosen}", "optim.lr", *RATES, "val/loss", "t000", "t001", "t002")
    axes = "return [...document.querySelectorAll('.parcoords .axis-title')].map(each => each.textContent)"
    found = browser.wait(lambda: browser.driver.execute_script(axes))
    assert found[:2] == ["name", "optim.lr"]
    assert "task.tokenizer" not in found
    browser.screenshot("mlflow-compare")


def check_artifact(browser: Browser, url: str, name: str, words: tuple[str, ...]) -> None:
    """Opened by its name in the tree: a table or text that says the words, or a picture that is there."""
    script = browser.driver.execute_script
    shown(browser, url, name.partition("/")[0])
    for part in name.split("/"):
        node = f"document.querySelector('[artifact-name=\"{part}\"]')"
        browser.wait(lambda node=node: script(f"return {node} !== null"))
        script(f"{node}.click()")
    if words:
        browser.wait(lambda: all(word in text(browser) for word in words))
    else:
        browser.wait(lambda: script("return [...document.querySelectorAll('img')].some(each => each.naturalWidth > 100)"))
    browser.screenshot(f"mlflow-{name.replace('/', '-')}")
