"""Promise 1: a run that was killed and resumed is the run that was never killed.

The same sample at every slot, and on the same number of workers the same weights, averages and optimizer state bit for
bit. Workers are killed below a shared Ray; drivers and whole Rays are processes of their own.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from support_runs import (
    final_bytes,
    finish_driver,
    kill_tree,
    logged_step,
    make_shards,
    overrides,
    start_driver,
    trace_of,
    train_workers,
    wait_for,
    writing_checkpoint,
)

STEPS = 60
# Up to four starts of Ray in one test, minutes each where the cores are busy with something else.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


def train(arguments: list[str]) -> dict[str, Any]:
    from diptych.pipelines import train

    return train.run(train.resolve("coca", "smoke", "", arguments))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, shards: Path, ray_session: Any) -> dict[int, Path]:
    """Runs that nobody disturbed, by number of workers; made when first asked for."""
    folder = tmp_path_factory.mktemp("references")

    class Made(dict[int, Path]):
        def __missing__(self, workers: int) -> Path:
            result = train([*overrides(shards, f"whole{workers}", workers=workers), f"output={folder}", "tracking.enabled=false"])
            assert (result["status"], result["step"]) == ("finished", STEPS)
            self[workers] = Path(result["run_dir"])
            return self[workers]

    return Made()


def assert_same_run(run_dir: Path, reference: Path) -> None:
    slots = [slot for _, slot, _, _ in trace_of(run_dir)]
    assert slots == list(range(STEPS * 8)), "every slot once, in order"
    assert trace_of(run_dir) == trace_of(reference)
    ours, theirs = final_bytes(run_dir), final_bytes(reference)
    assert set(ours) == {"model.safetensors", "optimizer.safetensors", "ema.safetensors"}
    assert ours == theirs


def assert_one_finished_mlflow_run(store: str, run_id: str, stopped_at: int = STEPS) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [(run.info.run_id, run.info.status) for run in runs] == [(run_id, "FINISHED")]
    steps = [metric.step for metric in client.get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == sorted({*range(5, STEPS + 1, 5), stopped_at}), "each logged step once, and the last before a stop"


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_worker(shards: Path, references: dict[int, Path], tmp_path: Path, workers: int) -> None:
    """Off a checkpoint's boundary, below a driver that goes on: Ray Train replaces the workers."""
    reference = references[workers]
    results: list[dict[str, Any]] = []
    arguments = overrides(shards, "killed", workers=workers)
    thread = threading.Thread(target=lambda: results.append(train(arguments)))
    thread.start()
    run_dir = tmp_path / "runs" / "killed"
    wait_for(lambda: logged_step(run_dir) >= 20, None)
    train_workers()[-1].kill()
    thread.join(900)
    assert results, "the run did not end"
    assert results[0]["status"] == "finished"
    assert len(list((run_dir / "attempts").iterdir())) == 2
    assert_same_run(run_dir, reference)
    assert_one_finished_mlflow_run(f"sqlite:///{tmp_path / 'mlflow.db'}", results[0]["run_id"])


@pytest.mark.parametrize(
    ("workers", "what"),
    [
        (2, "driver in a write"),
        pytest.param(3, "driver in a write", marks=pytest.mark.slow),
        pytest.param(2, "whole Ray", marks=pytest.mark.slow),
        pytest.param(3, "whole Ray", marks=pytest.mark.slow),
        pytest.param(2, "everything", marks=pytest.mark.slow),
        pytest.param(3, "everything", marks=pytest.mark.slow),
    ],
)
def test_a_killed_driver_or_ray(shards: Path, references: dict[int, Path], tmp_path: Path, workers: int, what: str) -> None:
    reference = references[workers]
    # A checkpoint at every step while it is killed, so that one is being written at any time.
    arguments = overrides(shards, "killed", workers=workers, **({"checkpoint__every_steps": 1} if "write" in what else {}))
    run_dir = tmp_path / "runs" / "killed"
    first = start_driver(arguments, tmp_path)
    wait_for(lambda: logged_step(run_dir) >= 20, first)
    if "write" in what:
        wait_for(lambda: writing_checkpoint(run_dir), first)
        first.kill()
    else:
        kill_tree(first, with_driver=what == "everything")
    first.communicate(timeout=300)
    assert first.returncode != 0
    second = finish_driver(start_driver(arguments, tmp_path))
    assert (second["status"], second["step"]) == ("finished", STEPS)
    assert_same_run(run_dir, reference)
    assert_one_finished_mlflow_run(f"sqlite:///{tmp_path / 'mlflow.db'}", str(second["run_id"]))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_goes_on(shards: Path, references: dict[int, Path], tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, which reaches every process of the terminal, and SIGTERM, which reaches the driver."""
    from mlflow import MlflowClient

    reference = references[2]
    arguments = overrides(shards, "stopped", workers=2, checkpoint__every_steps=0)
    run_dir = tmp_path / "runs" / "stopped"
    first = start_driver(arguments, tmp_path)
    wait_for(lambda: logged_step(run_dir) >= 20, first)
    (os.killpg if number == signal.SIGINT else os.kill)(first.pid, number)
    stopped = finish_driver(first)
    assert stopped["status"] == "stopped"
    assert [path.name for path in run_dir.glob("checkpoints/step_*")] == [f"step_{stopped['step']:08d}-a0001"]
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert MlflowClient(store).get_run(str(stopped["run_id"])).info.status == "KILLED"
    second = finish_driver(start_driver(arguments, tmp_path))
    assert second["run_id"] == stopped["run_id"]
    assert_same_run(run_dir, reference)
    assert_one_finished_mlflow_run(store, str(second["run_id"]), int(str(stopped["step"])))


def test_who_reads_changes_nothing(shards: Path, references: dict[int, Path], tmp_path: Path) -> None:
    """Workers that read for themselves, and after a stop read tasks: the run of read tasks alone."""
    for readers, threads, steps in ((0, 3, 23), (2, 1, STEPS)):
        result = train(overrides(shards, "threads", train__steps=steps, cluster__data_cpus=readers, cluster__read_threads=threads))
        assert (result["status"], result["step"]) == ("finished", steps)
    assert_same_run(tmp_path / "runs/threads", references[2])


@pytest.mark.slow
def test_fewer_workers_after_a_stop_see_the_same_samples(shards: Path, ray_session: Any, tmp_path: Path) -> None:
    """4 → 3 → 1 workers with a global batch of 8, which 3 does not divide."""
    whole = train(overrides(shards, "whole", workers=1))
    for workers, steps in ((4, 20), (3, 41), (1, STEPS)):
        result = train(overrides(shards, "elastic", workers=workers, train__steps=steps))
        assert (result["step"], result["world_size"]) == (steps, workers)
    assert trace_of(tmp_path / "runs/elastic") == trace_of(tmp_path / "runs/whole")
    losses = [_losses(tmp_path / "runs" / name) for name in ("whole", "elastic")]
    # The last step of each part is logged too, on its cadence or not.
    assert set(losses[1]) - set(losses[0]) == {41}
    assert {step: losses[1][step] for step in losses[0]} == pytest.approx(losses[0], abs=1e-4)
    assert result["metrics"]["val/loss"] == pytest.approx(whole["metrics"]["val/loss"], abs=1e-4)


def _losses(run_dir: Path) -> dict[int, float]:
    from diptych.trainers.journal import read_metrics

    return {line["step"]: line["metrics"]["train/loss"] for line in read_metrics(str(run_dir)) if "train/loss" in line["metrics"]}
