"""What is wrong in shards is found by the manifest: keys, members, counts of img2dataset's, and pictures' sizes."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_manifest import JPEG, kinds, picture, sample, write_set, write_tar

from diptych.datasets.image_size import image_size
from diptych.datasets.manifest import open_manifest


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
