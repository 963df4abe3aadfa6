"""What stands between a configuration and a stream: manifest, keep-lists, split, join, tokenizer, checks.

Everything here happens on the driver before Ray starts, so that a wrong call is refused within seconds. What the workers
need is written to the run folder's `inputs/` and handed to them as small, picklable stream specifications.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.batches import Needs
from diptych.config import ConfigError, RunConfig, set_path
from diptych.pipelines.console import note, progress

if TYPE_CHECKING:
    from diptych.datasets.cached import CacheJoin
    from diptych.datasets.embeddings import EmbeddingJoin
    from diptych.datasets.manifest import Manifest
    from diptych.datasets.stream import StreamSpec


@dataclass(frozen=True)
class Prepared:
    """A run's inputs."""

    config: RunConfig
    """With tokenizer and embedding dimensions filled in."""
    manifest: Manifest
    train: StreamSpec
    validation: StreamSpec | None
    facts: dict[str, Any]
    """`digest` (of the data as selected), `samples`, `validation_samples`, `captions`, `images`, `image_dim`, `text_dim`, `latent_mean_shape` and the like of cached keys, …"""


def open_shards(config: RunConfig) -> Manifest:
    """The manifest of `data.shards`, built now if it is missing or stale."""
    from diptych.datasets.manifest import open_manifest

    if not config.data.shards:
        raise ConfigError(
            "data.shards", "", "a folder or URL of webdataset tars", "Example: data.shards=shards/. `diptych pack` makes some."
        )
    return open_manifest(config.data.shards, config.data.manifest)


def join_embeddings(config: RunConfig, manifest: Manifest, needs: Needs, folder: Path) -> EmbeddingJoin | None:
    """Join what the task needs of precomputed embeddings by key, saying aloud what is missing."""
    which = tuple(name for name, need in (("image", needs.image_embedding), ("text", needs.text_embedding)) if need is not None)
    if not which:
        return None
    if not config.data.embeddings:
        raise ConfigError(
            "data.embeddings", "", "a folder of embeddings, which this task needs", "`diptych embed SHARDS OUT` makes one from the shards."
        )
    from diptych.datasets.embeddings import join

    joined = join(manifest, config.data.embeddings, which)
    joined.save(folder)
    note(f"embeddings: {joined.matched:,} of {manifest.samples:,} samples joined by key")
    return joined


def join_caches(config: RunConfig, manifest: Manifest, needs: Needs, folder: Path) -> list[CacheJoin]:
    """Join what the task needs of `diptych cache`'s folders by key, saying aloud what is missing."""
    if needs.cached is None:
        return []
    from diptych.datasets.cached import join_caches as join

    joins = join(manifest, config.data.caches, needs.cached)
    for joined in joins:
        joined.save(folder / str(joined.about["kind"]))
        note(f"cached {joined.about['kind']}: {joined.matched:,} of {manifest.samples:,} samples joined by key")
    return joins


def with_tokenizer(config: RunConfig, manifest: Manifest, folder: Path) -> RunConfig:
    """Train the tokenizer that `task.tokenizer=train:SIZE` asks for on the captions, once per run."""
    spec = getattr(config.task, "tokenizer", "")
    if not str(spec).startswith("train:"):
        return config
    if not (folder / "tokenizer.json").is_file():
        from diptych.datasets.tokens import train_tokenizer

        captions: Any = manifest.column("caption")
        with progress("training the tokenizer", None):
            train_tokenizer(filter(None, captions.to_pylist()), int(spec.removeprefix("train:")), folder)
    return set_path(config, "task.tokenizer", str(folder))


def prepare(config: RunConfig, run_dir: Path) -> Prepared:
    """Open, join, split and check the data of `config`; raises `ConfigError` on what cannot work."""
    from diptych.datasets.keep import select
    from diptych.datasets.reader import SampleSource
    from diptych.datasets.stream import StreamSpec

    inputs = run_dir / "inputs"
    manifest = open_shards(config)
    facts = dict(manifest.facts())
    needs = config.task.needs()
    _check_members(needs, facts, config.data.shards)
    joined = join_embeddings(config, manifest, needs, inputs / "join")
    if joined is not None:
        facts |= {f"{name}_dim": joined.dim(name) for name in joined.which}
    caches = join_caches(config, manifest, needs, inputs / "caches")
    facts |= {f"{key}_shape": cache.shape(key) for cache in caches for key in cache.which}
    task = config.task.resolve(facts)
    task.check_data(facts)
    config = config.model_copy(update={"task": task})
    config = with_tokenizer(config, manifest, inputs / "tokenizer")
    train, held_out = select(manifest, config.data.keep, config.data.validation_share, config.data.split_seed)
    if not train.samples:
        raise ConfigError(
            "data.keep", list(config.data.keep), "keep-lists that leave at least one sample", "Check them with `diptych keep`."
        )
    source = SampleSource.of(manifest, joined, config.data, caches)
    specs = {
        name: StreamSpec.of(source, selection.save(inputs / f"{name}.npy"), config, finite=name == "validation")
        for name, selection in (("train", train), ("validation", held_out))
        if selection.samples
    }
    facts |= {
        "digest": train.digest,
        "manifest_digest": manifest.digest,
        "validation_samples": held_out.samples,
        "train_samples": train.samples,
    }
    return Prepared(config, manifest, specs["train"], specs.get("validation") if config.validation.samples else None, facts)


def _check_members(needs: Needs, facts: dict[str, Any], shards: str) -> None:
    """Refuse shards that hold nothing of a kind that the task needs."""
    for needed, kind, remedy in (
        (needs.tokens, "captions", "Pack them with captions (`diptych pack`), or choose a task that needs none."),
        (needs.image, "images", "Pack them with images (`diptych pack`), or choose a task that needs none."),
    ):
        if needed is not None and not facts[kind]:
            raise ConfigError("data.shards", shards, f"shards with {kind}; these hold none", remedy)
