"""How much memory does every process of the demo take, and does memory grow over a long run?

    .venv/bin/python benchmarks/memory.py OUT --minutes 60

The demo runs whole, and what the largest process of each kind had at its peak is noted, as for every benchmark (`_memory.Peaks`).

Then a small CoCa learns generated scenes with two workers through Ray Data, with logging, tracking, validation and checkpoints, for `--minutes`,
and is asked to stop. Every ten seconds the private memory (USS, what the process alone would give back) of the driver, Ray's controller,
workers, read workers and services is noted, by role. The first quarter is left to warm up; a straight line through the rest says by how
much a role grew over the run. Exit status 1 if the driver, the controller or the workers grew by more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from _fresh import environment
from _memory import kind_of
from _results import Results, Row, add_option
from scene_shards import write_scenes

EVERY_SECONDS, WARM_UP, MOST_GROWTH = 10.0, 0.25, 2.0
ROLES = {
    "TrainController (Ray)": "Ray Train's controller",
    "RayTrainWorker (Ray)": "training workers",
    "ReadSlots (Ray)": "read workers",
    "IDLE (Ray)": "read workers",
    "raylet": "raylet",
    "gcs_server": "gcs_server",
}
JUDGED = ("driver", "Ray Train's controller", "training workers")


def role_of(process: psutil.Process, driver: int) -> str:
    """By the kind of process."""
    return "driver" if process.pid == driver else ROLES.get(kind_of(process.cmdline()), "other services of Ray")


def sample(driver: psutil.Process) -> dict[str, float]:
    """Role → MB of private memory."""
    found: dict[str, float] = {}
    for process in [driver, *driver.children(recursive=True)]:
        try:
            role = role_of(process, driver.pid)
            found[role] = found.get(role, 0.0) + process.memory_full_info().uss / 1e6
        except psutil.Error:
            continue
    return found


def growth(values: list[float]) -> float:
    """Percent by which a straight line through `values` rises from its first to its last point."""
    if len(values) < 3:
        return 0.0
    slope, start = statistics.linear_regression(range(len(values)), values)
    return 100 * slope * (len(values) - 1) / start


def of_demo(out: Path, results: Results) -> None:
    """The demo, from nothing."""
    folder = out / f"demo-{time.time_ns()}"
    with (out / "demo.log").open("w") as log:
        command = [sys.executable, "-m", "diptych.pipelines.demo", "--out", str(folder)]
        status = subprocess.run(command, cwd=out, env=environment(), stdout=log, stderr=log, check=False).returncode
    if status:
        raise SystemExit(f"the demo ended with {status}: {(out / 'demo.log').read_text()[-2000:]}")
    for kind, megabytes in sorted(results.peaks.megabytes.items()):
        results.add(Row(f"the demo: peak memory of the largest process, {kind}", "MB", [megabytes]))


def of_long_run(out: Path, options: argparse.Namespace, results: Results) -> None:
    """Growth by role."""
    write_scenes(out / "shards", 4000, 64)
    name = f"memory-{time.time_ns()}"
    command = [
        sys.executable,
        "-m",
        "diptych.pipelines.train",
        "coca",
        "--recipe",
        "smoke",
        f"data.shards={out / 'shards'}",
        f"name={name}",
    ]
    command += ["workers=2", "train.steps=100000000", "train.log_every=50", "validation.every_steps=2000", "checkpoint.every_steps=2000"]
    samples: list[dict[str, float]] = []
    with (out / "memory.log").open("w") as log:
        running = subprocess.Popen([*command, *options.overrides], cwd=out, env=environment(), stdout=log, stderr=log)
        driver, begin = psutil.Process(running.pid), time.monotonic()
        while time.monotonic() - begin < 60 * options.minutes and running.poll() is None:
            time.sleep(EVERY_SECONDS)
            samples.append(sample(driver))
        running.send_signal(signal.SIGINT)
        status = running.wait(300)
    (out / "memory.json").write_text(json.dumps(samples))
    if status:
        raise SystemExit(f"the run ended with {status}: {(out / 'memory.log').read_text()[-2000:]}")
    state = json.loads((out / "runs" / name / "result.json").read_text())
    kept = samples[int(WARM_UP * len(samples)) :]
    case = f"CoCa of the recipe smoke, 2 workers, {options.minutes:g} minutes"
    results.add(Row(f"{case}: steps", "steps", [state["step"]]))
    for role in sorted({role for one in kept for role in one}, key=lambda role: (role not in JUDGED, role)):
        values = [one[role] for one in kept if role in one]
        results.add(Row(f"{case}: private memory of {role}, at most", "MB", [max(values)]))
        goal = {"at_most": MOST_GROWTH} if role in JUDGED else {}
        results.add(Row(f"{case}: growth of {role} after the first quarter", "%", [growth(values)], headline=role in JUDGED, **goal))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60, help="of the long run; 0 leaves it out")
    parser.add_argument("--without-demo", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    add_option(parser)
    options = parser.parse_intermixed_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = Results(__file__, options.results)
    if not options.without_demo:
        of_demo(out, results)
    if options.minutes:
        of_long_run(out, options, results)
    sys.exit(0 if results.finish() else 1)


if __name__ == "__main__":
    main()
