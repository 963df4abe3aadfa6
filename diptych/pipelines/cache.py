"""`diptych cache`: what frozen towers make of every sample, computed once, by the actor pool of `embed`.

KIND is `latents` (a VAE's posterior in crops and mirror images), `text-states` or `image-states`. Training reads the folders in
`data.caches`; `cache.json` says what made them, and other data or another model are refused.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import typer

from diptych import provenance
from diptych.batches import CACHES, AspectBuckets, ImageNeed
from diptych.config import ConfigError, build
from diptych.pipelines import embed_pool
from diptych.pipelines.console import finish, note, show_faults, would
from diptych.pipelines.options import Actors, AsJson, CpusPerActor, DryRun, GpusPerActor, KeepLists, ManifestFolder, RayAddress

if TYPE_CHECKING:
    from diptych.pipelines.embed_worker import EmbedSpec, Work


class CacheOptions(embed_pool.PoolOptions):
    """How samples become latents or states."""

    model: str = ""
    """Folder or hub name of a pipeline in diffusers' layout, or of the part itself (a VAE, a text encoder, a CLIP)."""
    batch_size: int = pydantic.Field(32, ge=1)
    """Pictures or captions of one forward pass."""
    partition_size: int = pydantic.Field(256, ge=1)
    """Samples of one partition of the output: a few dozen MB of latents or states at the usual sizes."""
    size: int = pydantic.Field(0, ge=0)
    """Side of the square that the model sees, in pixels; 0 = what the model was made for."""
    resize: Literal["center_crop", "random_crop", "pad", "squash"] = "center_crop"
    """How a picture reaches its shape, as in training."""
    aspect_buckets: bool = False
    """Each picture in the nearest of several shapes instead of the square, as `task.aspect_buckets`; latents only."""
    bucket_reso_steps: int = pydantic.Field(64, ge=1)
    """Sides of the shapes are multiples of this, in pixels."""
    max_aspect: float = pydantic.Field(2.0, ge=1)
    """Longer side of a shape over its shorter one, at most."""
    min_scale: float = pydantic.Field(1.0, gt=0, le=1)
    """Smallest share of the area that `random_crop` keeps."""
    crops: int = pydantic.Field(1, ge=1)
    """Random crops of each picture."""
    flips: bool = False
    """Also cache each crop's mirror image."""
    length: int = pydantic.Field(0, ge=0)
    """Tokens of a caption; 0 = as many as the text encoder takes."""
    layer: int = -1
    """Which of CLIP's states: 0 = what enters the first block, -1 = what leaves the last."""
    seed: int = 0
    """Of the crops."""
    decoder: Literal["auto", "pil", "opencv"] = "auto"
    """JPEG decoder, as `data.decoder`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of the model; what is stored is float16."""


def run(kind: str, shards: str, out: str, options: dict[str, Any] | None = None, *, dry_run: bool = False) -> dict[str, Any]:
    """Cache `kind` of `shards` in `out`; returns `samples_in, samples_out, faults, seconds, partitions, partitions_skipped`.

    With `dry_run` nothing is written, and what would be is returned. `options` are the
    fields of `CacheOptions`. Raises `ConfigError` for an unknown kind, a model that cannot be loaded, shards
    without what is to be encoded, or an `out` that another call has filled.
    """
    from diptych.datasets import cached, embed_layout
    from diptych.pipelines.embed_worker import EmbedWorker

    started = time.monotonic()
    chosen = build(CacheOptions, options or {})
    spec, about = prepare(kind, shards, out, chosen)
    embed_layout.claim(out, about, cached.PROVENANCE, dry_run=dry_run)
    if dry_run:
        return about | {"writes": out} | embed_pool.described(spec, chosen)
    return embed_pool.fill(spec.saved(), chosen, f"caching {kind} of {chosen.model}", EmbedWorker) | {"seconds": time.monotonic() - started}


def prepare(kind: str, shards: str, out: str, options: CacheOptions) -> tuple[EmbedSpec, dict[str, Any]]:
    """What the actors need, and what the cache depends on. Raises `ConfigError` as `run` does."""
    if kind not in CACHES:
        raise ConfigError("KIND", kind, ", ".join(CACHES))
    if not options.model:
        raise ConfigError("--model", "", "a folder or hub name, such as stable-diffusion-v1-5/stable-diffusion-v1-5")
    work, about = _texts(options) if kind == "text-states" else _pictures(kind, options)
    spec = embed_pool.plan(shards, out, options, work, "Choose another KIND.")
    about |= {
        "kind": kind,
        "name": options.model,
        "precision": options.precision,
        "dtype": "float16",
        "data_digest": spec.manifest.digest,
        "selection": spec.selection.digest,
        "partition_size": spec.layout.partition_size,
    }
    return spec, about


def _pictures(kind: str, options: CacheOptions) -> tuple[Work, dict[str, Any]]:
    from diptych.datasets.images import choose_decoder
    from diptych.pipelines.cache_worker import PictureWork
    from diptych.trainers.latent_encoder import describe

    if options.crops > 1 and options.resize != "random_crop":
        raise ConfigError(
            "--crops", options.crops, f"1 with --resize {options.resize}, whose crops are all alike", "Use --resize random_crop."
        )
    if kind == "latents":
        config = describe(options.model, "vae")
        size, multiple = options.size or int(config["sample_size"]), 2 ** (len(config["block_out_channels"]) - 1)
        buckets = _buckets(options, size, multiple)
        about = provenance.latents(options.model, size, options.resize, options.min_scale, buckets)
    else:
        config = describe(options.model, "image_encoder")
        size, multiple, buckets = options.size or int(config["image_size"]), int(config["patch_size"]), None
        if options.aspect_buckets:
            raise ConfigError("--aspect-buckets", True, "false for image-states", "CLIP sees squares.")
        if abs(options.layer) > config["num_hidden_layers"] + (options.layer < 0):
            raise ConfigError("--layer", options.layer, f"-1, or 0 to {config['num_hidden_layers']}")
        about = provenance.image_states(options.model, size, options.layer) | {"resize": options.resize, "min_scale": options.min_scale}
    if size % multiple:
        raise ConfigError("--size", size, f"a multiple of {multiple}, the pixels of one place of the model")
    need = ImageNeed(size, options.resize, min_scale=options.min_scale, buckets=buckets)
    decoder = choose_decoder(options.decoder)
    work = PictureWork(
        options.model, kind, need, options.seed, options.crops, options.flips, decoder, options.precision, options.batch_size, options.layer
    )  # fmt: skip
    return work, about | {"crops": options.crops, "flips": options.flips, "seed": options.seed, "decoder": decoder}


def _buckets(options: CacheOptions, size: int, multiple: int) -> AspectBuckets | None:
    if not options.aspect_buckets:
        return None
    step = options.bucket_reso_steps
    if size % step or step % multiple:
        raise ConfigError("--bucket-reso-steps", step, f"a divisor of the size {size}, and a multiple of {multiple}")
    return AspectBuckets.of(size, step, options.max_aspect)


def _texts(options: CacheOptions) -> tuple[Work, dict[str, Any]]:
    from diptych.datasets.tokens import load_tokenizer
    from diptych.pipelines.cache_worker import TextStatesWork
    from diptych.trainers.latent_encoder import describe

    most = int(describe(options.model, "text_encoder")["max_position_embeddings"])
    length = options.length or most
    if not 2 <= length <= most:
        raise ConfigError("--length", length, f"2 to {most}, the places of the text encoder")
    tokenizer = provenance.component(options.model, "tokenizer")
    load_tokenizer(tokenizer)
    return TextStatesWork(options.model, tokenizer, length, options.precision), provenance.text_states(options.model) | {"length": length}


def command(
    kind: Annotated[str, typer.Argument(help="latents, text-states or image-states")],
    shards: Annotated[str, typer.Argument(help="folder, URL or brace pattern of tars")],
    out: Annotated[str, typer.Argument(help="folder or URL for the cache")],
    *,
    model: Annotated[str, typer.Option(help="pipeline in diffusers' layout by folder or hub name, or the part itself")] = "",
    size: Annotated[int, typer.Option(help="side of the square that the model sees; 0 = the model's own")] = 0,
    resize: Annotated[str, typer.Option(help="center_crop, random_crop, pad or squash")] = "center_crop",
    min_scale: Annotated[float, typer.Option(help="smallest share of the area that random_crop keeps")] = 1.0,
    aspect_buckets: Annotated[bool, typer.Option("--aspect-buckets", help="the nearest of several shapes instead of the square")] = False,
    bucket_reso_steps: Annotated[int, typer.Option(help="sides of those shapes are multiples of this, in pixels")] = 64,
    max_aspect: Annotated[float, typer.Option(help="longer side of those shapes over the shorter one, at most")] = 2.0,
    crops: Annotated[int, typer.Option(help="random crops of each picture")] = 1,
    flips: Annotated[bool, typer.Option("--flips", help="also cache mirror images")] = False,
    length: Annotated[int, typer.Option(help="tokens of a caption; 0 = all that the text encoder takes")] = 0,
    layer: Annotated[int, typer.Option(help="CLIP's states: 0 enters the first block, -1 leaves the last")] = -1,
    seed: Annotated[int, typer.Option(help="of the crops")] = 0,
    decoder: Annotated[str, typer.Option(help="auto, pil or opencv, as data.decoder")] = "auto",
    precision: Annotated[str, typer.Option(help="of the model: auto, fp32, bf16 or fp16")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="pictures or captions of one forward pass")] = 32,
    partition_size: Annotated[int, typer.Option(help="samples of one partition")] = 256,
    actors: Actors = 0,
    cpus_per_actor: CpusPerActor = 0,
    gpus_per_actor: GpusPerActor = 0.0,
    keep: KeepLists = "",
    manifest: ManifestFolder = "",
    address: RayAddress = "",
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Compute latents or states of SHARDS once, for training with data.caches; repeated, it computes only what is missing.

    Example: diptych cache latents shards/ latents/ --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 512 --flips
    """
    options = {
        "model": model, "size": size, "resize": resize, "aspect_buckets": aspect_buckets, "bucket_reso_steps": bucket_reso_steps,
        "max_aspect": max_aspect, "min_scale": min_scale, "crops": crops, "flips": flips, "length": length,
        "layer": layer, "seed": seed, "decoder": decoder, "precision": precision, "batch_size": batch_size,
        "partition_size": partition_size, "actors": actors, "cpus_per_actor": cpus_per_actor, "gpus_per_actor": gpus_per_actor,
        "keep": keep, "manifest": manifest, "address": address,
    }  # fmt: skip
    if dry_run:
        would(f"cache {kind}", lambda: run(kind, shards, out, options, dry_run=True), json)
    result = run(kind, shards, out, options)
    note(f"{kind} of {result['samples_out']:,} of {result['samples_in']:,} samples cached in {result['seconds']:.1f} s: {out}")
    show_faults(result["faults"])
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["cache", *sys.argv[1:]])
