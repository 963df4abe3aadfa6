"""The shard writer: img2dataset's layout and keys, whole files or none, and readers of both sides."""

from __future__ import annotations

import glob
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diptych.config import ConfigError
from diptych.datasets.manifest import open_manifest
from diptych.datasets.shards import ShardWriter, index_digits, sample_key


def picture(width):
    buffer = io.BytesIO()
    Image.new("RGB", (width, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


def stream(count):
    for index in range(count):
        if index % 4 == 3:
            yield {"status": "failed_to_download", "error_message": "HTTP 404", "json": {"url": f"u{index}"}}
        else:
            yield {"jpg": picture(20 + index), "txt": f"a café, {index}", "json": {"url": f"u{index}"}}


def test_img2dataset_layout(tmp_path):
    results = ShardWriter(str(tmp_path), 10).write_all(stream(25))
    assert [(result.samples, result.failed) for result in results] == [(8, 2), (7, 3), (4, 1)]
    assert sorted(os.listdir(tmp_path)) == [f"{shard:05d}{end}" for shard in range(3) for end in (".parquet", ".tar", "_stats.json")]
    rows = pq.read_table(tmp_path / "00001.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"00001{index}" for index in range(10)]
    assert rows[1] == {
        "url": "u11", "caption": None, "key": "000011", "status": "failed_to_download", "error_message": "HTTP 404",
        "width": None, "height": None,
    }  # fmt: skip
    assert (rows[2]["caption"], rows[2]["width"], rows[2]["height"], rows[2]["status"]) == ("a café, 12", 32, 16, "success")
    stats = json.loads((tmp_path / "00001_stats.json").read_text())
    assert {name: stats[name] for name in ("count", "successes", "failed_to_download", "failed_to_resize")} == {
        "count": 10, "successes": 7, "failed_to_download": 3, "failed_to_resize": 0,
    }  # fmt: skip
    assert stats["status_dict"] == {"success": 7, "HTTP 404": 3}
    assert {"duration", "start_time", "end_time"} <= set(stats)


def test_webdataset_reads_our_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    ShardWriter(str(tmp_path), 10).write_all(stream(25))
    tars = sorted(glob.glob(str(tmp_path / "*.tar")))
    read = list(wds.WebDataset(tars, shardshuffle=False).decode("pil"))
    kept = [index for index in range(25) if index % 4 != 3]
    assert [sample["__key__"] for sample in read] == [f"{index // 10:05d}{index % 10}" for index in kept]
    assert [(sample["txt"], sample["jpg"].size, sample["json"]["url"]) for sample in read] == [
        (f"a café, {index}", (20 + index, 16), f"u{index}") for index in kept
    ]


def test_the_manifest_agrees_with_our_statistics(tmp_path):
    ShardWriter(str(tmp_path), 10).write_all(stream(25))
    manifest = open_manifest(str(tmp_path))
    assert (manifest.samples, manifest.failed_downloads, manifest.faults) == (19, 6, [])
    assert manifest.rows(np.array([18]), ["key", "caption", "width", "height"]).to_pylist() == [
        {"key": "000024", "caption": "a café, 24", "width": 44, "height": 16}
    ]


def test_webdataset_shards_are_read_by_us(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "00000.tar")) as writer:
        for index in range(5):
            writer.write({"__key__": f"some/path/{index}", "jpg": picture(30 + index), "txt": f"text {index}", "json": {"n": index}})
    manifest = open_manifest(str(tmp_path))
    assert manifest.faults == []
    assert manifest.rows(np.arange(5), ["key", "caption", "width"]).to_pylist() == [
        {"key": f"some/path/{index}", "caption": f"text {index}", "width": 30 + index} for index in range(5)
    ]


@given(st.integers(1, 10**6), st.data())
def test_keys_are_those_of_img2dataset(samples_per_shard, data):
    shard, index = data.draw(st.integers(0, 99_999)), data.draw(st.integers(0, samples_per_shard - 1))
    key = sample_key(shard, index, samples_per_shard)
    digits = index_digits(samples_per_shard)
    assert len(key) == 5 + digits
    assert (int(key[:5]), int(key[5:] or 0)) == (shard, index)


@pytest.mark.parametrize(("samples_per_shard", "digits"), [(10_000, 4), (1000, 3), (101, 3), (100, 2), (10, 1), (2, 1), (1, 0)])
def test_index_digits(samples_per_shard, digits):
    assert index_digits(samples_per_shard) == digits


def test_keys_equal_img2datasets_own_function():
    downloader = pytest.importorskip("img2dataset.downloader", reason="extra `ingest` is not installed")
    for samples_per_shard in (1, 10, 100, 1000, 10_000):
        width = index_digits(samples_per_shard)
        for shard, index in ((0, 0), (7, samples_per_shard - 1), (123, samples_per_shard // 2)):
            assert sample_key(shard, index, samples_per_shard) == downloader.compute_key(index, shard, width, 5)


def test_a_failing_source_leaves_no_shard(tmp_path):
    def broken():
        yield from stream(5)
        raise RuntimeError("the source broke")

    writer = ShardWriter(str(tmp_path), 10)
    with pytest.raises(RuntimeError, match="broke"):
        writer.write_shard(0, broken())
    assert os.listdir(tmp_path) == []
    assert not writer.is_finished(0)


def test_a_killed_writer_leaves_nothing_that_looks_like_a_shard(tmp_path):
    code = """
    import itertools, sys, time
    from diptych.datasets.shards import ShardWriter
    def samples():
        for index in range(15):
            yield {"jpg": b"x" * 100_000}
        print("now", flush=True)
        time.sleep(60)
    ShardWriter(sys.argv[1], 10).write_all(samples())
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    writer = ShardWriter(str(tmp_path), 10)
    assert (writer.is_finished(0), writer.is_finished(1)) == (True, False)
    assert glob.glob(str(tmp_path / "*.tar")) == [str(tmp_path / "00000.tar")]
    writer.write_shard(1, stream(3))
    assert sorted(os.listdir(tmp_path)) == [f"{shard:05d}{end}" for shard in range(2) for end in (".parquet", ".tar", "_stats.json")]


def test_a_shard_that_is_written_again_does_not_count_until_it_is_whole(tmp_path, monkeypatch):
    writer = ShardWriter(str(tmp_path), 10)
    writer.write_shard(0, stream(4))
    monkeypatch.setattr("diptych.datasets.storage.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        writer.write_shard(0, stream(8))
    assert not writer.is_finished(0)
    assert not glob.glob(str(tmp_path / ".*"))


def test_the_same_samples_give_the_same_bytes(tmp_path):
    ShardWriter(str(tmp_path / "a"), 10).write_all(stream(5))
    time.sleep(1.1)
    ShardWriter(str(tmp_path / "b"), 10).write_all(stream(5))
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"seg.png": b"x"}, "without dots"),
        ({"JPG": b"x"}, "lower case"),
        ({"../jpg": b"x"}, "lower case without dots"),
        ({"jpg": b"x", "status": "lost"}, "failed_to_resize"),
    ],
)
def test_what_readers_would_not_give_back_is_refused(sample, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ShardWriter(str(tmp_path), 10).write_shard(0, [sample])
    assert os.listdir(tmp_path) == []


def test_too_many_samples_and_wrong_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="takes 10 samples"):
        ShardWriter(str(tmp_path), 10).write_shard(0, stream(11))
    with pytest.raises(ConfigError, match="samples_per_shard"):
        ShardWriter(str(tmp_path), 0)


def test_columns_of_mixed_types_become_text(tmp_path):
    ShardWriter(str(tmp_path), 10).write_shard(0, [{"txt": "a", "json": {"tag": 1}}, {"txt": "b", "json": {"tag": "x"}}])
    assert pq.read_table(tmp_path / "00000.parquet")["tag"].to_pylist() == ["1", "x"]


def test_shards_and_manifest_on_an_object_store(tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason="extra `s3` is not installed")
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    import fsspec
    import s3fs

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        fsspec.filesystem("s3").mkdir("made")
        writer = ShardWriter("s3://made/set", 10)
        writer.write_all(stream(25))
        assert (writer.is_finished(2), writer.is_finished(3)) == (True, False)
        ShardWriter(str(tmp_path / "local"), 10).write_all(stream(25))
        local = open_manifest(str(tmp_path / "local"))
        remote = open_manifest("s3://made/set")
        assert remote.folder.startswith(str(tmp_path / ".diptych" / "manifests" / "set-"))
        kept = open_manifest("s3://made/set", "s3://made/manifest")
        assert kept.folder == "s3://made/manifest"
        assert open_manifest("s3://made/set", "s3://made/manifest").samples_path == kept.samples_path
        for manifest in (remote, kept):
            assert (manifest.digest, manifest.faults) == (local.digest, [])
            assert manifest.rows(np.arange(19)).equals(local.rows(np.arange(19)))
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
