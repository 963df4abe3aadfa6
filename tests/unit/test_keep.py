"""Keep-lists and splits: who is selected, and what the choice depends on."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.config import ConfigError
from diptych.datasets import keep as keep_module
from diptych.datasets.bitmap import Bitmap
from diptych.datasets.keep import Selection, combine, in_validation, read_keep, select, write_keep
from diptych.datasets.manifest import open_manifest


def write_set(folder, shards, count=200):
    folder.mkdir(exist_ok=True)
    for shard in shards:
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for index in range(count):
                info = tarfile.TarInfo(f"{shard:05d}{index:04d}.txt")
                info.size = 1
                archive.addfile(info, io.BytesIO(b"x"))
    return open_manifest(str(folder))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("keep") / "set", range(3))


def keys_of(manifest, selection):
    return set(manifest.rows(selection[np.arange(selection.samples)], ["key"])["key"].to_pylist())


def test_one_tar_gives_a_validation_set(tmp_path):
    manifest = write_set(tmp_path / "set", [0])
    train, held_out = select(manifest, (), 0.1, 0)
    assert 5 < held_out.samples < 40
    assert keys_of(manifest, train) | keys_of(manifest, held_out) == set(manifest.column("key").to_pylist())
    assert not keys_of(manifest, train) & keys_of(manifest, held_out)
    assert np.all(np.diff(train.rows) > 0)


def test_new_shards_move_no_sample_to_the_other_side(tmp_path):
    before = write_set(tmp_path / "set", [1])
    sides_before = [keys_of(before, side) for side in select(before, (), 0.2, 7)]
    after = write_set(tmp_path / "set", [0, 2])
    sides_after = [keys_of(after, side) for side in select(after, (), 0.2, 7)]
    assert sides_before[0] < sides_after[0]
    assert sides_before[1] < sides_after[1]


def test_the_split_seed_draws_another_set(manifest):
    one, other = (set(select(manifest, (), 0.2, seed)[1].rows.tolist()) for seed in (0, 1))
    assert 0.05 < len(one & other) / len(one) < 0.45  # independent draws share a fifth


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50), st.floats(0, 0.5), st.floats(0, 0.49), st.integers(0, 2**31))
def test_a_larger_share_only_adds(hashes, share, more, seed):
    hashes = np.array(hashes, np.uint64)
    small, large = in_validation(hashes, share, seed), in_validation(hashes, share + more, seed)
    assert np.all(large[small])


def test_the_share_is_met():
    hashes = np.random.default_rng(0).integers(0, 2**64, 200_000, np.uint64)
    for seed in range(3):
        assert abs(in_validation(hashes, 0.02, seed).mean() - 0.02) < 0.002


def test_everything_costs_no_rows(manifest):
    train, held_out = select(manifest, (), 0, 0)
    assert (train.rows, train.samples, held_out.samples) == (None, 600, 0)
    assert train[np.array([5, 0])].tolist() == [5, 0]
    assert train.save("never/written.npy") is train


def test_keep_lists_by_key_survive_new_shards(tmp_path):
    manifest = write_set(tmp_path / "set", [1, 3])
    rows = np.array([399, 3, 250, 3])
    write_keep(str(tmp_path / "k.parquet"), manifest, rows)
    table = pq.read_table(tmp_path / "k.parquet")
    assert table.to_pylist() == [
        {"shard": "00001.tar", "key": "000010003"},
        {"shard": "00003.tar", "key": "000030050"},
        {"shard": "00003.tar", "key": "000030199"},
    ]
    assert table.schema.metadata[b"digest"].decode() == manifest.digest
    assert read_keep(str(tmp_path / "k.parquet"), manifest).tolist() == [3, 250, 399]
    grown = write_set(tmp_path / "set", [0, 2])
    assert read_keep(str(tmp_path / "k.parquet"), grown).tolist() == [203, 650, 799]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sets(st.integers(0, 599), max_size=40), min_size=1, max_size=4))
def test_lists_combine_as_sets(manifest, tmp_path_factory, lists):
    folder = tmp_path_factory.mktemp("lists")
    paths = [str(folder / f"{index}.parquet") for index in range(len(lists))]
    for path, rows in zip(paths, lists, strict=True):
        write_keep(path, manifest, np.array(sorted(rows), np.int64))
    assert combine(paths, "and", manifest).tolist() == sorted(set.intersection(*lists))
    assert combine(paths, "or", manifest).tolist() == sorted(set.union(*lists))
    assert combine(paths, "minus", manifest).tolist() == sorted(lists[0].difference(*lists[1:]))


def test_a_selection_is_of_all_lists_and_one_side(manifest, tmp_path):
    write_keep(str(tmp_path / "a.parquet"), manifest, np.arange(0, 600, 2))
    write_keep(str(tmp_path / "b.parquet"), manifest, np.arange(0, 600, 3))
    train, held_out = select(manifest, (str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")), 0.3, 0)
    assert sorted([*train.rows, *held_out.rows]) == list(range(0, 600, 6))
    whole = select(manifest, (), 0.3, 0)
    assert set(held_out.rows) == set(whole[1].rows) & set(range(0, 600, 6))


def test_digests_tell_selections_apart(manifest, tmp_path):
    write_keep(str(tmp_path / "a.parquet"), manifest, np.arange(599))
    sides = [side for keep in ((), (str(tmp_path / "a.parquet"),)) for seed in (0, 1) for side in select(manifest, keep, 0.5, seed)]
    # Leaving out one sample changes only the side that it was on.
    assert len({side.digest for side in sides}) == 6
    assert select(manifest, (), 0.5, 0)[0].digest == sides[0].digest
    other = write_set(tmp_path / "set", range(3), 199)
    assert select(other, (), 0, 0)[0].digest != select(manifest, (), 0, 0)[0].digest


def test_a_saved_selection_is_mapped_and_pickles_as_its_path(manifest, tmp_path):
    train, _ = select(manifest, (), 0.5, 0)
    saved = train.save(tmp_path / "inputs" / "train.npy")
    assert isinstance(saved.rows, np.memmap)
    again = pickle.loads(pickle.dumps(saved))
    assert isinstance(again.rows, np.memmap)
    assert (again.samples, again.digest) == (train.samples, train.digest)
    assert np.array_equal(again[np.arange(10)], train.rows[:10])
    assert len(pickle.dumps(saved)) < 1000
    with pytest.raises(ConfigError, match="int64"):
        Selection.load(saved.path, 3, train.digest)


def test_bad_lists_are_refused_with_a_remedy(manifest, tmp_path):
    with pytest.raises(ConfigError, match="diptych dedup"):
        select(manifest, (str(tmp_path / "missing.parquet"),), 0, 0)
    (tmp_path / "text.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="shard and key"):
        read_keep(str(tmp_path / "text.parquet"), manifest)
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "columns.parquet")
    with pytest.raises(ConfigError, match="shard and key"):
        read_keep(str(tmp_path / "columns.parquet"), manifest)
    for shard, key in (("00009.tar", "000010003"), ("00001.tar", "nobody")):
        pq.write_table(pa.table({"shard": ["00000.tar", shard], "key": ["000000001", key]}), tmp_path / "other.parquet")
        with pytest.raises(ConfigError, match=f"{shard}/{key}.*Make the list again"):
            read_keep(str(tmp_path / "other.parquet"), manifest)


def test_nothing_left_is_refused(manifest, tmp_path):
    write_keep(str(tmp_path / "a.parquet"), manifest, np.arange(10))
    write_keep(str(tmp_path / "b.parquet"), manifest, np.arange(10, 20))
    with pytest.raises(ConfigError, match="no sample in common"):
        select(manifest, (str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")), 0.1, 0)
    write_keep(str(tmp_path / "one.parquet"), manifest, np.array([0]))
    with pytest.raises(ConfigError, match="validation_share"):
        select(manifest, (str(tmp_path / "one.parquet"),), 0.999999, 0)


def split_by_arrays(manifest, kept, share, seed):
    """The split as it was made before it was made in bits: (rows, digest) of both sides. Checkpoints carry these digests."""
    rows = np.arange(manifest.samples) if kept is None else kept
    held = in_validation(manifest.columns["key_hash"][rows], share, seed)
    for side in (rows[~held], rows[held]):
        digest = hashlib.sha256(f"{manifest.digest} {len(side)}\n".encode())
        if len(side) != manifest.samples:
            digest.update(np.ascontiguousarray(side, "<i8").data)
        yield side, digest.hexdigest()


@pytest.mark.parametrize("array_bytes", [0, keep_module.ARRAY_BYTES])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), samples=st.integers(1, 5000), share=st.sampled_from([0.001, 0.02, 0.3, 0.9]), seed=st.integers(0, 99))
def test_the_split_is_the_same_in_bits(array_bytes, data, samples, share, seed):
    """Rows, digests, places of shards and rows by place, with and without keep-lists, in memory and mapped from a file."""
    hashes = np.random.default_rng(seed).integers(0, 2**64, samples, np.uint64)
    manifest = SimpleNamespace(samples=samples, digest="d", root="shards", columns={"key_hash": hashes})
    kept = data.draw(st.none() | st.sets(st.integers(0, samples - 1), min_size=1).map(lambda rows: np.array(sorted(rows), np.int64)))
    expected = list(split_by_arrays(manifest, kept, share, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep_module, "ARRAY_BYTES", array_bytes)
        patch.setattr(keep_module, "CHUNK_ROWS", 1024)
        patch.setattr(keep_module, "combine", lambda *_: kept)
        if not len(expected[0][0]):
            with pytest.raises(ConfigError, match="validation_share"):
                select(manifest, () if kept is None else ("list",), share, seed)
            return
        found = select(manifest, () if kept is None else ("list",), share, seed)
    starts = np.array(sorted(data.draw(st.lists(st.integers(0, samples), max_size=5))), np.int64)
    for side, (rows, digest) in zip(found, expected, strict=True):
        assert (side.samples, side.digest) == (len(rows), digest)
        smaller = 8 * len(rows) > max(array_bytes, Bitmap.empty(samples).blocks.nbytes)
        assert isinstance(side.rows, Bitmap) == (smaller and len(rows) < samples)
        assert np.array_equal(side[np.arange(len(rows))], rows)
        assert np.array_equal(side.before(starts), np.searchsorted(rows, starts))


def test_a_bitmap_is_saved_mapped_and_refused_like_an_array(manifest, tmp_path, monkeypatch):
    plain, _ = select(manifest, (), 0.5, 0)
    monkeypatch.setattr(keep_module, "ARRAY_BYTES", 0)
    train, _ = select(manifest, (), 0.5, 0)
    saved = pickle.loads(pickle.dumps(train.save(tmp_path / "train.npy")))
    assert isinstance(saved.rows.blocks, np.memmap)
    assert np.array_equal(saved[np.arange(train.samples)], plain.rows)
    with pytest.raises(ConfigError, match="int64"):
        Selection.load(saved.path, 3, train.digest)
