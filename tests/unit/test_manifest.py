"""The manifest: what one pass over shards knows, and gives back by row, wherever the shards lie."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support_manifest import sample, write_set, write_tar

from diptych.config import ConfigError
from diptych.datasets import storage
from diptych.datasets.manifest import Manifest, open_manifest
from diptych.datasets.survey import SCHEMA, key_hash

POMOLOGICAL = Path(__file__).parents[3] / "shared" / "data" / "pomological"


@pytest.mark.skipif(not POMOLOGICAL.exists(), reason="../shared/data/pomological is not there")
def test_real_img2dataset_shards(tmp_path):
    manifest = open_manifest(str(POMOLOGICAL / "shards"), str(tmp_path))
    assert (manifest.samples, manifest.failed_downloads, manifest.faults) == (7501, 79, [])
    listed = [pq.read_table(path) for path in sorted((POMOLOGICAL / "shards").glob("*.parquet"))]
    expected = {row["key"]: row for table in listed for row in table.to_pylist() if row["status"] == "success"}
    table = manifest.rows(np.arange(manifest.samples))
    assert set(table["key"].to_pylist()) == set(expected)
    for row in table.slice(0, 500).to_pylist():
        wanted = expected[row["key"]]
        assert (row["caption"], row["width"], row["height"]) == (wanted["caption"], wanted["width"], wanted["height"])
        assert json.loads(row["meta"])["sha256"] == wanted["sha256"]
    rows = np.random.default_rng(0).permutation(manifest.samples)[:50]
    shards, offsets, sizes = manifest.members(rows, ("jpg",))
    for shard, offset, size in zip(shards, offsets, sizes, strict=True):
        Image.open(io.BytesIO(storage.read_range(manifest.shard_url(shard), int(offset), int(size)))).load()


def test_rows_come_in_the_order_asked(tmp_path):
    manifest = open_manifest(write_set(tmp_path / "set"))
    assert manifest.shard_starts.tolist() == [0, 8, 16, 24]
    rows = np.array([23, 0, 0, 9, 8])
    table = manifest.rows(rows)
    assert table.schema == SCHEMA
    assert table["key"].to_pylist() == ["00002007", "00000000", "00000000", "00001001", "00001000"]
    assert table["shard"].to_pylist() == [2, 0, 0, 1, 1]
    assert table["key_hash"].to_pylist() == [key_hash(key) for key in table["key"].to_pylist()]
    everything = pq.read_table(manifest.samples_path)
    assert everything.num_rows == 24
    assert table.equals(everything.take(pa.array(rows)))
    assert manifest.rows(rows, ["caption", "width"]).equals(table.select(["caption", "width"]))
    assert manifest.rows(np.empty(0, np.int64)).num_rows == 0
    with pytest.raises(IndexError, match="24"):
        manifest.rows(np.array([24]))
    for name in ("key", "caption", "members", "meta"):
        assert manifest.column(name).to_pylist() == everything[name].to_pylist()
    for name in ("shard", "key_hash", "width", "height"):
        assert np.array_equal(manifest.column(name), everything[name].to_numpy())


@settings(max_examples=20, deadline=None)
@given(
    samples=st.lists(st.lists(st.sampled_from(["jpg", "png", "txt", "json", "npy"]), unique=True, min_size=1), min_size=1, max_size=12),
    wanted=st.lists(st.sampled_from(["jpg", "png", "txt", "npy", "gif"]), unique=True, max_size=3),
    data=st.data(),
)
def test_members_are_the_first_present_extension(samples, wanted, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    members = [(f"{index}.{ext}", ext.encode() * (index + 1)) for index, extensions in enumerate(samples) for ext in extensions]
    half = len(members) // 2 if len(samples) > 1 else len(members)
    cut = next(
        (place for place in range(half, len(members)) if members[place][0].split(".")[0] != members[place - 1][0].split(".")[0]),
        len(members),
    )
    write_tar(folder / "0.tar", members[:cut])
    if members[cut:]:
        write_tar(folder / "1.tar", members[cut:])
    manifest = open_manifest(str(folder))
    rows = np.array(data.draw(st.lists(st.integers(0, len(samples) - 1), max_size=20)), np.int64)
    shards, offsets, sizes = manifest.members(rows, tuple(wanted))
    assert (shards.dtype, offsets.dtype, sizes.dtype) == (np.int32, np.int64, np.int64)
    for row, shard, offset, size in zip(rows, shards, offsets, sizes, strict=True):
        chosen = next((ext for ext in wanted if ext in samples[row]), None)
        if chosen is None:
            assert (offset, size) == (-1, -1)
        else:
            content = chosen.encode() * (int(manifest.rows(np.array([row]), ["key"])["key"][0].as_py()) + 1)
            assert storage.read_range(manifest.shard_url(int(shard)), int(offset), int(size)) == content


def test_the_digest_is_of_the_content_not_of_the_place(tmp_path):
    first = open_manifest(write_set(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".diptych"))
    assert open_manifest(str(tmp_path / "b")).digest == first.digest
    write_tar(
        tmp_path / "b" / "00001.tar",
        [member for index in range(8) for member in sample(f"00001{index:03d}", "another caption"[: 9 + index % 2])],
    )
    assert open_manifest(str(tmp_path / "b")).digest != first.digest
    os.rename(tmp_path / "a" / "00002.tar", tmp_path / "a" / "00009.tar")
    assert open_manifest(str(tmp_path / "a")).digest != first.digest


def test_readers_may_share_a_manifest(tmp_path):
    manifest = open_manifest(write_set(tmp_path / "set"))
    expected = manifest.rows(np.arange(24))
    again = pickle.loads(pickle.dumps(manifest))
    barrier = threading.Barrier(8)

    def read(seed):
        rows = np.random.default_rng(seed).permutation(24)
        barrier.wait()
        return all(again.rows(rows).equals(expected.take(pa.array(rows))) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_the_folder_may_move(tmp_path):
    write_set(tmp_path / "a")
    open_manifest(str(tmp_path / "a"))
    os.rename(tmp_path / "a", tmp_path / "b")
    manifest = Manifest.load(str(tmp_path / "b" / ".diptych"))
    assert manifest.shard_url(0) == str(tmp_path / "b" / "00000.tar")


def test_a_run_keeps_its_version_while_shards_are_added(tmp_path):
    folder = write_set(tmp_path / "set")
    first = open_manifest(folder)
    write_tar(tmp_path / "set" / "00000a.tar", sample("x0"))
    second = open_manifest(folder)
    again = pickle.loads(pickle.dumps(first))
    assert (again.digest, again.rows(np.arange(24)).equals(first.rows(np.arange(24)))) == (first.digest, True)
    assert Manifest.load(second.folder).digest == second.digest
    write_tar(tmp_path / "set" / "00000b.tar", sample("x1"))
    open_manifest(folder)
    with pytest.raises(ConfigError, match="start a new run"):
        Manifest.load(first.folder, digest=first.digest)


def test_a_manifest_goes_beside_its_shards_or_into_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_set(tmp_path / "set")
    os.chmod(folder, 0o555)
    assert open_manifest(folder).folder.startswith(f"{tmp_path}/.diptych/manifests/set-")
    assert not os.path.exists(f"{folder}/.diptych")
    os.chmod(folder, 0o755)
    assert open_manifest(folder).folder == f"{folder}/.diptych"
    one, some = open_manifest(f"{folder}/00000.tar").folder, open_manifest(f"{folder}/{{00000..00001}}.tar").folder
    assert len({one, some, f"{folder}/.diptych"}) == 3
    assert one.startswith(f"{folder}/.diptych/")


def test_a_manifest_that_came_with_read_only_shards_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_set(tmp_path / "set")
    open_manifest(folder)
    os.chmod(folder, 0o555)
    assert open_manifest(folder).folder == f"{folder}/.diptych"
    os.truncate(tmp_path / "set" / "00000.tar", 5000)
    stale = open_manifest(folder)
    assert stale.folder.startswith(f"{tmp_path}/.diptych/manifests/set-")
    assert len(stale.faults) == 1
    os.chmod(folder, 0o755)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    folder = write_set(tmp_path / "set")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="data.manifest"):
        open_manifest(folder, str(tmp_path / "file" / "manifest"))


def test_a_link_to_a_lost_shard_is_refused(tmp_path):
    folder = write_set(tmp_path / "set")
    os.symlink("gone.tar", tmp_path / "set" / "00003.tar")
    os.mkdir(tmp_path / "set" / "folder.tar")
    with pytest.raises(ConfigError, match="00003"):
        open_manifest(folder)


def test_part_of_a_set_has_the_names_of_the_whole(tmp_path):
    folder = write_set(tmp_path / "set")
    part = open_manifest(f"{folder}/{{00000..00001}}.tar")
    assert part.shard_names == ["00000.tar", "00001.tar"]
    assert part.samples == 16
    (tmp_path / "set" / "00002.tar").unlink()
    assert open_manifest(folder).digest == part.digest
