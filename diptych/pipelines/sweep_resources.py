"""How many trials fit side by side, with the arithmetic; what can never be scheduled is refused before Ray starts.

A trial is driven by a thread of the sweep's own process, so it holds no CPU of Ray's; what it holds are its workers and readers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diptych.config import ConfigError, RunConfig
from diptych.pipelines import ray_context
from diptych.pipelines.console import note

DRIVER_GB = 1.0
"""Memory that is set aside for the sweep's process and a local Ray's own."""


@dataclass(frozen=True)
class Demand:
    """What the greediest trial holds while it runs."""

    cpus: float
    gpus: float
    memory_gb: float
    text: str
    """The arithmetic, for people."""


def estimated_worker_gb(configs: Sequence[RunConfig], facts: dict[str, Any]) -> float:
    """Memory of the host that a worker of the greediest trial needs: libraries, and what its model's size tells. Says how it comes about.

    `facts` describe the data, from which a model may take its dimensions. A model that cannot be built from what is known counts as small.
    """
    from diptych.trainers.memory import footprint

    # Most trials differ in what does not change the model.
    kinds = {(config.task.model_dump_json(), config.optim.ema_decay > 0, config.optim.eight_bit): config for config in configs}
    most = ray_context.WORKER_GB
    for config in kinds.values():
        found = footprint(config, facts)
        if found is None:
            continue
        state = found.checkpoint_bytes + (0 if config.cluster.gpus_per_worker else found.state_bytes)
        # A tenth is within what the libraries take at one time or another.
        if ray_context.WORKER_GB + state / 1e9 > most + 0.1:
            most = round(ray_context.WORKER_GB + state / 1e9, 2)
            note(
                f"{most:g} GB for each worker: {ray_context.WORKER_GB:g} for libraries and {state / 1e9:.2f} for {found.parameters / 1e6:.1f} "
                "million parameters, with what the optimizer and a checkpoint keep of them; --worker-gb says otherwise"
            )
    return most


def demand(configs: Sequence[RunConfig], worker_gb: float) -> Demand:
    """The most that any of `configs` needs; `worker_gb` is the memory of one worker."""
    most = max(configs, key=lambda config: (config.most_workers * config.cluster.gpus_per_worker, ray_context.required_cpus(config)))
    workers, cluster = most.most_workers, most.cluster
    cpus, gpus, memory = ray_context.required_cpus(most), workers * cluster.gpus_per_worker, workers * worker_gb
    text = (
        f"a trial = {workers} workers × {cluster.cpus_per_worker:g} + {cpus - workers * cluster.cpus_per_worker:g} for data = {cpus:g} CPUs"
    )
    text += f", {workers} × {cluster.gpus_per_worker:g} = {gpus:g} GPUs" if gpus else ""
    return Demand(cpus, gpus, memory, text + f", {workers} × {worker_gb:g} = {memory:g} GB")


def local_places(need: Demand, config: RunConfig, at_once: int) -> int:
    """Trials at once on this machine; `at_once` of 0 = as many as fit. Raises `ConfigError` for more than fit, or if not one does."""
    import psutil

    cores, declared = os.cpu_count() or 1, config.cluster.logical_cpus
    # Readers mostly wait, so a local Ray may declare more CPUs than there are; without being told, only workers are given a core each.
    cpus = declared or max(8, 4 * cores)
    free_gb = psutil.virtual_memory().available / 1e9
    gpus = ray_context.local_gpus() if need.gpus else 0
    limits = {
        f"CPUs: {need.cpus:g} each of {cpus:g} {'declared' if declared else 'that this machine of ' + str(cores) + ' cores may declare'}": cpus
        / need.cpus,
        f"memory: {need.memory_gb:g} GB each of {free_gb:.1f} free less {DRIVER_GB:g} for the driver": (free_gb - DRIVER_GB)
        / need.memory_gb,
    }
    if need.gpus:
        limits[f"GPUs: {need.gpus:g} each of {gpus}"] = gpus / need.gpus
    comfortable = declared or max(cores, config.most_workers * config.cluster.cpus_per_worker)
    return _places(
        need, at_once, limits, int(comfortable // (need.cpus if declared else config.most_workers * config.cluster.cpus_per_worker))
    )


def cluster_places(need: Demand, at_once: int) -> int:
    """The same for the cluster that is joined."""
    import ray

    total = ray.cluster_resources()
    limits = {f"CPUs: {need.cpus:g} each of {total.get('CPU', 0):g}": total.get("CPU", 0) / need.cpus}
    if need.gpus:
        limits[f"GPUs: {need.gpus:g} each of {total.get('GPU', 0):g}"] = total.get("GPU", 0) / need.gpus
    limits[f"memory: {need.memory_gb:g} GB each of {total.get('memory', 0) / 1e9:.1f}"] = (
        total.get("memory", math.inf) / 1e9 / need.memory_gb
    )
    return _places(need, at_once, limits, 10**6)


def _places(need: Demand, at_once: int, limits: dict[str, float], comfortable: int) -> int:
    tightest = min(limits, key=lambda name: limits[name])
    most = int(limits[tightest] + 1e-9)
    remedy = "Lower workers, cluster.data_cpus or cluster.*_per_worker, or join a cluster with cluster.address."
    if most < 1:
        raise ConfigError("workers", need.text, f"what can be scheduled: {tightest}", remedy)
    if at_once > most:
        raise ConfigError("--at-once", at_once, f"at most {most} ({need.text}; {tightest})", remedy)
    return at_once or max(1, min(most, comfortable))
