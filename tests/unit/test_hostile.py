"""Hostile input through the verbs: a line or a clear refusal for each, no crash, no file outside the output."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.batches import ImageNeed, Needs
from diptych.config import ConfigError, DataConfig
from diptych.datasets import embeddings as joins
from diptych.datasets.filter import filter_rows
from diptych.datasets.manifest import open_manifest
from diptych.datasets.reader import SampleSource, read_rows
from diptych.pipelines import dedup, index, inspect, pack, reorder


def jpeg(number: int, side: int = 24) -> bytes:
    stream = BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def png_bomb() -> bytes:
    """A PNG of 60,000 × 60,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9)) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A JPEG whose header promises 65,500 × 65,500 pixels."""
    data = bytearray(jpeg(0))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def array(content: Any, pickled: bool = False) -> bytes:
    stream = BytesIO()
    np.save(stream, content, allow_pickle=pickled)
    return stream.getvalue()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A tar with four good samples (000000 to 000003) and everything that could hurt."""
    folder = tmp_path / "work" / "shards"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.GNU_FORMAT) as tar:

        def add(name: str, data: bytes, **fields: Any) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, BytesIO(data) if data else None)

        for number in range(4):
            add(f"{number:06d}.jpg", jpeg(number))
            add(f"{number:06d}.txt", f"good {number}".encode())
        add("../escape.jpg", jpeg(10))
        add("/tmp/diptych-escape/absolute.jpg", jpeg(11))
        add("deep/../../up.jpg", jpeg(12))
        add("000010.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("000011.jpg", b"", type=tarfile.LNKTYPE, linkname="../../secret")
        add("000012.jpg", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
        add("000020.jpg", jpeg_bomb())
        add("000020.txt", b"a jpeg bomb")
        add("000021.png", png_bomb())
        add("000021.txt", b"a png bomb")
        add("000022.jpg", jpeg(22))
        add("000022.txt", b"gigantic " * (1 << 18))
        add("000023.jpg", jpeg(23))
        add("000023.txt", b"nul \x00 inside")
        add("000024.jpg", jpeg(24))
        add("000024.txt", b"\xff\xfe broken \xc3\x28")
        add("000025.jpg", jpeg(25))
        add("000025.json", b'{"a":' * 5000)
        add("000026.jpg", jpeg(26))
        add("000026.npy", array(np.array([Bomb(tmp_path / "pwned")], object), pickled=True))
    return folder


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_the_verbs_name_each_and_go_on(hostile: Path, tmp_path: Path) -> None:
    before = everything_below(tmp_path)
    result = index.run(str(hostile))
    kinds = {fault["kind"] for fault in result["faults"]}
    names = json.dumps(result["faults"])
    for name in ("escape", "absolute", "up.jpg", "000010", "000011", "000012", "000022", "000024", "000025"):
        assert name in names, name
    assert {"unsafe_name", "not_a_file", "bad_text", "bad_json"} <= kinds

    verified = index.deep(str(hostile), "", 1, repair=True)
    found = {(fault["key"], fault["kind"]) for fault in verified["faults"]}
    assert {("000020", "undecodable_image"), ("000021", "undecodable_image"), ("000026", "bad_array")} <= found
    assert not (tmp_path / "pwned").exists()
    page = inspect.run(str(hostile), str(tmp_path / "look.html"))
    assert page["samples_in"] == result["samples"]
    manifest = open_manifest(str(hostile))
    assert len(filter_rows(manifest, "caption LIKE 'good%'")) == 4
    new = everything_below(tmp_path) - before
    assert all(name.startswith(("work/shards/.diptych", "work/shards/repaired", "look.html")) for name in new), new
    assert not Path("/tmp/diptych-escape").exists()
    assert not (tmp_path / "escape.jpg").exists()


def test_reading_fills_the_slot_and_names_the_sample(hostile: Path) -> None:
    manifest = open_manifest(str(hostile))
    rows = np.arange(manifest.samples)
    source = SampleSource.of(manifest, None, DataConfig(shards=str(hostile)))
    samples = read_rows(source, rows, rows, Needs(image=ImageNeed(16)), seed=0)
    named = {fault.key for _, fault in samples.faults}
    assert {"000020", "000021"} <= named
    assert not named & {f"{number:06d}" for number in range(4)}


def test_a_repaired_copy_holds_what_is_whole_and_the_broken_tar_is_untouched(hostile: Path) -> None:
    original = (hostile / "00000.tar").read_bytes()
    verified = index.deep(str(hostile), "", 1, repair=True)
    assert (hostile / "00000.tar").read_bytes() == original
    (copy,) = verified["repaired"]
    assert copy["url"] == str(hostile / "repaired" / "00000.tar")
    assert copy["lost"] == 3
    repaired = open_manifest(str(hostile / "repaired"))
    assert repaired.samples == copy["samples"]
    again = index.deep(str(hostile / "repaired"), "", 1, repair=False)
    assert again["faults"] == []
    kept = repaired.column("key").to_pylist()
    assert set(kept) >= {f"{number:06d}" for number in range(4)}
    assert not {"000020", "000021", "000026"} & set(kept)
    # The original folder has one shard still: the copy does not become part of it.
    assert open_manifest(str(hostile)).shard_names == ["00000.tar"]


def test_a_cut_tar_is_repaired_up_to_the_cut(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for number in range(5):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            data = jpeg(number)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    whole = (tmp_path / "00000.tar").read_bytes()
    with tarfile.open(fileobj=BytesIO(whole)) as tar:
        third = tar.getmembers()[3].offset_data
    (tmp_path / "00000.tar").write_bytes(whole[: third + 100])
    verified = index.deep(str(tmp_path), "", 1, repair=True)
    assert [copy["samples"] for copy in verified["repaired"]] == [3]
    with tarfile.open(tmp_path / "repaired" / "00000.tar") as tar:
        assert tar.getnames() == [f"{number:06d}.jpg" for number in range(3)]
        stored = tar.extractfile("000002.jpg")
        assert stored is not None
        assert stored.read() == jpeg(2)


@pytest.fixture
def embedded(tmp_path: Path) -> tuple[Path, Path]:
    """Four good samples and their embeddings."""
    shards, folder = tmp_path / "good", tmp_path / "emb"
    shards.mkdir()
    with tarfile.open(shards / "00000.tar", "w") as tar:
        for number in range(4):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(jpeg(number))
            tar.addfile(member, BytesIO(jpeg(number)))
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb" / "img_emb_0.npy", np.eye(4, dtype=np.float16))
    pq.write_table(pa.table({"image_path": [f"{number:06d}" for number in range(4)]}), folder / "metadata" / "metadata_0.parquet")
    return shards, folder


def damage(folder: Path, how: str, tmp_path: Path) -> None:
    numbers, metadata = folder / "img_emb" / "img_emb_0.npy", folder / "metadata" / "metadata_0.parquet"
    if how == "pickled":
        numbers.write_bytes(array(np.array([[Bomb(tmp_path / "pwned")] * 4] * 4, object), pickled=True))
    elif how == "cut array":
        numbers.write_bytes(numbers.read_bytes()[:-3])
    elif how == "no array":
        numbers.write_bytes(b"<html>404</html>")
    elif how == "huge header":
        numbers.write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 65535)
    elif how == "promises more":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": (2**40, 4)})
        numbers.write_bytes(header.getvalue() + b"x" * 64)
    elif how == "cut parquet":
        metadata.write_bytes(metadata.read_bytes()[:-20])
    elif how == "empty parquet":
        metadata.write_bytes(b"")


@pytest.mark.parametrize("how", ["pickled", "cut array", "no array", "huge header", "promises more", "cut parquet", "empty parquet"])
def test_broken_embeddings_are_refused_by_name(embedded: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    shards, folder = embedded
    damage(folder, how, tmp_path)
    named = "metadata_0.parquet" if "parquet" in how else "img_emb_0.npy"
    for call in (
        lambda: reorder.run(str(folder), str(shards), str(tmp_path / "out")),
        lambda: dedup.run(str(shards), str(tmp_path / "out"), str(folder)),
        lambda: joins.join(open_manifest(str(shards)), str(folder), ("image",)),
    ):
        with pytest.raises(ValueError, match=named):
            call()
    assert not (tmp_path / "pwned").exists()
    assert not list((tmp_path / "out").rglob("*.npy")) if (tmp_path / "out").exists() else True


def test_vectors_that_mean_nothing_are_nobodys_duplicates(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    shards, folder = embedded
    vectors = np.ones((4, 4), np.float16)
    vectors[0] = 0
    vectors[1, 2] = np.nan
    vectors[2, 1] = np.inf
    np.save(folder / "img_emb" / "img_emb_0.npy", vectors)
    result = dedup.run(str(shards), str(tmp_path / "unique"), str(folder), {"threshold": 0.5})
    assert result["dropped"] == 0
    assert result["usable"] == 1
    reordered = reorder.run(str(folder), str(shards), str(tmp_path / "reordered"))
    assert {fault["key"] for fault in reordered["faults"]} == {"000000", "000001", "000002"}
    written = np.load(tmp_path / "reordered" / "img_emb" / "img_emb_00000.npy")
    assert np.isfinite(written).all()
    assert written.any(axis=1).tolist() == [False, False, False, True]


def test_a_table_cannot_make_pack_read_or_write_outside(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.jpg").write_bytes(jpeg(1))
    (source / "bomb.png").write_bytes(png_bomb())
    rows = [
        {"file_name": "good.jpg", "text": "good"},
        {"file_name": "bomb.png", "text": "a bomb"},
        {"file_name": "missing.jpg", "text": "not there"},
        {"file_name": "good.jpg", "text": "nul \x00 \ud800 inside".encode("utf-8", "surrogatepass").decode("utf-8", "replace")},
    ]
    (source / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    before = everything_below(tmp_path)
    result = pack.run(str(source), str(tmp_path / "out"), {"resize": "longest", "size": 16}, jobs=1)
    assert result["samples_in"] == 4
    assert len(result["faults"]) >= 2
    assert all(name.startswith("out") for name in everything_below(tmp_path) - before)


def test_a_join_of_nothing_is_refused(embedded: tuple[Path, Path], tmp_path: Path) -> None:
    shards, _ = embedded
    with pytest.raises(ConfigError, match="neither|layout|img_emb"):
        joins.join(open_manifest(str(shards)), str(tmp_path / "nowhere"), ("image",))
