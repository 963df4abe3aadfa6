"""Twenty kills in one run, on a Ray of several nodes on this machine: nothing is lost, nothing twice, one run in MLflow.

    python benchmarks/kills.py OUT [--kills 20] [--seed 0] [--workers 2..3]

Each kill takes a worker, a node (which another one replaces) or the driver (which is started again with the same command), at a random
moment: so many steps after the last one, while a checkpoint is being written, or during start-up. A driver that ends with an error is
started again with the same command too, as a person would, and counted. Prints a line per kill, and at the end what was checked. Peers: none that we know of resumes a run at the sample where it was killed, so there is nothing to run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from _results import Results, Row, add_option

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))
from support_cluster import NodesOfRay, nodes_of_ray, ray_variables  # noqa: E402
from support_runs import logged_step, make_shards, overrides, trace_of, writing_checkpoint  # noqa: E402

GLOBAL_BATCH = 8
MOMENTS = ("steps", "steps", "upload", "start-up")
PATIENCE_SECONDS = 1500
"""For a moment to come. Ray's coordinator keeps the claim of a killed driver for 3 minutes, and its successor waits for that."""
RESTARTS = 10
"""Drivers that may end with an error before the run counts as failed."""


class Run:
    """One run, its driver, and the nodes below it."""

    def __init__(self, folder: Path, nodes: NodesOfRay, steps: int, workers: str) -> None:
        self.folder, self.nodes, self.run_dir = folder, nodes, folder / "runs" / "killed"
        shards = make_shards(folder / "shards")
        changes: dict[str, Any] = {"train__steps": steps, "checkpoint__every_steps": 7, "workers": workers, "cluster__resize_seconds": 5}
        changes |= {"cluster__max_failures": 100, "cluster__controller_failures": 100}
        self.arguments = overrides(shards, "killed", **changes)
        self.restarts = 0
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """The same command each time."""
        command = [sys.executable, "-m", "diptych.pipelines.train", "coca", *self.arguments, "--json"]
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        variables = os.environ | self.nodes.environment | {"MLFLOW_TRACKING_URI": store}
        with (self.folder / "driver.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=variables, stdout=log, stderr=log)

    def restart(self) -> None:
        """After a driver that ended with an error, which is told and counted."""
        self.restarts += 1
        print(f"  the driver ended with {self.driver.returncode}; starting it again", flush=True)
        if self.driver.returncode == 2 or self.restarts > RESTARTS:
            raise SystemExit(f"the run does not go on; see {self.folder}/driver.log")
        self.driver = self.start()

    def attempts(self) -> int:
        """Starts of the worker group so far."""
        return len(list((self.run_dir / "attempts").glob("[0-9]*.json"))) if self.run_dir.is_dir() else 0

    def await_moment(self, moment: str, rng: random.Random) -> None:
        """Return at the moment to kill; a driver that failed is started again meanwhile."""
        begin, first, seen = time.monotonic(), logged_step(self.run_dir) if self.run_dir.is_dir() else 0, self.attempts()
        wait, steps = rng.uniform(1, 15), rng.randint(3, 40)
        while time.monotonic() - begin < PATIENCE_SECONDS:
            if self.driver.poll() == 0:
                raise SystemExit("the run ended before all kills were made: raise --steps")
            if self.driver.poll() is not None:
                self.restart()
            if moment == "start-up" and time.monotonic() - begin > wait:
                return
            if moment == "steps" and self.attempts() > 0 and logged_step(self.run_dir) >= first + steps:
                return
            if moment == "upload" and self.attempts() >= max(seen, 1) and writing_checkpoint(self.run_dir):
                return
            time.sleep(0.01)
        raise SystemExit(f"{moment} did not come in {PATIENCE_SECONDS} s; see {self.folder}/driver.log")

    def kill(self, what: str, rng: random.Random) -> str:
        """Kill it; what was really hit."""
        if what == "worker":
            found = [process for process in psutil.process_iter() if self._is_worker(process)]
            if found:
                with suppress(psutil.NoSuchProcess):
                    rng.choice(found).kill()
                return "worker"
            what = "driver"
        if what == "node":
            node = rng.choice(sorted(self.nodes.cluster.worker_nodes, key=lambda each: str(each.node_id)))
            self.nodes.kill(node)
            self.nodes.add()
            return "node"
        self.driver.kill()
        self.driver.wait()
        self.driver = self.start()
        return "driver"

    def _is_worker(self, process: psutil.Process) -> bool:
        try:
            return "RayTrainWorker" in " ".join(process.cmdline()) and self.nodes.owns(process)
        except psutil.Error:
            return False

    def finish(self) -> dict[str, Any]:
        """Wait for the end; the driver's result."""
        while self.driver.wait() != 0:
            self.restart()
        return json.loads((self.folder / "driver.log").read_text().strip().splitlines()[-1])


def check(run: Run, result: dict[str, Any], steps: int) -> dict[str, bool]:
    """What must hold afterwards."""
    from mlflow import MlflowClient

    rows = trace_of(run.run_dir)
    store = MlflowClient(f"sqlite:///{run.folder / 'mlflow.db'}")
    runs = store.search_runs([each.experiment_id for each in store.search_experiments()])
    logged = sorted(point.step for point in store.get_metric_history(result["run_id"], "train/loss"))
    return {
        "finished": (result["status"], result["step"]) == ("finished", steps),
        "every slot once, in order": [slot for _, slot, _, _ in rows] == list(range(steps * GLOBAL_BATCH)),
        "the samples of an undisturbed run": rows == undisturbed(run, steps),
        "one MLflow run, FINISHED": [(each.info.run_id, each.info.status) for each in runs] == [(result["run_id"], "FINISHED")],
        "every logged step once": logged == list(range(5, steps + 1, 5)),
    }


def undisturbed(run: Run, steps: int) -> list[tuple[int, int, str, str]]:
    """The trace of the same run by one worker in this process."""
    from _runs import train

    from diptych.config import apply_overrides, load_recipe
    from diptych.datasets.manifest import open_manifest
    from diptych.pipelines.trace import write_trace

    given = overrides(run.folder / "shards", "alone", workers=1, train__steps=steps, validation__samples=0, checkpoint__every_steps=0)
    train(apply_overrides(load_recipe("coca", "smoke"), given), run.folder / "alone")
    write_trace(run.folder / "alone", open_manifest(str(run.folder / "shards")))
    return trace_of(run.folder / "alone")


def disturb(run: Run, kills: int, rng: random.Random) -> dict[str, int]:
    """Kill so many times, a line for each; how often what was killed when."""
    counts: dict[str, int] = {}
    begin = time.monotonic()
    for number in range(1, kills + 1):
        what, moment = rng.choice(("worker", "node", "driver")), rng.choice(MOMENTS)
        run.await_moment(moment, rng)
        step = logged_step(run.run_dir) if run.run_dir.is_dir() else 0
        hit = run.kill(what, rng)
        counts[f"{hit} ({moment})"] = counts.get(f"{hit} ({moment})", 0) + 1
        print(f"{time.monotonic() - begin:6.0f} s  kill {number:2d}: {hit:6} {moment:8} at logged step {step}", flush=True)
    return counts


def main() -> None:
    """Kill, then check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--workers", default="2..3")
    add_option(parser)
    options = parser.parse_args()
    results = Results(__file__, options.results)
    folder = options.out.resolve() / str(time.time_ns())
    folder.mkdir(parents=True)
    begin = time.monotonic()
    # Nodes hand their environment on to the workers, which must find this checkout and no other.
    os.environ.update(ray_variables() | {"PYTHONPATH": str(REPOSITORY)})
    with pytest.MonkeyPatch.context() as patch, nodes_of_ray(patch) as nodes:
        for _ in range(3):
            nodes.add()
        run = Run(folder, nodes, options.steps, options.workers)
        try:
            counts = disturb(run, options.kills, random.Random(options.seed))
            result = run.finish()
        finally:
            run.driver.kill()
        attempts = run.attempts()
    checks = check(run, result, options.steps)
    for name, held in checks.items():
        print(f"{'ok ' if held else 'NOT'} {name}")
        results.check(f"after {options.kills} kills of one run: {name}", held)
    results.add(Row(f"after {options.kills} kills of one run: starts of the worker group", "", [attempts]))
    results.add(Row(f"after {options.kills} kills of one run: drivers that ended with an error", "", [run.restarts]))
    results.finish()
    print(
        json.dumps(
            {"kills": counts, "attempts": attempts, "restarts": run.restarts, "seconds": round(time.monotonic() - begin), "checks": checks}
        )
    )
    raise SystemExit(not all(checks.values()))


if __name__ == "__main__":
    main()
