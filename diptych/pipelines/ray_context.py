"""Starting or joining Ray, and refusing beforehand what it could never schedule.

Only `pipelines` starts Ray. A local Ray declares as many logical CPUs as the job needs, because Ray Train, Ray Data and
Tune each hold some and a job that lacks one hangs without a word; the preflight bounds how far that may go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diptych.config import ConfigError, RunConfig

WORKER_GB = 0.75
"""Resident memory of a training worker with torch, Ray and a small model, measured on a CPU."""

KEEP_READERS = ("RAY_idle_worker_killing_time_threshold_ms", "60000")
"""Ray ends a process that was idle for a second, and between two blocks a reader is; the next one takes two seconds of a processor to begin."""
LOCAL_SETTINGS = dict([KEEP_READERS]) | {
    # Local workers share this environment, so nothing need be shipped to them.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Of the processes that Ray starts ahead of any work one would never have some.
    "RAY_prestart_worker_first_driver": "0",
    # Nobody collects the metrics of a Ray without a dashboard, and of its logs new files are looked for twice a second, not ten times.
    "RAY_enable_metrics_collection": "0",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "1",
}
"""Of a local Ray, where the environment does not say otherwise; a cluster's operator decides for themselves."""


def required_cpus(config: RunConfig, workers: int = 0) -> float:
    """Logical CPUs that a run holds with `workers` (0 = its most) workers: theirs and its readers', unless it is elastic.

    Elastic workers take every CPU that is free, so their readers must not need one to be left: they claim none.
    """
    claimed = 0 if is_elastic(config) else config.cluster.data_cpus
    return (workers or config.most_workers) * config.cluster.cpus_per_worker + claimed


def is_elastic(config: RunConfig) -> bool:
    """Whether the number of workers follows the cluster."""
    return config.most_workers > config.least_workers


def joins_cluster(config: RunConfig) -> bool:
    """Whether the run joins a Ray that somebody else started."""
    return bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))


def preflight(config: RunConfig) -> None:
    """Refuse, before any Ray starts, what a local Ray could never schedule; raises `ConfigError` with the arithmetic."""
    _check_elastic(config)
    _check_kept(config)
    if joins_cluster(config):
        return
    import psutil

    cores = os.cpu_count() or 1
    workers, needed = config.most_workers, required_cpus(config)
    for_data = needed - workers * config.cluster.cpus_per_worker
    arithmetic = f"{workers} workers × {config.cluster.cpus_per_worker:g} + {for_data:g} for data = {needed:g} CPUs"
    declared = config.cluster.logical_cpus
    if declared and needed > declared:
        raise ConfigError(
            "cluster.logical_cpus", declared, f"at least {needed:g}: {arithmetic}", "Raise it, or lower workers or cluster.data_cpus."
        )
    most_workers = max(8, 4 * cores)
    if workers > most_workers:
        raise ConfigError(
            "workers",
            config.workers,
            f"at most {most_workers} on this machine of {cores} cores ({arithmetic})",
            "Lower workers, or join a cluster with cluster.address.",
        )
    memory_gb = psutil.virtual_memory().total / 1e9
    if workers * WORKER_GB > memory_gb:
        raise ConfigError(
            "workers",
            config.workers,
            f"at most {int(memory_gb / WORKER_GB)}: {workers} × {WORKER_GB} GB exceed {memory_gb:.0f} GB",
        )
    if config.cluster.gpus_per_worker and workers * config.cluster.gpus_per_worker > (gpus := local_gpus()):
        raise ConfigError(
            "cluster.gpus_per_worker",
            config.cluster.gpus_per_worker,
            f"at most {gpus} GPUs here: {workers} workers × {config.cluster.gpus_per_worker:g}",
            "Set cluster.gpus_per_worker=0 for a CPU run, or join a cluster with cluster.address.",
        )


def _check_kept(config: RunConfig) -> None:
    """In a job's copy of the working folder, which ends with the job, nothing that is to stay may be written to a relative path."""
    if "working_dir_files" not in Path.cwd().parts:
        return
    remedy = "This is a Ray job: name shared storage, such as output=/shared/runs and tracking.uri=http://mlflow:5000."
    if not os.path.isabs(config.output):
        raise ConfigError("output", config.output, "an absolute path that outlives the job", remedy)
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if config.tracking.enabled and (not uri or (uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"))):
        raise ConfigError("tracking.uri", uri, "a tracking server, or sqlite:////ABSOLUTE/PATH in shared storage", remedy)


def _check_elastic(config: RunConfig) -> None:
    """A range of workers grows by starting its workers again, from the newest checkpoint."""
    if is_elastic(config) and not config.checkpoint.every_steps:
        raise ConfigError(
            "checkpoint.every_steps",
            0,
            f"at least 1 with workers={config.workers}",
            "Growing and shrinking go on from the newest checkpoint.",
        )


def preflight_cluster(config: RunConfig) -> None:
    """The same for a cluster that is already joined; with `cluster.autoscaling` it may grow to what is asked for."""
    if config.cluster.autoscaling:
        return
    import ray

    total, workers = ray.cluster_resources(), config.least_workers
    for name, needed in (("CPU", required_cpus(config, workers)), ("GPU", workers * config.cluster.gpus_per_worker)):
        if needed > total.get(name, 0):
            raise ConfigError(
                "workers",
                config.workers,
                f"what the cluster can schedule: {needed:g} {name} needed, {total.get(name, 0):g} there",
                "Lower workers or cluster.*_per_worker, add nodes, or set cluster.autoscaling=true where the cluster grows by itself.",
            )


def local_gpus() -> int:
    """NVIDIA GPUs of this machine that `CUDA_VISIBLE_DEVICES` leaves visible, without importing torch."""
    _import_ray(local=True)
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    return len(visible) if visible is not None else NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()


def _import_ray(local: bool) -> Any:
    """Import Ray with the settings that it reads once, on import."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if local:
        for name, value in LOCAL_SETTINGS.items():
            os.environ.setdefault(name, value)
    import ray

    return ray


def is_up(config: RunConfig) -> bool:
    """Whether this process is on a Ray already. Imports Ray, with the settings that it reads once."""
    return bool(_import_ray(local=not joins_cluster(config)).is_initialized())


@contextmanager
def ray_session(cpus: float, address: str = "", logical_cpus: int = 0) -> Iterator[Any]:
    """Ray for the length of the block: the one already running in this process, a cluster's, or a local one.

    Only a Ray that this call started is shut down at the end.
    """
    cluster = address or os.environ.get("RAY_ADDRESS", "")
    ray = _import_ray(local=not cluster)
    if ray.is_initialized():
        yield ray
        return
    common: dict[str, Any] = {"log_to_driver": bool(os.environ.get("DIPTYCH_RAY_LOGS")), "logging_level": "ERROR"}
    if cluster:
        ray.init(address=cluster, **common)
    else:
        count = logical_cpus or max(os.cpu_count() or 1, int(-(-cpus // 1)))
        ray.init(address="local", num_cpus=count, include_dashboard=False, object_store_memory=_object_store_bytes(), **common)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def joined(config: RunConfig) -> Iterator[None]:
    """For a run on a cluster: join it and refuse what it has no room for, before the data are looked at, which may take long."""
    if not joins_cluster(config):
        yield
        return
    with ray_session(required_cpus(config), config.cluster.address):
        preflight_cluster(config)
        yield


def _object_store_bytes() -> int:
    """A bounded share of memory, and never more than /dev/shm holds (else Ray falls back to slow files)."""
    import psutil

    shared = psutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    wanted = min(int(psutil.virtual_memory().total * 0.2), 4 << 30)
    return max(100 << 20, min(wanted, int(shared * 0.8) or wanted))
