"""The actor pool behind `embed` and `cache`: partitions that are missing are computed by Ray actors, each written at once.

A call that was killed and is repeated computes only what is missing, and says so.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pydantic

from diptych.config import Config, ConfigError, Paths
from diptych.pipelines.console import note, progress

if TYPE_CHECKING:
    from diptych.pipelines.embed_peer import PeerSpec
    from diptych.pipelines.embed_worker import EmbedSpec, Work


class PoolOptions(Config):
    """How the work is spread."""

    batch_size: int = pydantic.Field(256, ge=1)
    """Samples of one forward pass."""
    partition_size: int = pydantic.Field(0, ge=0)
    """Samples of one partition of the output; 0 = a 64th of the data, within 2,048 and 100,000."""
    actors: int = pydantic.Field(0, ge=0)
    """Copies of the model; 0 = one per four cores and at least two, so that one decodes while another computes; or one with a GPU."""
    cpus_per_actor: int = pydantic.Field(0, ge=0)
    """Threads of an actor; 0 = this machine's cores over the actors."""
    gpus_per_actor: float = pydantic.Field(0.0, ge=0)
    """GPUs of an actor; above 0 the model runs on CUDA."""
    keep: Paths = ()
    """Keep-lists; a sample is used if all of them keep it."""
    manifest: str = ""
    """Folder of the manifest; empty = beside the shards."""
    address: str = ""
    """Ray address; empty = `RAY_ADDRESS`, else a local Ray."""

    @property
    def actor_count(self) -> int:
        """`actors`, chosen."""
        cores = os.cpu_count() or 1
        return self.actors or (1 if self.gpus_per_actor else min(cores, max(2, cores // 4)))

    @property
    def device(self) -> str:
        """Where the model runs."""
        return "cuda" if self.gpus_per_actor else "cpu"


def plan(shards: str, out: str, options: PoolOptions, work: Work, remedy: str) -> EmbedSpec:
    """What the actors of a call need. Raises `ConfigError` that ends with `remedy` where the shards hold nothing of what `work` reads."""
    from diptych.datasets import embed_layout
    from diptych.datasets.keep import select
    from diptych.datasets.manifest import open_manifest
    from diptych.pipelines.embed_worker import EmbedSpec

    manifest = open_manifest(shards, options.manifest)
    facts = manifest.facts()
    for member, kind in (("image", "images"), ("text", "captions")):
        if member in work.reads and not facts[kind]:
            raise ConfigError("SHARDS", shards, f"shards with {kind}; these hold none", remedy)
    selection, _ = select(manifest, options.keep, 0.0, 0)
    layout = embed_layout.Layout(out, selection.samples, options.partition_size or embed_layout.default_partition_size(selection.samples))
    threads = options.cpus_per_actor or max(1, (os.cpu_count() or 1) // options.actor_count)
    return EmbedSpec(manifest, selection, layout, work, options.batch_size, options.device, threads)


def described(spec: EmbedSpec | PeerSpec, options: PoolOptions) -> dict[str, Any]:
    """What `fill` would do: options, data, resources, and the first caption."""
    import numpy as np

    layout = spec.layout
    actors = options.actor_count
    return {
        "options": options.model_dump(mode="json"),
        "samples": spec.samples,
        "partitions": layout.partitions,
        "partitions_there": sum(layout.is_finished(partition) for partition in range(layout.partitions)),
        "actors": actors,
        "cpus": actors * spec.threads,
        "gpus": actors * options.gpus_per_actor,
        "digest": spec.manifest.digest,
        "first caption": spec.manifest.rows(np.array([0]), ["caption"])["caption"][0].as_py(),
    }


def fill(spec: EmbedSpec | PeerSpec, options: PoolOptions, description: str, worker: type) -> dict[str, Any]:
    """Have actors of the class `worker` compute what is missing; returns `samples_in, samples_out, faults, partitions, partitions_skipped`."""
    layout = spec.layout
    missing = [partition for partition in range(layout.partitions) if not layout.is_finished(partition)]
    skipped = layout.partitions - len(missing)
    if skipped:
        note(f"{skipped} of {layout.partitions} partitions were there already; computing the other {len(missing)}")
    if missing:
        with progress(description, layout.samples) as advance:
            advance(layout.samples - sum(stop - start for start, stop in map(layout.span, missing)))
            for partition in _computed(spec, options, missing, worker):
                start, stop = layout.span(partition)
                advance(stop - start)
    outcomes = [layout.read_outcome(partition) for partition in range(layout.partitions)]
    return {
        "samples_in": spec.samples,
        "samples_out": sum(rows for rows, _ in outcomes),
        "faults": [fault for _, faults in outcomes for fault in faults],
        "partitions": layout.partitions,
        "partitions_skipped": skipped,
    }


def _computed(spec: EmbedSpec | PeerSpec, options: PoolOptions, missing: list[int], worker: type) -> Iterator[int]:
    """Have the actors compute `missing`; yields each partition once it is written."""
    from diptych.pipelines import ray_context
    from diptych.pipelines.embed_worker import PARTITIONS_IN_FLIGHT

    actors = min(options.actor_count, len(missing))
    with ray_context.ray_session(actors * spec.threads, options.address) as ray:
        _check_resources(ray, actors, spec.threads, options.gpus_per_actor)
        # Bare actors, for what travels is a number: Ray Data's pool would import Ray Data in each, and start four processes to watch them.
        made = ray.remote(worker).options(
            num_cpus=spec.threads,
            num_gpus=options.gpus_per_actor or None,
            max_concurrency=PARTITIONS_IN_FLIGHT,
            # A lost process or node loses time only: its partitions are computed again.
            max_restarts=-1,
            max_task_retries=-1,
        )
        yield from _spread(ray, [made.remote(spec) for _ in range(actors)], missing)


def _spread(ray: Any, pool: list[Any], missing: list[int]) -> Iterator[int]:
    """Partitions as they are done. Each actor has as many under way as overlap in it, from when it is ready; a late one delays none."""
    from diptych.pipelines.embed_worker import PARTITIONS_IN_FLIGHT

    left = deque(missing)
    starting = {actor.__ray_ready__.remote(): actor for actor in pool}
    running: dict[Any, Any] = {}
    while left or running:
        (finished,), _ = ray.wait([*starting, *running], num_returns=1)
        found = ray.get(finished)
        begun = finished in starting
        actor = (starting if begun else running).pop(finished)
        for _ in range(min(PARTITIONS_IN_FLIGHT if begun else 1, len(left))):
            running[actor.compute.remote(left.popleft())] = actor
        if not begun:
            yield found


def _check_resources(ray: Any, actors: int, cpus: int, gpus: float) -> None:
    total = ray.cluster_resources()
    for key, name, needed in (("--actors", "CPU", actors * cpus), ("--gpus-per-actor", "GPU", actors * gpus)):
        if needed > total.get(name, 0):
            raise ConfigError(
                key,
                actors,
                f"what Ray can schedule: {needed:g} {name} needed, {total.get(name, 0):g} there",
                "Lower it, or join a cluster.",
            )
