"""What runs on every training worker: build task, strategy and streams, train, leave the result in the run folder.

`train_worker` is Ray Train's entry; `run_session` is the same without Ray, for a process group that somebody else made.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.batches import StepBatch
from diptych.config import ConfigError, RunConfig
from diptych.pipelines import ray_context
from diptych.pipelines.runs_folder import read_driver, records_url, replace_text
from diptych.pipelines.samples import write_samples
from diptych.pipelines.tracking import driver_identity
from diptych.pipelines.trial import SweepStops
from diptych.redaction import clean_text

if TYPE_CHECKING:
    import torch

    from diptych.datasets.stream import StreamSpec
    from diptych.pipelines.prepare import Prepared
    from diptych.pipelines.trial import Trial
    from diptych.trainers.attempts import Attempt
    from diptych.trainers.loop import Callbacks
    from diptych.trainers.task import Batch, Task
    from diptych.trainers.world import World

StreamFactory = Callable[["StreamSpec", int, int, int, int | None], Iterable[StepBatch]]
"""`(spec, rank, world_size, start_step, stop_step)` → this worker's shares; a stop of None is the end of a finite stream."""


def payload_of(prepared: Prepared, run_dir: Path, trial: Trial | None = None) -> dict[str, Any]:
    """What a worker is handed: configuration, run folder, its records, its driver, streams, the data's digest, where a sweep stops it; small and picklable."""
    return {
        "driver": driver_identity(),
        "config": prepared.config.to_json(),
        "run_dir": str(run_dir),
        "records": records_url(prepared.config, run_dir),
        "train": prepared.train,
        "validation": prepared.validation,
        "digest": prepared.facts["digest"],
        "until": trial.until if trial else 0,
        "rungs": trial.rungs if trial else (),
        "cwd": os.getcwd(),
    }


def train_worker(payload: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`."""
    import ray.train
    import torch

    from diptych.pipelines.process_group import own_device

    config = RunConfig.from_json(payload["config"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    make_stream = _make_stream(config, ray.train.get_context().get_world_size())
    run_session(payload, config, own_device(bool(config.cluster.gpus_per_worker)), make_stream, notice=_PreemptionNotice())


def _make_stream(config: RunConfig, world_size: int) -> StreamFactory:
    """Read tasks on `cluster.data_cpus`, or threads of the worker where that is 0; the shares are the same.

    Where every core trains, readers and the processes of Ray Data have none of their own, and each hold-up of one worker holds up all.
    """
    if not config.cluster.data_cpus:
        return own_reading(config)
    from diptych.datasets.ray_stream import RayStream

    return partial(RayStream, cpus=config.cluster.data_cpus / world_size, claims=not ray_context.is_elastic(config))


def own_reading(config: RunConfig) -> StreamFactory:
    """`cluster.read_threads` of this process."""
    from diptych.datasets.stream import LocalStream

    return partial(LocalStream, threads=config.cluster.read_threads)


def train_alone(payload: dict[str, Any]) -> None:
    """The same for a run of one worker that needs no process group: the body of a Ray task, which reads its shards itself."""
    import torch

    config = RunConfig.from_json(payload["config"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # Relative paths in the configuration mean the driver's working folder, where this node has it.
    if os.path.isdir(payload["cwd"]):
        os.chdir(payload["cwd"])
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    run_session(payload, config, torch.device("cuda" if config.cluster.gpus_per_worker else "cpu"), own_reading(config))


def run_session(
    payload: dict[str, Any],
    config: RunConfig,
    device: torch.device,
    make_stream: StreamFactory,
    notice: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train from where the run stands to its end; rank 0 also writes `result.json`.

    Errors that all workers raise together and that a retry would only repeat (a spent fault budget, a diverged loss, a full disk, a
    configuration that does not fit) end the run as `failed`; everything else is raised, and Ray tries again. A group that was
    superseded ends as `fenced` and leaves no result: tried again, it would supersede the group that has taken over.
    """
    import torch

    from diptych.trainers.attempts import Fenced
    from diptych.trainers.guard import Diverged
    from diptych.trainers.host_memory import keep_freed_memory
    from diptych.trainers.loop import train
    from diptych.trainers.precision import denormals_flushed, set_deterministic
    from diptych.trainers.progress import FaultBudgetExceeded
    from diptych.trainers.recorder import Recorder, start_attempt
    from diptych.trainers.runfolder import StorageFailed
    from diptych.trainers.strategies import make_strategy
    from diptych.trainers.tasks import load_task_class
    from diptych.trainers.world import World

    run_dir = Path(payload["run_dir"])
    world = World.current(device)
    if device.type == "cpu":
        keep_freed_memory()
    result: dict[str, Any]
    try:
        with denormals_flushed():
            if config.train.deterministic:
                set_deterministic()
            torch.manual_seed(config.seed)
            strategy = make_strategy(config, load_task_class(config.task.name)(config.task, config.seed), device)
            _check_driver(payload["driver"], run_dir, world)
            attempt = start_attempt(payload["records"], world)
            recorder = Recorder(payload["records"], attempt, world, config, payload["digest"])

            def stream(step: int) -> Iterable[StepBatch]:
                return make_stream(payload["train"], world.rank, world.size, step, config.train.steps)

            def validation() -> Iterable[StepBatch]:
                return make_stream(payload["validation"], world.rank, world.size, 0, None)

            held_out = validation if payload["validation"] is not None else None
            callbacks = replace(_callbacks(payload, config, attempt, world.rank), should_save=notice)
            ended = train(config, strategy, stream, held_out, recorder, callbacks=callbacks)
            result = {"status": ended.status, "step": ended.step, "samples": ended.samples, "metrics": ended.metrics, "error": ""}
    except (ConfigError, Diverged, FaultBudgetExceeded, Fenced, StorageFailed) as error:
        if isinstance(error, StorageFailed) and not error.lasting:
            raise
        status = "fenced" if isinstance(error, Fenced) else "failed"
        result = {"status": status, "step": 0, "samples": 0, "metrics": {}, "error": clean_text(str(error))}
    result["world_size"] = world.size
    if world.rank == 0 and result["status"] != "fenced":
        replace_text(run_dir / "result.json", json.dumps(result))
    return result


def _check_driver(driver: str, run_dir: Path, world: World) -> None:
    """Raise `Fenced`, on every worker, if the run has another driver by now: Ray may start workers again for one that is gone."""
    from diptych.trainers.attempts import Fenced

    found = world.broadcast_object(read_driver(run_dir).get("driver") if world.rank == 0 else None)
    if found and found != driver:
        raise Fenced(f"the run in {run_dir} is driven by {found} now; the workers of {driver} do not start")


def _callbacks(payload: dict[str, Any], config: RunConfig, attempt: Attempt, rank: int) -> Callbacks:
    from diptych.datasets.ledger import Ledger
    from diptych.trainers.loop import Callbacks

    run_dir = Path(payload["run_dir"])
    ledger = Ledger(payload["records"], attempt.attempt)
    shows = payload["validation"] is not None and config.tracking.samples and rank == 0
    looked_at: list[Batch] = []

    def show(step: int, task: Task) -> None:
        if not shows:
            return
        if not looked_at:
            looked_at.append(_first_samples(payload["validation"], config.tracking.samples, task))
        write_samples(run_dir / "samples", step, task, looked_at[0])

    return Callbacks(should_stop=_should_stop(payload, attempt, rank), record_faults=ledger.record, show=show)


def _first_samples(spec: StreamSpec, count: int, task: Task) -> Batch:
    """The first held-out samples, read by this worker alone, on the task's device."""
    from diptych.datasets.stream import LocalStream
    from diptych.trainers.micro_batches import to_device

    share = next(iter(LocalStream(replace(spec, global_batch_size=min(count, spec.selection.samples), micro_batches=1), 0, 1, 0, 1)))
    return to_device(share.arrays, next(task.parameters()).device)


def _should_stop(payload: dict[str, Any], attempt: Attempt, rank: int) -> Callable[[], bool]:
    stop_file = _StopFile(Path(payload["run_dir"]) / "stop")
    if not payload["until"] and not payload["rungs"]:
        return stop_file
    return SweepStops(stop_file, Path(payload["run_dir"]), attempt.start_step, payload["until"], payload["rungs"] if rank == 0 else ())


class _StopFile:
    """Whether the driver has asked to stop; looks at most twice a second. Lives in its worker and travels nowhere."""

    def __init__(self, path: Path) -> None:
        self.path, self._next, self._asked = path, 0.0, False

    def __call__(self) -> bool:
        if not self._asked and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.5
            self._asked = self.path.exists()
        return self._asked


class _PreemptionNotice:
    """Whether to save because a node of the group is about to be taken back: at the notice, and twice a minute until then.

    Ray tells every worker of the group, so a read of this worker's own copy needs no word with the others.
    """

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self) -> bool:
        from ray.train.v2._internal.execution.context import get_train_context

        if get_train_context().preemption_context.preemption_info is None or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 30.0
        return True
