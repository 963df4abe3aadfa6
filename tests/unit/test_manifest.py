"""The manifest: what one pass over shards knows, finds wrong, and gives back by row."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
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

from diptych.config import ConfigError
from diptych.datasets import manifest_build, storage
from diptych.datasets.image_size import image_size
from diptych.datasets.manifest import Manifest, build_manifest, default_folder, open_manifest
from diptych.datasets.manifest_writer import ManifestWriter
from diptych.datasets.survey import SCHEMA, key_hash, survey_shard

POMOLOGICAL = Path(__file__).parents[3] / "shared" / "data" / "pomological"


def picture(width=20, height=10, kind="JPEG", **options):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 80, 20)).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = picture()


def write_tar(path, members, layout=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=layout) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1795199932.5 if layout == tarfile.PAX_FORMAT else 0
            archive.addfile(info, io.BytesIO(data))


def sample(key, caption="a caption"):
    return [(f"{key}.jpg", JPEG), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps({"key": key}).encode())]


def write_set(folder, shards=3, count=8):
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        write_tar(folder / f"{shard:05d}.tar", [member for index in range(count) for member in sample(f"{shard:05d}{index:03d}")])
    return str(folder)


def kinds(manifest):
    return [(fault.shard, fault.key, fault.kind) for fault in manifest.faults]


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


def test_only_changed_shards_are_walked_again(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")
    first = open_manifest(folder)
    walked = []
    monkeypatch.setattr(manifest_build, "survey_shard", lambda url, name, *rest: walked.append(name) or survey_shard(url, name, *rest))
    assert open_manifest(folder).digest == first.digest
    assert walked == []
    write_tar(tmp_path / "set" / "00001.tar", sample("00001000", "changed") + sample("00001000", "again"))
    write_tar(tmp_path / "set" / "00003.tar", sample("00003000"))
    seen = []
    second = open_manifest(folder, progress=lambda done, total: seen.append((done, total)))
    assert sorted(walked) == ["00001.tar", "00003.tar"]
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert second.shard_starts.tolist() == [0, 8, 9, 17, 18]
    assert kinds(second) == [("00001.tar", "00001000", "duplicate_key")]
    walked.clear()
    os.unlink(tmp_path / "set" / "00000.tar")
    third = open_manifest(folder)
    assert walked == []
    assert third.shard_starts.tolist() == [0, 1, 9, 10]
    assert kinds(third) == kinds(second)
    fresh = build_manifest(folder, str(tmp_path / "fresh"))
    assert len(walked) == 3
    assert fresh.digest == third.digest
    assert fresh.rows(np.arange(10)).equals(third.rows(np.arange(10)))


def test_a_flipped_byte_is_found_though_the_size_stays(tmp_path):
    folder = write_set(tmp_path / "set")
    assert open_manifest(folder).faults == []
    path = tmp_path / "set" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"00001003.jpg") + 5] ^= 1
    path.write_bytes(data)
    manifest = open_manifest(folder)
    assert ("00001.tar", "00001002", "bad_header") in kinds(manifest)
    assert ("00001.tar", "00001003", "missing_member") in kinds(manifest)
    assert manifest.samples == 24


def test_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")
    walked = []

    def walk_two(url, name, *rest):
        if len(walked) == 2:
            raise KeyboardInterrupt
        walked.append(name)
        return survey_shard(url, name, *rest)

    monkeypatch.setattr(manifest_build, "survey_shard", walk_two)
    with pytest.raises(KeyboardInterrupt):
        open_manifest(folder, jobs=1)
    with pytest.raises(FileNotFoundError):
        Manifest.load(f"{folder}/.diptych")
    monkeypatch.setattr(manifest_build, "survey_shard", lambda url, name, *rest: walked.append(name) or survey_shard(url, name, *rest))
    assert open_manifest(folder, jobs=1).samples == 24
    assert walked == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(entry for entry in os.listdir(f"{folder}/.diptych") if not entry.startswith("v-")) == [".lock", "manifest.json"]


def test_an_interrupted_commit_leaves_the_old_manifest(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")
    before = open_manifest(folder).digest
    write_tar(tmp_path / "set" / "00003.tar", sample("00003000"))
    monkeypatch.setattr(ManifestWriter, "_write_tables", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        open_manifest(folder)
    assert Manifest.load(f"{folder}/.diptych").digest == before
    assert len([entry for entry in os.listdir(f"{folder}/.diptych") if entry.startswith("v-")]) == 1


@pytest.mark.parametrize("damage", ["cut_json", "cut_column", "no_column", "old_format"])
def test_a_damaged_manifest_is_refused_and_built_again(damage, tmp_path):
    folder = write_set(tmp_path / "set")
    manifest = open_manifest(folder)
    about = Path(manifest.folder, "manifest.json")
    column = Path(manifest.columns.folder, "member_offset.bin")
    if damage == "cut_json":
        about.write_bytes(about.read_bytes()[:50])
    elif damage == "old_format":
        about.write_text(about.read_text().replace('"format": 1', '"format": 0'))
    elif damage == "cut_column":
        os.truncate(column, 8)
    else:
        column.unlink()
    with pytest.raises(ConfigError, match="diptych index"):
        Manifest.load(manifest.folder)
    assert open_manifest(folder).digest == manifest.digest


def test_walks_in_processes_find_the_same(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")
    (tmp_path / "set" / "00001.tar").write_bytes((tmp_path / "set" / "00001.tar").read_bytes()[:5000])
    expected = open_manifest(folder, str(tmp_path / "one"), jobs=1)
    monkeypatch.setattr(manifest_build, "PROCESS_BYTES", 0)
    manifest = open_manifest(folder, str(tmp_path / "two"), jobs=2)
    assert (manifest.digest, manifest.faults) == (expected.digest, expected.faults)
    assert len(manifest.faults) == 1


def test_builders_of_one_folder_wait_for_each_other(tmp_path):
    folder = write_set(tmp_path / "set")
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda _: open_manifest(folder).digest, range(4)))
    assert len(set(digests)) == 1


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


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_set(tmp_path / "set")
    assert default_folder(folder) == f"{folder}/.diptych"
    one, some = default_folder(f"{folder}/00000.tar"), default_folder(f"{folder}/{{00000..00001}}.tar")
    assert len({one, some, f"{folder}/.diptych"}) == 3
    assert one.startswith(f"{folder}/.diptych/")
    os.chmod(folder, 0o555)
    elsewhere = default_folder(folder)
    assert elsewhere.startswith(f"{tmp_path}/.diptych/manifests/set-")
    assert open_manifest(folder).folder == elsewhere
    assert not os.path.exists(f"{folder}/.diptych")
    os.chmod(folder, 0o755)


def test_a_manifest_that_came_with_read_only_shards_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_set(tmp_path / "set")
    open_manifest(folder)
    os.chmod(folder, 0o555)
    assert open_manifest(folder).folder == f"{folder}/.diptych"
    os.truncate(tmp_path / "set" / "00000.tar", 5000)
    stale = open_manifest(folder)
    assert stale.folder == default_folder(folder) != f"{folder}/.diptych"
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


# Faults.


def faults_of(tmp_path, members, others=4, **sidecars):
    """Kinds found in a shard of `members`, among whole samples that make image and caption the rule."""
    folder = tmp_path / "set"
    folder.mkdir()
    write_tar(folder / "00000.tar", [*members, *(member for index in range(others) for member in sample(f"9{index}"))])
    for name, content in sidecars.items():
        (folder / name).write_bytes(content)
    return open_manifest(str(folder))


def test_keys_with_dots_are_kept_apart_and_reported(tmp_path):
    manifest = faults_of(tmp_path, [*sample("a.1", "first"), *sample("a.2", "second")])
    assert manifest.rows(np.arange(2), ["key", "caption"]).to_pylist() == [
        {"key": "a.1", "caption": "first"},
        {"key": "a.2", "caption": "second"},
    ]
    assert kinds(manifest) == [("00000.tar", "a.1", "dotted_key"), ("00000.tar", "a.2", "dotted_key")]


def test_a_repeated_key_keeps_the_first_sample(tmp_path):
    manifest = faults_of(tmp_path, [*sample("a", "first"), *sample("b"), *sample("a", "second"), *sample("c"), *sample("c", "next to it")])
    assert kinds(manifest) == [("00000.tar", "a", "duplicate_key"), ("00000.tar", "c", "duplicate_key")]
    assert manifest.rows(np.arange(3), ["caption"])["caption"].to_pylist() == ["first", "a caption", "a caption"]
    assert manifest.samples == 7


def test_members_that_lie_apart_are_joined_and_reported(tmp_path):
    manifest = faults_of(tmp_path, [("a.jpg", JPEG), *sample("b"), ("a.txt", b"later")])
    assert kinds(manifest) == [("00000.tar", "a", "split_sample")]
    assert manifest.rows(np.arange(1), ["caption"])["caption"].to_pylist() == ["later"]


def test_keys_repeated_in_another_shard_are_reported(tmp_path):
    folder = write_set(tmp_path / "set", shards=2, count=2)
    write_tar(tmp_path / "set" / "x.tar", sample("00000001"))
    manifest = open_manifest(folder)
    assert kinds(manifest) == [("x.tar", "00000001", "repeated_key")]
    assert "00000.tar" in manifest.faults[0].detail
    assert manifest.samples == 5


def test_the_search_for_repeated_keys_works_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.datasets.manifest_writer.HASHES_AT_ONCE", 3)
    monkeypatch.setattr("diptych.datasets.manifest_writer.CHUNK_ROWS", 5)
    folder = write_set(tmp_path / "set", shards=2, count=6)
    write_tar(tmp_path / "set" / "x.tar", [member for index in range(6) for member in sample(f"00001{index:03d}")])
    manifest = open_manifest(folder)
    assert sorted(kinds(manifest)) == [("x.tar", f"00001{index:03d}", "repeated_key") for index in range(6)]


@pytest.mark.parametrize(("ext", "role"), [("txt", "caption"), ("jpg", "image")])
def test_a_missing_member_is_reported_where_most_samples_have_it(ext, role, tmp_path):
    manifest = faults_of(tmp_path, [member for member in sample("a") if not member[0].endswith(ext)])
    assert kinds(manifest) == [("00000.tar", "a", "missing_member")]
    assert f"no {role}" in manifest.faults[0].detail
    assert manifest.members(np.array([0]), (ext,))[1].tolist() == [-1]


def test_nothing_is_missing_where_few_samples_have_it(tmp_path):
    manifest = faults_of(tmp_path, [(f"t{index}.txt", b"a prompt") for index in range(6)])
    assert kinds(manifest) == []
    assert (manifest.facts()["samples"], manifest.facts()["captions"], manifest.facts()["images"]) == (10, 10, 4)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jpg", b"", "empty_member"),
        ("a.txt", b"", "empty_member"),
        ("a.txt", b"caf\xe9", "bad_text"),
        ("a.txt", b"nul \0 byte", "bad_text"),
        ("a.txt", b"x" * (1 << 20) + b"y", "bad_text"),
        ("a.json", b"{not json", "bad_json"),
        ("a.json", b"[" * 100_000, "bad_json"),
    ],
)
def test_bad_members_are_reported(name, content, kind, tmp_path):
    members = [(member, content if member == name else data) for member, data in sample("a")]
    manifest = faults_of(tmp_path, members)
    assert kinds(manifest) == [("00000.tar", "a", kind)]
    row = manifest.rows(np.array([0])).to_pylist()[0]
    assert row["caption"] == (None if name == "a.txt" else "a caption")
    assert (row["meta"] is None) == (name == "a.json")
    assert len(row["members"]) == 3


def test_names_that_belong_to_no_sample_are_reported(tmp_path):
    manifest = faults_of(tmp_path, [("README", b"x"), *sample("a"), (".hidden", b"x"), ("../evil.jpg", JPEG)])
    assert [(key, kind) for _, key, kind in kinds(manifest)] == [
        ("README", "no_extension"),
        (".hidden", "no_extension"),
        ("../evil", "unsafe_name"),
    ]
    assert manifest.samples == 5


def stats(successes, failed=0):
    return json.dumps({"successes": successes, "failed_to_download": failed, "failed_to_resize": 0}).encode()


def listing(keys, failed=()):
    buffer = io.BytesIO()
    rows = [{"key": key, "status": "success"} for key in keys] + [{"key": key, "status": "failed_to_download"} for key in failed]
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def test_img2dataset_counts_are_compared(tmp_path):
    keys = ["a", "90", "91", "92", "93"]
    manifest = faults_of(tmp_path, sample("a"), **{"00000_stats.json": stats(5, 2), "00000.parquet": listing(keys, ["x", "y"])})
    assert (manifest.faults, manifest.failed_downloads) == ([], 2)


def test_disagreement_with_img2dataset_is_reported_by_key(tmp_path):
    manifest = faults_of(
        tmp_path, sample("a"), **{"00000_stats.json": stats(6), "00000.parquet": listing(["lost", "90", "91", "92", "93"])}
    )
    assert sorted(kinds(manifest)) == [
        ("00000.tar", "", "count_mismatch"),
        ("00000.tar", "a", "unlisted_sample"),
        ("00000.tar", "lost", "missing_sample"),
    ]


def test_unreadable_statistics_and_unfinished_shards_are_reported(tmp_path):
    manifest = faults_of(tmp_path, sample("a"), **{"00000_stats.json": b"{", "00000.parquet": b"PAR1 no"})
    assert kinds(manifest) == [("00000.tar", "", "bad_statistics")] * 2
    folder = write_set(tmp_path / "two", shards=2)
    (tmp_path / "two" / "00000_stats.json").write_bytes(stats(8))
    assert kinds(open_manifest(folder)) == [("00001.tar", "", "unfinished_shard")]


def test_an_empty_shard_among_others(tmp_path):
    folder = write_set(tmp_path / "set", shards=3, count=2)
    (tmp_path / "set" / "00001.tar").write_bytes(b"")
    manifest = open_manifest(folder)
    assert kinds(manifest) == [("00001.tar", "", "empty_shard")]
    assert manifest.shard_starts.tolist() == [0, 2, 2, 4]
    assert manifest.rows(np.arange(4))["shard"].to_pylist() == [0, 0, 2, 2]
    assert manifest.shard_of(np.arange(4)).tolist() == [0, 0, 2, 2]


def test_sizes_come_from_the_pixels_where_no_json_states_them(tmp_path):
    pictures = {
        "a.jpg": picture(31, 7),
        "b.png": picture(32, 8, "PNG"),
        "c.webp": picture(33, 9, "WEBP"),
        "d.gif": picture(34, 10, "GIF"),
        "e.bmp": picture(35, 11, "BMP"),
        "f.webp": picture(36, 12, "WEBP", lossless=True),
        "g.jpg": picture(37, 13, exif=b"Exif\0\0" + b"\x01" * 60_000),
        "h.jpg": picture(38, 14, progressive=True),
        "i.jpg": b"no picture",
    }
    manifest = faults_of(tmp_path, pictures.items(), others=0)
    sizes = list(zip(manifest.column("width").tolist(), manifest.column("height").tolist(), strict=True))
    assert sizes == [(31 + index, 7 + index) for index in range(8)] + [(-1, -1)]
    assert manifest.rows(np.array([8]), ["width"])["width"].to_pylist() == [None]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"GIF89a", b"BM", b""]))
def test_image_size_survives_any_bytes(tail, magic):
    size = image_size(magic + tail)
    assert size is None or (size[0] > 0 and size[1] > 0)
