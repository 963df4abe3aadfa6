"""Shards of generated scenes for benchmarks, drawn once and by all cores, and made-up embeddings for them."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from pathlib import Path

import numpy as np

from diptych.datasets.embed_layout import Layout
from diptych.datasets.manifest import open_manifest
from diptych.datasets.scenes import samples
from diptych.datasets.shards import ShardWriter

_PER_SHARD = 1000


def write_scenes(folder: Path, count: int, size: int) -> None:
    """Scenes 0 to `count` (a multiple of 1,000) of `size` pixels in `folder`; shards that are there already stay."""
    missing = [shard for shard in range(count // _PER_SHARD) if not ShardWriter(str(folder), _PER_SHARD).is_finished(shard)]
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write, [str(folder)] * len(missing), missing, [size] * len(missing)))


def _write(folder: str, shard: int, size: int) -> None:
    ShardWriter(folder, _PER_SHARD).write_shard(shard, samples(0, shard * _PER_SHARD, (shard + 1) * _PER_SHARD, size))


def write_embeddings(folder: Path, shards: Path, dim: int) -> None:
    """Random unit vectors for pictures and captions of `shards`, in clip-retrieval's layout: for speed, not for learning."""
    manifest = open_manifest(str(shards))
    layout = Layout(str(folder), manifest.samples, max(1, manifest.samples))
    if layout.is_finished(0):
        return
    random = np.random.default_rng(0)
    vectors = {name: random.standard_normal((manifest.samples, dim), dtype=np.float32) for name in ("image", "text")}
    vectors = {name: found / np.linalg.norm(found, axis=1, keepdims=True) for name, found in vectors.items()}
    table = manifest.rows(np.arange(manifest.samples), ["key", "caption", "shard"])
    names = [manifest.shard_names[shard] for shard in table["shard"].to_pylist()]
    rows = {"image_path": table["key"].to_pylist(), "caption": table["caption"].to_pylist(), "shard": names}
    layout.write(0, vectors, rows, [])
