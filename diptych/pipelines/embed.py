"""`diptych embed`: CLIP embeddings of pictures and captions in clip-retrieval's layout, by a pool of Ray actors.

A partition is written at once; a call that was killed and is repeated computes only what is missing. `--verify` computes
samples of an existing folder again, whoever made it, and compares.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diptych.config import ConfigError, build
from diptych.pipelines import embed_pool
from diptych.pipelines.console import finish, note, show_faults, would
from diptych.pipelines.embed_pool import PoolOptions
from diptych.pipelines.options import Actors, AsJson, CpusPerActor, DryRun, GpusPerActor, KeepLists, ManifestFolder, RayAddress
from diptych.provenance import weights_digest

if TYPE_CHECKING:
    from diptych.datasets.embed_layout import Layout
    from diptych.pipelines.embed_peer import PeerSpec
    from diptych.pipelines.embed_worker import EmbedSpec


class EmbedOptions(PoolOptions):
    """How samples become embeddings."""

    model: str = "ViT-B-32/laion2b_s34b_b79k"
    """open_clip NAME/TAG, a folder (an exported CoCa, open_clip's or Hugging Face's layout), a hub name, or `sentence:NAME`."""
    modality: Literal["both", "image", "text"] = "both"
    """What is embedded."""
    engine: Literal["diptych", "clip-retrieval"] = "diptych"
    """`clip-retrieval` runs that package itself and checks its rows by key."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` takes bf16 where the device multiplies it fast."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """`image`, `text`."""
        return ("image", "text") if self.modality == "both" else (self.modality,)


def run(shards: str, out: str, options: dict[str, Any] | None = None, *, dry_run: bool = False) -> dict[str, Any]:
    """Embed `shards` into `out`; returns `samples_in, samples_out, faults, seconds, partitions, partitions_skipped`.

    With `dry_run` nothing is written, and what would be is returned. `options` are the
    fields of `EmbedOptions`. Raises `ConfigError` for a model that cannot be loaded, shards without what is
    to be embedded, or an `out` that another call has filled.
    """
    from diptych.datasets import embed_layout

    started = time.monotonic()
    chosen = build(EmbedOptions, options or {})
    if chosen.engine == "clip-retrieval":
        from diptych.pipelines import embed_peer

        peer = embed_peer.prepare(shards, out, chosen)
        embed_layout.claim(out, _provenance(peer.manifest.digest, peer.layout, chosen), dry_run=dry_run)
        if dry_run:
            return _plan(out, peer, chosen)
        found = embed_pool.fill(peer, chosen, f"clip-retrieval with {chosen.model}, tars", embed_peer.PeerWorker)
    else:
        from diptych.pipelines.embed_worker import EmbedWorker

        spec = prepare(shards, out, chosen)
        embed_layout.claim(out, _provenance(spec.selection.digest, spec.layout, chosen), dry_run=dry_run)
        if dry_run:
            return _plan(out, spec, chosen)
        found = embed_pool.fill(spec.saved(), chosen, f"embedding with {chosen.model}", EmbedWorker)
    return found | {"seconds": time.monotonic() - started}


def _plan(out: str, spec: EmbedSpec | PeerSpec, options: EmbedOptions) -> dict[str, Any]:
    return {"model": options.model, "writes": out} | embed_pool.described(spec, options)


def prepare(shards: str, out: str, options: EmbedOptions) -> EmbedSpec:
    """What the actors of a call need. Raises `ConfigError` as `run` does."""
    from diptych.pipelines.embed_worker import EmbedWork
    from diptych.trainers.model_name import parse_model

    work = EmbedWork(parse_model(options.model), options.modalities, options.precision)
    return embed_pool.plan(shards, out, options, work, "Choose the other with --modality.")


def _provenance(digest: str, layout: Layout, options: EmbedOptions) -> dict[str, Any]:
    """What the embeddings depend on."""
    return {
        "model": str(Path(options.model).absolute()) if Path(options.model).is_dir() else options.model,
        "weights": weights_digest(options.model.removeprefix("sentence:")),
        "modalities": list(options.modalities),
        "precision": options.precision,
        "data_digest": digest,
        "partition_size": layout.partition_size,
        "dtype": "float16",
    } | ({"engine": options.engine} if options.engine != "diptych" else {})


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
    actors: Actors = 0,
    cpus_per_actor: CpusPerActor = 0,
    gpus_per_actor: GpusPerActor = 0.0,
    engine: Annotated[str, typer.Option(help="diptych, or clip-retrieval to run that package itself")] = "diptych",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")] = "auto",
    keep: KeepLists = "",
    manifest: ManifestFolder = "",
    address: RayAddress = "",
    verify_samples: Annotated[str, typer.Option("--verify", metavar="K", help="compare K random samples of OUT (or `all`) instead")] = "",
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Embed SHARDS into OUT in clip-retrieval's layout; repeated, it computes only what is missing.

    Example: diptych embed shards/ embeddings/ --model ViT-B-32/laion2b_s34b_b79k
    """
    options = {
        "modality": modality, "batch_size": batch_size, "partition_size": partition_size, "actors": actors,
        "cpus_per_actor": cpus_per_actor, "gpus_per_actor": gpus_per_actor, "precision": precision, "keep": keep, "manifest": manifest,
        "address": address, "engine": engine,
    } | ({"model": model} if model else {})  # fmt: skip
    if dry_run:
        would("embed", lambda: run(shards, out, options, dry_run=True), json)
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
