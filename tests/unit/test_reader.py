"""Only what is needed is read, every bad sample is named by shard, key and reason, and flaky reads never change the samples."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.batches import EmbeddingNeed, ImageNeed, Needs, TokenNeed, check_batch
from diptych.config import ConfigError, DataConfig
from diptych.datasets import reader
from diptych.datasets.embeddings import join
from diptych.datasets.manifest import Manifest, build_manifest
from diptych.datasets.ranged import PermanentReadError
from diptych.datasets.reader import SampleSource, read_rows
from diptych.datasets.shards import ShardWriter
from diptych.datasets.tokens import train_tokenizer

SAMPLES = 24
BAD = {
    3: "undecodable_image",
    7: "missing_member",
    10: "missing_member",
    12: "blank_caption",
    13: "nan_embedding",
    17: "zero_embedding",
    20: "missing_embedding",
}


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def sample(number: int) -> dict:
    made = {"jpg": picture(number), "txt": f"picture {number}"}
    if number == 3:
        made["jpg"] = made["jpg"][:-40]
    if number == 7:
        del made["jpg"]
    if number == 10:
        del made["txt"]
    if number == 12:
        made["txt"] = " \n"
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    ShardWriter(str(folder / "shards"), samples_per_shard=10).write_all([sample(number) for number in range(SAMPLES)])
    manifest = build_manifest(str(folder / "shards"))
    keys = np.array(manifest.column("key").to_pylist())
    order = [number for number in np.random.default_rng(0).permutation(SAMPLES) if number != 20]
    vectors = np.random.default_rng(1).normal(size=(SAMPLES, 6)).astype(np.float16)
    vectors[13, 2], vectors[17] = np.nan, 0
    for name in ("metadata", "img_emb"):
        (folder / "embeddings" / name).mkdir(parents=True)
    pq.write_table(pa.table({"image_path": keys[order]}), folder / "embeddings/metadata/metadata_0.parquet")
    np.save(folder / "embeddings/img_emb/img_emb_0.npy", vectors[order])
    np.save(folder / "vectors.npy", vectors)
    join(manifest, str(folder / "embeddings"), ("image",)).save(folder / "join")
    train_tokenizer([f"picture {number}" for number in range(SAMPLES)], 300, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.load(str(folder / "shards/.diptych"))


@pytest.fixture(scope="module")
def source(folder: Path, manifest: Manifest) -> SampleSource:
    joined = reader.EmbeddingJoin.load(folder / "join")
    return SampleSource.of(manifest, joined, DataConfig(decoder="pil"))


@pytest.fixture(scope="module")
def needs(folder: Path) -> Needs:
    return Needs(image=ImageNeed(16), tokens=TokenNeed(str(folder / "tokenizer"), 12), image_embedding=EmbeddingNeed(6))


def test_every_bad_sample_is_named_and_the_others_are_whole(source: SampleSource, needs: Needs, folder: Path) -> None:
    rows = np.arange(SAMPLES)[::-1].copy()
    slots = 1000 + np.arange(SAMPLES)
    read = read_rows(source, rows, slots, needs, seed=0)
    check_batch(read.arrays | {"weight": np.ones(SAMPLES, np.float32)}, needs)
    found = {int(rows[index]): fault for index, fault in read.faults}
    assert {row: fault.kind for row, fault in found.items()} == BAD
    for row, fault in found.items():
        assert (fault.shard, fault.key) == (f"{row // 10:05d}.tar", f"{row // 10:05d}{row % 10}")
        assert fault.slot == slots[SAMPLES - 1 - row]
        assert fault.detail
    vectors = np.load(folder / "vectors.npy").astype(np.float32)
    good = [index for index, row in enumerate(rows) if row not in BAD]
    np.testing.assert_array_equal(read.arrays["image_embedding"][good], vectors[rows[good]])
    assert (read.arrays["tokens"][good, 0] == 1).all()
    assert all(read.arrays["image"][index].std() > 5 for index in good)
    for key in ("image", "tokens", "token_mask", "image_embedding"):
        assert not read.arrays[key][[index for index, row in enumerate(rows) if row in BAD]].any()


def test_a_row_reads_the_same_in_any_company(source: SampleSource, needs: Needs) -> None:
    need = Needs(image=ImageNeed(16, "random_crop", flip=0.5, min_scale=0.5), tokens=needs.tokens)
    rows = np.array([0, 23, 5, 11, 1])
    slots = np.array([9, 4, 7, 2, 8])
    together = read_rows(source, rows, slots, need, seed=3)
    for index in range(len(rows)):
        alone = read_rows(source, rows[index : index + 1], slots[index : index + 1], need, seed=3)
        for key, array in alone.arrays.items():
            np.testing.assert_array_equal(array[0], together.arrays[key][index])
    assert not np.array_equal(together.arrays["image"], read_rows(source, rows, slots, need, seed=4).arrays["image"])


def test_only_the_members_that_are_needed_are_read(source: SampleSource, needs: Needs, manifest: Manifest, tmp_path: Path) -> None:
    rows = np.arange(SAMPLES)
    # Where no picture is needed no tar is opened: the shards need not even be there.
    absent = replace(source, root=str(tmp_path / "nowhere"), retries=0)
    read = read_rows(absent, rows, rows, Needs(tokens=needs.tokens, image_embedding=needs.image_embedding), seed=0)
    assert read.bytes_read == 0
    with pytest.raises(FileNotFoundError):
        read_rows(absent, rows, rows, Needs(image=needs.image), seed=0)
    _, _, sizes = manifest.members(rows, ("jpg",))
    assert read_rows(source, rows, rows, Needs(image=needs.image), seed=0).bytes_read == sizes[sizes > 0].sum()


def test_a_shard_that_was_cut_since_fails_the_attempt(source: SampleSource, folder: Path, tmp_path: Path) -> None:
    for path in (folder / "shards").glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:600])
    cut = replace(source, root=str(tmp_path), retries=1)
    with pytest.raises(PermanentReadError, match=r"00000\.tar"):
        read_rows(cut, np.array([5]), np.array([0]), Needs(image=ImageNeed(16)), seed=0)


def test_pictures_much_larger_than_their_target_are_read_in_parts(source: SampleSource, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.array([row for row in range(SAMPLES) if row not in BAD])
    need = Needs(image=ImageNeed(16))
    whole = read_rows(source, rows, rows, need, seed=0)
    monkeypatch.setattr(reader, "READ_AHEAD_BYTES", 3 * len(picture(0)))
    in_parts = read_rows(source, rows, rows, need, seed=0)
    np.testing.assert_array_equal(whole.arrays["image"], in_parts.arrays["image"])
    assert whole.bytes_read == in_parts.bytes_read


def test_a_picture_of_absurd_length_is_not_read(source: SampleSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.images, "MAX_BYTES", 100)
    read = read_rows(source, np.array([0]), np.array([0]), Needs(image=ImageNeed(16)), seed=0)
    assert [fault.kind for _, fault in read.faults] == ["oversized_member"]
    assert read.bytes_read == 0


def test_what_the_source_lacks_is_a_wrong_call(source: SampleSource, manifest: Manifest) -> None:
    rows = np.array([0])
    with pytest.raises(ConfigError, match="dimension 6"):
        read_rows(source, rows, rows, Needs(image_embedding=EmbeddingNeed(5)), seed=0)
    with pytest.raises(ConfigError, match="text"):
        read_rows(source, rows, rows, Needs(text_embedding=EmbeddingNeed(None)), seed=0)
    with pytest.raises(ConfigError, match=r"data\.embeddings"):
        read_rows(SampleSource.of(manifest, None, DataConfig()), rows, rows, Needs(image_embedding=EmbeddingNeed(6)), seed=0)


def test_a_source_is_small_and_travels(source: SampleSource) -> None:
    data = pickle.dumps(source)
    assert len(data) < 1000
    assert pickle.loads(data) == source
    assert pickle.loads(data).opened() is source.opened()


def test_data_that_changed_since_is_refused(source: SampleSource) -> None:
    with pytest.raises(ConfigError, match="that this run started on"):
        replace(source, digest="0" * 64).opened()


@pytest.fixture
def flaky_server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The shards over HTTP with ranges; every first request of a path and range is answered by 503."""
    import http.server
    import threading

    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(head=True)

        def do_GET(self) -> None:
            self._answer(head=False)

        def _answer(self, head: bool) -> None:
            data = (folder / "shards" / self.path.rpartition("/")[2]).read_bytes()
            wanted = self.headers.get("Range", "")
            request = f"{self.path} {wanted}"
            first = request not in seen and not head
            seen.append(request)
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            piece = data[int(begin) : int(end) + 1] if wanted else data
            self.send_response(503 if first else 206 if wanted else 200)
            self.send_header("Content-Length", str(0 if first else len(piece)))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if not first and not head:
                self.wfile.write(piece)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/shards", seen
    server.shutdown()


def test_a_flaky_server_gives_the_same_samples_as_the_disk(source: SampleSource, flaky_server: tuple[str, list[str]]) -> None:
    url, seen = flaky_server
    rows = np.random.default_rng(0).permutation(SAMPLES)
    need = Needs(image=ImageNeed(16))
    local = read_rows(source, rows, rows, need, seed=0)
    remote = read_rows(replace(source, root=url, retries=3), rows, rows, need, seed=0)
    np.testing.assert_array_equal(local.arrays["image"], remote.arrays["image"])
    assert local.faults == remote.faults
    assert len(seen) >= 2
    seen.clear()
    with pytest.raises(OSError, match="503"):
        read_rows(replace(source, root=url, retries=0), rows, rows, need, seed=0)


def test_memory_of_pictures_is_used_again_once_nobody_views_it(manifest: Manifest) -> None:
    """A read worker that decodes block after block touches no fresh pages, and nobody's pictures change."""
    source, needs = SampleSource.of(manifest, None, DataConfig()), Needs(image=ImageNeed(32))

    def read(rows: list[int]) -> np.ndarray:
        return read_rows(source, np.array(rows), np.array(rows), needs, 0).arrays["image"]

    first = read([0, 1, 2, 4])
    kept, address = first.copy(), first.ctypes.data
    table = pa.py_buffer(first[1:])  # as a block is handed on
    del first
    second = read([4, 5, 6, 8])
    assert second.ctypes.data != address
    assert bytes(table) == kept[1:].tobytes()
    del table
    assert read([0, 1, 2, 4]).ctypes.data == address
    one = read([0])
    assert one.ctypes.data != address, "a row that is kept must not keep the memory of a block"
    assert np.array_equal(one[0], kept[0])
