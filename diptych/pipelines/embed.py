"""`diptych embed`: CLIP embeddings of pictures and captions in clip-retrieval's layout, by an actor pool on Ray Data.

A partition is written at once; a call that was killed and is repeated computes only what is missing. `--verify` computes
samples of an existing folder again, whoever made it, and compares.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import typer

from diptych.config import Config, ConfigError, Paths, build
from diptych.pipelines.console import finish, note, progress, show_faults
from diptych.provenance import weights_digest

if TYPE_CHECKING:
    from diptych.pipelines.embed_worker import EmbedSpec


class EmbedOptions(Config):
    """How samples become embeddings."""

    model: str = "ViT-B-32/laion2b_s34b_b79k"
    """open_clip NAME/TAG, a folder (an exported CoCa, open_clip's or Hugging Face's layout), a hub name, or `sentence:NAME`."""
    modality: Literal["both", "image", "text"] = "both"
    """What is embedded."""
    batch_size: int = pydantic.Field(256, ge=1)
    """Samples of one forward pass."""
    partition_size: int = pydantic.Field(0, ge=0)
    """Samples of one partition of the output; 0 = a 64th of the data, within 2,048 and 100,000."""
    actors: int = pydantic.Field(0, ge=0)
    """Copies of the model; 0 = one per four cores, or one with a GPU."""
    cpus_per_actor: int = pydantic.Field(0, ge=0)
    """Threads of an actor; 0 = this machine's cores over the actors."""
    gpus_per_actor: float = pydantic.Field(0.0, ge=0)
    """GPUs of an actor; above 0 the model runs on CUDA."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` takes bf16 where the device multiplies it fast."""
    keep: Paths = ()
    """Keep-lists; a sample is embedded if all of them keep it."""
    manifest: str = ""
    """Folder of the manifest; empty = beside the shards."""
    address: str = ""
    """Ray address; empty = `RAY_ADDRESS`, else a local Ray."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """`image`, `text`."""
        return ("image", "text") if self.modality == "both" else (self.modality,)


def run(shards: str, out: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Embed `shards` into `out`; returns `samples_in, samples_out, faults, seconds, partitions, partitions_skipped`.

    `options` are the fields of `EmbedOptions`. Raises `ConfigError` for a model that cannot be loaded, shards without what is
    to be embedded, or an `out` that another call has filled.
    """
    from diptych.datasets import embed_layout

    started = time.monotonic()
    chosen = build(EmbedOptions, options or {})
    spec = prepare(shards, out, chosen)
    embed_layout.claim(out, _provenance(spec, chosen))
    layout = spec.layout
    missing = [partition for partition in range(layout.partitions) if not layout.is_finished(partition)]
    skipped = layout.partitions - len(missing)
    if skipped:
        note(f"{skipped} of {layout.partitions} partitions were there already; computing the other {len(missing)}")
    if missing:
        with progress(f"embedding with {chosen.model}", layout.samples) as advance:
            advance(layout.samples - sum(stop - start for start, stop in map(layout.span, missing)))
            for partition in _computed(spec, chosen, missing):
                start, stop = layout.span(partition)
                advance(stop - start)
    outcomes = [layout.read_outcome(partition) for partition in range(layout.partitions)]
    return {
        "samples_in": layout.samples,
        "samples_out": sum(rows for rows, _ in outcomes),
        "faults": [fault for _, faults in outcomes for fault in faults],
        "seconds": time.monotonic() - started,
        "partitions": layout.partitions,
        "partitions_skipped": skipped,
    }


def prepare(shards: str, out: str, options: EmbedOptions) -> EmbedSpec:
    """What the actors of a call need. Raises `ConfigError` as `run` does."""
    from diptych.datasets import embed_layout
    from diptych.datasets.keep import select
    from diptych.datasets.manifest import open_manifest
    from diptych.pipelines.embed_worker import EmbedSpec
    from diptych.trainers.clip_embedder import parse_model

    model = parse_model(options.model)
    manifest = open_manifest(shards, options.manifest)
    facts = manifest.facts()
    for modality, kind in (("image", "images"), ("text", "captions")):
        if modality in options.modalities and not facts[kind]:
            raise ConfigError("SHARDS", shards, f"shards with {kind}; these hold none", "Choose the other with --modality.")
    selection, _ = select(manifest, options.keep, 0.0, 0)
    if selection.rows is not None:
        selection = selection.save(os.path.join(manifest.folder, f"embed-{selection.digest[:16]}.npy"))
    size = options.partition_size or embed_layout.default_partition_size(selection.samples)
    layout = embed_layout.Layout(out, selection.samples, size)
    threads = options.cpus_per_actor or max(1, (os.cpu_count() or 1) // _actors(options))
    device = "cuda" if options.gpus_per_actor else "cpu"
    return EmbedSpec(manifest, selection, layout, model, options.modalities, options.batch_size, options.precision, device, threads)


def _actors(options: EmbedOptions) -> int:
    return options.actors or (1 if options.gpus_per_actor else max(1, (os.cpu_count() or 1) // 4))


def _provenance(spec: EmbedSpec, options: EmbedOptions) -> dict[str, Any]:
    """What the embeddings depend on."""
    return {
        "model": str(Path(options.model).absolute()) if Path(options.model).is_dir() else options.model,
        "weights": weights_digest(options.model.removeprefix("sentence:")),
        "modalities": list(options.modalities),
        "precision": options.precision,
        "data_digest": spec.selection.digest,
        "partition_size": spec.layout.partition_size,
        "dtype": "float16",
    }


def _computed(spec: EmbedSpec, options: EmbedOptions, missing: list[int]) -> Iterator[int]:
    """Have the actors compute `missing`; yields each partition once it is written."""
    from diptych.pipelines import ray_context
    from diptych.pipelines.embed_worker import PARTITIONS_IN_FLIGHT, EmbedWorker

    actors = min(_actors(options), len(missing))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ray_context.ray_session(actors * spec.threads, options.address) as ray:
        _check_resources(ray, actors, spec.threads, options.gpus_per_actor)
        tasks = ray.data.from_items([{"partition": partition} for partition in missing], override_num_blocks=len(missing))
        # Two calls overlap in each actor: one partition is read while the other is in the model.
        pool = ray.data.ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=2 * PARTITIONS_IN_FLIGHT,
            max_concurrent_calls_per_actor=PARTITIONS_IN_FLIGHT,
            enable_true_multi_threading=True,
        )
        gpus = options.gpus_per_actor or None
        done = tasks.map(EmbedWorker, fn_constructor_args=(spec,), compute=pool, num_cpus=spec.threads, num_gpus=gpus)
        # Our own bar counts samples.
        done.context.enable_progress_bars = done.context.print_on_execution_start = done.context.enable_auto_log_stats = False
        for row in done.iter_rows():
            yield row["partition"]


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


def command(
    shards: Annotated[str, typer.Argument(help="folder, URL or brace pattern of tars")],
    out: Annotated[str, typer.Argument(help="folder or URL for the embeddings")],
    *,
    model: Annotated[
        str, typer.Option(help="open_clip NAME/TAG, a folder, a hub name, or sentence:NAME; default: ViT-B-32 of LAION, or what made OUT")
    ] = "",
    modality: Annotated[str, typer.Option(help="both, image or text")] = "both",
    batch_size: Annotated[int, typer.Option(help="samples of one forward pass")] = 256,
    partition_size: Annotated[int, typer.Option(help="samples of one partition; 0 = chosen from the data")] = 0,
    actors: Annotated[int, typer.Option(help="copies of the model; 0 = chosen from the cores")] = 0,
    cpus_per_actor: Annotated[int, typer.Option(help="threads of an actor; 0 = cores over actors")] = 0,
    gpus_per_actor: Annotated[float, typer.Option(help="GPUs of an actor; above 0 it runs on CUDA")] = 0.0,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    keep: Annotated[str, typer.Option(help="keep-lists, separated by commas")] = "",
    manifest: Annotated[str, typer.Option(help="folder of the manifest; default: beside the shards")] = "",
    address: Annotated[str, typer.Option(help="Ray address; default: RAY_ADDRESS, else a local Ray")] = "",
    verify_samples: Annotated[str, typer.Option("--verify", metavar="K", help="compare K random samples of OUT (or `all`) instead")] = "",
    json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
) -> None:
    """Embed SHARDS into OUT in clip-retrieval's layout; repeated, it computes only what is missing.

    Example: diptych embed shards/ embeddings/ --model ViT-B-32/laion2b_s34b_b79k
    """
    options = {
        "modality": modality, "batch_size": batch_size, "partition_size": partition_size, "actors": actors,
        "cpus_per_actor": cpus_per_actor, "gpus_per_actor": gpus_per_actor, "precision": precision, "keep": keep, "manifest": manifest,
        "address": address,
    } | ({"model": model} if model else {})  # fmt: skip
    if verify_samples:
        from diptych.pipelines import embed_verify

        if verify_samples != "all" and not (verify_samples.isdigit() and int(verify_samples)):
            raise ConfigError("--verify", verify_samples, "a number of samples from 1, or all")
        result = embed_verify.run(shards, out, 0 if verify_samples == "all" else int(verify_samples), options)
        for name, cosine in result["cosine"].items():
            note(f"{name}: cosine min {cosine['min']:.4f}, mean {cosine['mean']:.4f} over {result['samples_in']:,} samples")
    else:
        result = run(shards, out, options)
        note(f"{result['samples_out']:,} of {result['samples_in']:,} samples embedded in {result['seconds']:.1f} s: {out}")
    show_faults(result["faults"])
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["embed", *sys.argv[1:]])
