"""Caches read back: joined by key, a variant per slot, faults for rows that are missing or not finite, stale ones refused."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.batches import CachedNeed, Fault, ImageNeed, Needs, check_batch
from diptych.config import ConfigError, DataConfig
from diptych.datasets import cached, embed_layout
from diptych.datasets.cached import CacheJoin, choose_variants, join_caches
from diptych.datasets.embed_layout import Layout
from diptych.datasets.keep import select
from diptych.datasets.manifest import Manifest, build_manifest
from diptych.datasets.reader import SampleSource, read_rows
from diptych.datasets.shards import ShardWriter
from diptych.datasets.stream import LocalStream, StreamSpec

SAMPLES, CROPS, SHAPE = 20, 3, (2, 4, 4)
MADE_WITH = {"model": "sha256:one", "size": 32}
NEED = CachedNeed(("latent_mean", "latent_logvar", "text_states"), flip=0.5, expected={"latents": MADE_WITH})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("shards")
    ShardWriter(str(folder), samples_per_shard=8).write_all([{"txt": f"picture {number}"} for number in range(SAMPLES)])
    return build_manifest(str(folder))


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


MEANS, LOGVARS = values(1, SAMPLES, CROPS * 2, *SHAPE), values(2, SAMPLES, CROPS * 2, *SHAPE)
STATES = values(3, SAMPLES, 1, 5, 6)


def write(folder: Path | str, manifest: Manifest, arrays: dict[str, np.ndarray], about: dict, without: int | None = None) -> str:
    """A cache of two partitions in scrambled order."""
    embed_layout.claim(str(folder), {"data_digest": manifest.digest, **about}, cached.PROVENANCE)
    keys = np.array(manifest.column("key").to_pylist())
    order = [number for number in np.random.default_rng(0).permutation(SAMPLES) if number != without]
    layout = Layout(str(folder), SAMPLES, 12)
    for partition, part in enumerate((order[:12], order[12:])):
        columns = {"image_path": keys[part].tolist(), "caption": [None] * len(part), "shard": [None] * len(part)}
        layout.write(partition, {name: array[part] for name, array in arrays.items()}, columns, [])
    return str(folder)


@pytest.fixture(scope="module")
def caches(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Latents in three crops with flips, of which one sample is missing and one is not a number; text states."""
    folder = tmp_path_factory.mktemp("caches")
    means = MEANS.copy()
    means[7, :, 0, 0, 0] = np.nan
    latents = write(
        folder / "latents", manifest, {"latent_mean": means, "latent_logvar": LOGVARS},
        {"kind": "latents", "crops": CROPS, "flips": True, **MADE_WITH}, without=13,
    )  # fmt: skip
    return [write(folder / "texts", manifest, {"text_states": STATES}, {"kind": "text-states"}), latents]


@pytest.fixture(scope="module")
def source(manifest: Manifest, caches: list[str], tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    joins = join_caches(manifest, caches, NEED)
    for join in joins:
        join.save(tmp_path_factory.mktemp("join"))
    return SampleSource.of(manifest, None, DataConfig(), joins)


def test_rows_come_by_key_in_the_variant_of_their_slot(source: SampleSource) -> None:
    rows = np.array([4, 0, 19, 8, 4, 4, 4, 4])
    slots = np.arange(100, 108)
    read = read_rows(source, rows, slots, Needs(cached=NEED), seed=5)
    check_batch(read.arrays | {"weight": np.ones(len(rows), np.float32)}, Needs(cached=NEED))
    variants = choose_variants(5, slots, 0.5, CROPS, flips=True)
    np.testing.assert_array_equal(read.arrays["latent_mean"], MEANS[rows, variants])
    np.testing.assert_array_equal(read.arrays["latent_logvar"], LOGVARS[rows, variants])
    np.testing.assert_array_equal(read.arrays["text_states"], STATES[rows, 0])
    alone = read_rows(source, rows[3:4], slots[3:4], Needs(cached=NEED), seed=5)
    np.testing.assert_array_equal(alone.arrays["latent_mean"][0], read.arrays["latent_mean"][3])


def test_variants_are_drawn_evenly_and_flips_as_often_as_asked() -> None:
    slots = np.arange(30_000)
    chosen = choose_variants(0, slots, 0.25, CROPS, flips=True)
    shares = np.bincount(chosen, minlength=6) / len(slots)
    np.testing.assert_allclose(shares, [0.25, 1 / 12] * 3, atol=0.01)
    assert not np.array_equal(chosen, choose_variants(1, slots, 0.25, CROPS, flips=True))
    assert set(choose_variants(0, slots, 0.0, CROPS, flips=True).tolist()) == {0, 2, 4}
    assert set(choose_variants(0, slots, 0.0, 1, flips=False).tolist()) == {0}


def test_a_missing_row_and_one_that_is_not_finite_are_faults_and_others_stand_in(source: SampleSource, manifest: Manifest) -> None:
    rows = np.array([13, 2, 7])
    read = read_rows(source, rows, np.arange(3), Needs(cached=NEED), seed=0)
    keys = manifest.column("key").to_pylist()
    assert [(index, fault.key, fault.kind) for index, fault in read.faults] == [
        (0, keys[13], "missing_cached_row"),
        (2, keys[7], "nan_cached_row"),
    ]
    assert not read.arrays["latent_mean"][[0, 2]].any()
    selection, _ = select(manifest, (), 0.0, 0)
    spec = StreamSpec(source, selection, Needs(cached=NEED), seed=0, global_batch_size=SAMPLES)
    batches = list(LocalStream(spec, 0, 1, 0, 2))
    found: list[Fault] = [fault for batch in batches for fault in batch.faults]
    assert {fault.key for fault in found} == {keys[13], keys[7]}
    assert all(
        np.isfinite(batch.arrays["latent_mean"]).all() and batch.arrays["latent_mean"].any(axis=(1, 2, 3)).all() for batch in batches
    )


def test_blocks_are_bounded_by_the_bytes_of_cached_rows(source: SampleSource, manifest: Manifest) -> None:
    selection, _ = select(manifest, (), 0.0, 0)
    spec = StreamSpec(source, selection, Needs(cached=NEED), seed=0, global_batch_size=2, block_megabytes=0.002)
    plan = LocalStream(spec, 0, 1, 0, 50).plan
    row = 8 + 8 + 4 + 2 * (32 + 32 + 30)
    assert plan.block_bytes == 2000 // row // 2 * 2 * row


@pytest.mark.parametrize(
    ("need", "complaint"),
    [
        (replace(NEED, expected={"latents": MADE_WITH | {"model": "sha256:two"}}), "model='sha256:one'.*model='sha256:two'.*stale"),
        (replace(NEED, expected={"latents": {"size": 64}}), "size=32.*size=64"),
        (CachedNeed(("image_states",)), "one cache of image-states.*diptych cache image-states"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_with_the_difference(
    manifest: Manifest, caches: list[str], need: CachedNeed, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint) as error:
        join_caches(manifest, caches, need)
    assert error.value.key == "data.caches"


def test_a_cache_of_other_data_without_flips_or_of_unknown_make_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    about = {"kind": "latents", "crops": 1, "flips": False}
    arrays = {"latent_mean": MEANS[:, :1], "latent_logvar": LOGVARS[:, :1]}
    folder = write(tmp_path / "plain", manifest, arrays, about)
    need = CachedNeed(("latent_mean",))
    assert [join.which for join in join_caches(manifest, [folder], need)] == [("latent_mean",)]
    with pytest.raises(ConfigError, match="flips"):
        join_caches(manifest, [folder], replace(need, flip=0.5))
    with pytest.raises(ConfigError, match="2 are there"):
        join_caches(manifest, [folder, write(tmp_path / "second", manifest, arrays, about)], need)
    place = Path(folder) / cached.PROVENANCE
    place.write_text(json.dumps(json.loads(place.read_text()) | {"data_digest": "another"}))
    with pytest.raises(ConfigError, match=f"data_digest='another'.*{manifest.digest}"):
        join_caches(manifest, [folder], need)
    place.unlink()
    with pytest.raises(ConfigError, match="has no cache.json"):
        join_caches(manifest, [folder], need)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("place", ["array of objects", "pickle for an array", "pickle for cache.json"])
def test_a_pickle_in_a_cache_is_refused_and_not_run(manifest: Manifest, tmp_path: Path, place: str) -> None:
    """By whoever may write a cache; the keys and the data's digest are right."""
    folder = write(
        tmp_path / "cache", manifest, {"latent_mean": MEANS[:, :1], "latent_logvar": LOGVARS[:, :1]}, {"kind": "latents", "crops": 1}
    )
    exploded = tmp_path / "exploded"
    data = pickle.dumps(Bomb(exploded))
    pickle.loads(data)
    assert exploded.exists(), "the bomb works"
    exploded.unlink()
    (array,) = Path(folder).glob("latent_mean/*_0.npy")
    if place == "array of objects":
        buffer = io.BytesIO()
        np.save(buffer, np.array([[Bomb(exploded)] * 4] * 12, object), allow_pickle=True)
        array.write_bytes(buffer.getvalue())
    else:
        (array if "array" in place else Path(folder) / cached.PROVENANCE).write_bytes(data)
    named = cached.PROVENANCE if place.endswith(cached.PROVENANCE) else array.name
    with pytest.raises(ValueError, match=named):
        join_caches(manifest, [folder], CachedNeed(("latent_mean",)))
    assert not exploded.exists()


def test_a_saved_join_opens_alike(manifest: Manifest, caches: list[str], tmp_path: Path) -> None:
    joined = join_caches(manifest, caches, CachedNeed(("latent_mean", "latent_logvar")))[0]
    assert (joined.matched, joined.counts, joined.shape("latent_mean")) == (SAMPLES - 1, {"missing_cached_row": 1}, SHAPE)
    joined.save(tmp_path)
    loaded = CacheJoin.load(tmp_path)
    rows, variants = np.array([1, 5]), np.array([3, 0])
    np.testing.assert_array_equal(loaded.read(rows, variants).arrays["latent_mean"], MEANS[rows, variants])
    assert (loaded.crops, loaded.flips) == (CROPS, True)


def test_a_cache_in_a_remote_store_is_read_alike(manifest: Manifest) -> None:
    arrays = {"latent_mean": MEANS[:, :2], "latent_logvar": LOGVARS[:, :2]}
    url = write("memory://caches/latents", manifest, arrays, {"kind": "latents", "crops": 1, "flips": True})
    (join,) = join_caches(manifest, [url], CachedNeed(("latent_mean", "latent_logvar"), flip=0.5))
    rows, variants = np.array([3, 19, 0]), np.array([1, 0, 1])
    found = join.read(rows, variants)
    assert not found.faults
    np.testing.assert_array_equal(found.arrays["latent_mean"], MEANS[rows, variants])
    np.testing.assert_array_equal(found.arrays["latent_logvar"], LOGVARS[rows, variants])


def test_pictures_and_cached_members_stand_in_one_batch() -> None:
    keys = Needs(image=ImageNeed(8), cached=CachedNeed(("latent_mean", "image_states"))).keys
    assert keys == ("slot", "row", "weight", "image", "latent_mean", "image_states")
