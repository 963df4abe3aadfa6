"""`cache` on Ray: actors fill the folder, a repeated call computes what is missing, and a training stream reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_models import save_vae

from diptych import provenance
from diptych.batches import CachedNeed, Needs
from diptych.config import DataConfig
from diptych.datasets import scenes
from diptych.datasets.cached import join_caches
from diptych.datasets.keep import select
from diptych.datasets.manifest import open_manifest
from diptych.datasets.ray_stream import RayStream
from diptych.datasets.reader import SampleSource
from diptych.datasets.shards import ShardWriter
from diptych.datasets.stream import LocalStream, StreamSpec
from diptych.pipelines import cache


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    ShardWriter(str(folder), 20).write_all(scenes.samples(0, 0, 60, size=32))
    return str(folder)


@pytest.mark.slow
def test_two_actors_fill_a_cache_that_streams_and_only_what_is_missing_is_made_again(ray_session: Any, shards: str, tmp_path: Path) -> None:
    out, model = str(tmp_path / "latents"), save_vae(tmp_path / "vae")
    options = {"model": model, "flips": True, "actors": 2, "cpus_per_actor": 1, "partition_size": 16}
    first = cache.run("latents", shards, out, options)
    assert (first["samples_in"], first["samples_out"], first["faults"], first["partitions_skipped"]) == (60, 60, [], 0)
    stamps = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*.npy")}
    (Path(out) / "metadata" / "metadata_2.parquet").unlink()
    again = cache.run("latents", shards, out, options)
    assert (again["partitions"], again["partitions_skipped"], again["samples_out"]) == (4, 3, 60)
    changed = {path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"latent_mean_2.npy", "latent_logvar_2.npy"}

    manifest = open_manifest(shards)
    need = CachedNeed(("latent_mean", "latent_logvar"), flip=0.5, expected={"latents": provenance.latents(model, 32)})
    joins = join_caches(manifest, [out], need)
    joins[0].save(tmp_path / "join")
    source = SampleSource.of(manifest, None, DataConfig(), joins)
    spec = StreamSpec(source, select(manifest, (), 0.0, 0)[0], Needs(cached=need), seed=3, global_batch_size=8)
    local, ray = (list(stream(spec, 0, 1, 0, 9)) for stream in (LocalStream, RayStream))
    assert len(local) == len(ray) == 9
    for one, other in zip(local, ray, strict=True):
        for key, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[key])
