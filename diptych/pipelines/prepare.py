"""What stands between a configuration and a stream: manifest, keep-lists, split, join, tokenizer, checks.

Everything here happens on the driver before Ray starts, so that a wrong call is refused within seconds. What the workers
need is written to the run folder's `inputs/` and handed to them as small, picklable stream specifications.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diptych.batches import Needs
from diptych.config import ConfigError, RunConfig, set_path
from diptych.pipelines.console import note, progress

if TYPE_CHECKING:
    from diptych.datasets.cached import CacheJoin
    from diptych.datasets.embeddings import EmbeddingJoin
    from diptych.datasets.keep import Selection
    from diptych.datasets.manifest import Manifest
    from diptych.datasets.stream import StreamSpec

_SURVEYED = 2000
"""Captions that are looked at to tell how many are cut."""


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


T = TypeVar("T")


class Inputs:
    """What runs of one process may share, each made once: manifests, joins, tokenizers. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds what is made of files."""
        self.folder = folder
        self._made: dict[tuple[str, ...], Any] = {}
        self._lock = threading.Lock()

    def once(self, kind: str, key: Sequence[str], make: Callable[[Path], T]) -> T:
        """`make(folder)` for the first caller with this key, and the same value for those that follow."""
        name = (kind, *key)
        with self._lock:
            if name not in self._made:
                self._made[name] = make(self.folder / f"{kind}-{hashlib.sha256(repr(name).encode()).hexdigest()[:8]}")
            return self._made[name]


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


def with_tokenizer(config: RunConfig, manifest: Manifest, train: Selection, folder: Path, shared: Inputs | None) -> RunConfig:
    """Train the tokenizer that `task.tokenizer=train:SIZE` asks for on the captions to train on, once per run, or once for all that share it."""
    spec = str(getattr(config.task, "tokenizer", ""))
    if not spec.startswith("train:"):
        return config
    if not (folder / "tokenizer.json").is_file():
        if shared is None:
            _train_tokenizer(manifest, train, int(spec.removeprefix("train:")), folder)
        else:
            make = partial(_train_tokenizer, manifest, train, int(spec.removeprefix("train:")))
            # A run folder can be moved or copied by itself, so each has its own copy.
            shutil.copytree(shared.once("tokenizer", (spec, train.digest), make), folder, dirs_exist_ok=True)
    return set_path(config, "task.tokenizer", str(folder))


def _check_texts(config: RunConfig, manifest: Manifest, train: Selection) -> None:
    """Say how many texts are longer than the task holds, from a sample of them, and refuse a tokenizer that cannot be loaded."""
    need = config.task.needs().tokens
    if need is None:
        return
    import numpy as np

    from diptych.datasets.tokens import load_tokenizer

    try:
        tokenizer = load_tokenizer(need.tokenizer)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        key, reason = "task.tokenizer" if getattr(config.task, "tokenizer", "") else "task.model", str(error).splitlines()[0]
        raise ConfigError(key, need.tokenizer, "a hub name or a folder with a Hugging Face tokenizer", reason) from None
    places = np.unique(np.linspace(0, train.samples - 1, min(train.samples, _SURVEYED)).astype(np.int64))
    texts = [text for text in manifest.rows(train[places], ["caption"])["caption"].to_pylist() if text]
    cut = sum(length > need.length for length in tokenizer.lengths(texts))
    if cut:
        about = "of all" if len(places) == train.samples else f"of {len(texts):,} looked at"
        note(f"{cut:,} {about} captions are longer than {need.length} tokens and are cut to that")


def _train_tokenizer(manifest: Manifest, train: Selection, size: int, folder: Path) -> Path:
    import numpy as np

    from diptych.datasets.tokens import train_tokenizer

    captions: Any = (
        manifest.column("caption") if train.rows is None else manifest.rows(train[np.arange(train.samples)], ["caption"])["caption"]
    )
    with progress("training the tokenizer", None):
        train_tokenizer(filter(None, captions.to_pylist()), size, folder)
    return folder


def prepare(config: RunConfig, run_dir: Path, shared: Inputs | None = None) -> Prepared:
    """Open, join, split and check the data of `config`; raises `ConfigError` on what cannot work.

    With `shared`, the manifest, the join and the trained tokenizer are those that other runs made already.
    """
    from diptych.datasets.keep import select
    from diptych.datasets.reader import SampleSource
    from diptych.datasets.stream import StreamSpec

    inputs = run_dir / "inputs"
    data = config.data
    manifest = shared.once("manifest", (data.shards, data.manifest), lambda _: open_shards(config)) if shared else open_shards(config)
    facts = dict(manifest.facts())
    needs = config.task.needs()
    _check_members(needs, facts, config.data.shards)
    join = partial(join_embeddings, config, manifest, needs)
    joined = shared.once("join", (data.embeddings, manifest.digest, repr(needs)), join) if shared else join(inputs / "join")
    if joined is not None:
        facts |= {f"{name}_dim": joined.dim(name) for name in joined.which}
    cached = partial(join_caches, config, manifest, needs)
    caches = shared.once("caches", (*data.caches, manifest.digest, repr(needs)), cached) if shared else cached(inputs / "caches")
    facts |= {f"{key}_shape": cache.shape(key) for cache in caches for key in cache.which}
    task = config.task.resolve(facts)
    task.check_data(facts)
    config = config.model_copy(update={"task": task})
    train, held_out = select(manifest, data.keep, data.validation_share, data.split_seed)
    if not train.samples:
        raise ConfigError("data.keep", list(data.keep), "keep-lists that leave at least one sample", "Check them with `diptych keep`.")
    config = with_tokenizer(config, manifest, train, inputs / "tokenizer", shared)
    _check_texts(config, manifest, train)
    source = SampleSource.of(manifest, joined, data, caches)
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
