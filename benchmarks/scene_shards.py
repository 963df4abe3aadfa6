"""Shards of generated scenes for benchmarks, drawn once and by all cores."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from pathlib import Path

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
