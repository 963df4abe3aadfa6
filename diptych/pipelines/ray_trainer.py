"""A run on Ray: a group of workers under Ray Train, or one task; `session.py` is what they run.

Of Ray Train's helpers the group has only those that a run here has a use for. Each is a process of its own, which takes 2 s of a processor to
start, just while the workers start too. No dataset is handed to Ray Train: every worker reads its own stream. And where the run's Ray
ends with its driver, no node is taken back, and nobody is left to clean up for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from diptych.config import RunConfig
from diptych.pipelines import ray_context
from diptych.pipelines.failures import FailureLog
from diptych.pipelines.process_group import ProcessGroupConfig
from diptych.pipelines.session import train_alone, train_worker


class _Trainer(DataParallelTrainer):
    outlived = True
    """Whether the Ray that the run is on goes on without its driver, as a cluster's does, or that of a sweep."""

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback,) if self.outlived else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


def fit(config: RunConfig, payload: dict[str, Any], run_dir: Path, outlived: bool) -> None:
    """Train `payload` (see `session.payload_of`) with a group of workers, until they have all ended; raises what they or Ray raise for good.

    `outlived`: the Ray goes on without this driver.
    """
    cluster = config.cluster
    # Relative paths in the configuration mean the driver's working folder, in the workers too.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_start_timeout(config)))
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    # Each loss of a node may cost an elastic run one start that finds no room, see `_start_timeout`.
    controller_failures = cluster.controller_failures + (cluster.max_failures if ray_context.is_elastic(config) else 0)
    backend = "nccl" if cluster.gpus_per_worker else "gloo"
    trainer = _Trainer(
        train_worker,
        train_loop_config=payload,
        backend_config=ProcessGroupConfig(backend=backend, timeout_s=int(config.train.collective_timeout_seconds)),
        scaling_config=ScalingConfig(
            num_workers=config.workers if isinstance(config.workers, int) else (config.least_workers, config.most_workers),
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=cluster.resize_seconds,
        ),
        # Our own checkpoints are the authority; a new name each time keeps Ray from restoring its snapshot of an earlier try.
        run_config=RayRunConfig(
            name=f"ray-{time.time_ns()}",
            storage_path=cluster.storage or str(run_dir / "ray"),
            callbacks=[FailureLog(str(run_dir))],
            failure_config=FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=controller_failures),
        ),
    )
    trainer.outlived = outlived
    # The controller would ask for it when it has started itself, and wait.
    get_or_create_autoscaling_coordinator()
    with nullcontext() if outlived else _without_preemption_watcher():
        trainer.fit()


def _start_timeout(config: RunConfig) -> float:
    """Seconds until workers that find no room are planned anew.

    Ray counts a lost node as room for some 20 s more: an elastic group planned then must not wait for it long.
    """
    waits = config.cluster.autoscaling or not ray_context.is_elastic(config)
    return config.cluster.start_timeout_seconds if waits else min(30.0, config.cluster.start_timeout_seconds)


@contextmanager
def _without_preemption_watcher() -> Iterator[None]:
    """Unless the user has decided."""
    if ENABLE_PREEMPTION_WATCHER_ENV_VAR in os.environ:
        yield
        return
    os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "0"
    try:
        yield
    finally:
        del os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR]


def fit_alone(config: RunConfig, payload: dict[str, Any], run_dir: Path) -> None:
    """A trial of one worker as one Ray task: no group of workers has to come up, and later trials find its process warm."""
    task = ray.remote(train_alone).options(
        name=run_dir.name,
        num_cpus=ray_context.required_cpus(config),
        num_gpus=config.cluster.gpus_per_worker,
        max_retries=config.cluster.max_failures,
        retry_exceptions=True,
    )
    ray.get(task.remote(payload))
