"""Embeddings reach their own sample whatever the order of the files, and what does not fit is named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.config import ConfigError
from diptych.datasets.embeddings import EmbeddingJoin, join
from diptych.datasets.manifest import Manifest, build_manifest
from diptych.datasets.shards import ShardWriter

POMOLOGICAL = Path("../shared/data/pomological").resolve()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three shards of up to ten samples, one of them with a gap."""
    folder = tmp_path_factory.mktemp("shards")
    samples = [{"txt": f"caption {number}"} for number in range(25)]
    samples[4] = {"status": "failed_to_download"}
    ShardWriter(str(folder), samples_per_shard=10).write_all(samples)
    return build_manifest(str(folder))


def keys_of(manifest: Manifest) -> list[str]:
    return manifest.column("key").to_pylist()


def vector_of(key: str, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(int(key) + 1).normal(size=dim).astype(np.float16)


def write_partitions(folder: Path, parts: list[list[str]], which: tuple[str, ...] = ("image", "text"), dim: int = 4) -> Path:
    """clip-retrieval's layout with the keys of each partition in the order given."""
    for name in ("metadata", *(f"{'img' if each == 'image' else each}_emb" for each in which)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, keys in enumerate(parts):
        pq.write_table(pa.table({"image_path": pa.array(keys, pa.string())}), folder / f"metadata/metadata_{number}.parquet")
        vectors = np.stack([vector_of(key, dim) for key in keys]) if keys else np.zeros((0, dim), np.float16)
        for each in which:
            prefix = "img_emb" if each == "image" else "text_emb"
            np.save(folder / prefix / f"{prefix}_{number}.npy", vectors if each == "image" else -vectors)
    return folder


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_any_order_over_any_partitions_joins_every_sample_with_its_own(manifest: Manifest, tmp_path_factory, data: st.DataObject) -> None:
    keys = data.draw(st.permutations(keys_of(manifest)))
    cut = data.draw(st.integers(0, len(keys)))
    joined = join(manifest, str(write_partitions(tmp_path_factory.mktemp("emb"), [list(keys[:cut]), list(keys[cut:])])))
    assert (joined.matched, joined.counts) == (manifest.samples, {})
    rows = np.array(data.draw(st.lists(st.integers(0, manifest.samples - 1), min_size=1, max_size=30)))
    expected = np.stack([vector_of(keys_of(manifest)[row]) for row in rows]).astype(np.float32)
    for which, sign in (("image", 1), ("text", -1)):
        vectors, bad = joined.read(rows, which)
        np.testing.assert_array_equal(vectors, sign * expected)
        assert bad == []


def test_missing_extra_and_double_embeddings_are_named_and_counted(manifest: Manifest, tmp_path: Path) -> None:
    keys = keys_of(manifest)
    joined = join(manifest, str(write_partitions(tmp_path, [[*keys[2:], keys[5]], ["999999", keys[6]]])))
    assert joined.matched == manifest.samples - 2
    assert joined.counts == {"missing_embedding": 2, "extra_embedding": 1, "duplicate_embedding": 2}
    named = {(fault.kind, fault.key) for fault in joined.faults}
    assert named == {("missing_embedding", keys[0]), ("missing_embedding", keys[1]), ("extra_embedding", "999999"),
                     ("duplicate_embedding", keys[5]), ("duplicate_embedding", keys[6])}  # fmt: skip
    assert next(fault.shard for fault in joined.faults if fault.key == keys[0]) == "00000.tar"
    _, bad = joined.read(np.array([0, 3]), "text")
    assert [(index, kind) for index, kind, _ in bad] == [(0, "missing_embedding")]


def test_bad_vectors_are_found_when_they_are_read(manifest: Manifest, tmp_path: Path) -> None:
    write_partitions(tmp_path, [keys_of(manifest)])
    vectors = np.load(tmp_path / "img_emb/img_emb_0.npy")
    vectors[3], vectors[7, 1], vectors[9, 0] = 0, np.nan, np.inf
    np.save(tmp_path / "img_emb/img_emb_0.npy", vectors)
    _, bad = join(manifest, str(tmp_path)).read(np.arange(manifest.samples), "image")
    assert [(index, kind) for index, kind, _ in bad] == [(3, "zero_embedding"), (7, "nan_embedding"), (9, "nan_embedding")]


def test_a_saved_join_reads_the_same_from_mapped_arrays(manifest: Manifest, tmp_path: Path) -> None:
    joined = join(manifest, str(write_partitions(tmp_path / "emb", [keys_of(manifest)[::-1]])))
    joined.save(tmp_path / "join")
    loaded = EmbeddingJoin.load(tmp_path / "join")
    assert isinstance(loaded.lookups["image"].row, np.memmap)
    rows = np.arange(manifest.samples)
    np.testing.assert_array_equal(loaded.read(rows, "image")[0], joined.read(rows, "image")[0])


def test_the_reordered_layout_joins_by_the_digits_of_the_key(manifest: Manifest, tmp_path: Path) -> None:
    for shard in range(3):
        vectors = np.zeros((10, 4), np.float16)
        for key in keys_of(manifest):
            if int(key) // 10 == shard:
                vectors[int(key) % 10] = vector_of(key)
        np.save(tmp_path / f"img_emb_{shard:04d}.npy", vectors)
    joined = join(manifest, str(tmp_path), ("image",))
    assert joined.matched == manifest.samples
    vectors, bad = joined.read(np.arange(manifest.samples), "image")
    np.testing.assert_array_equal(vectors, np.stack([vector_of(key) for key in keys_of(manifest)]).astype(np.float32))
    assert bad == []


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda folder: np.save(folder / "img_emb/img_emb_1.npy", np.ones((3, 5), np.float16)), "one dimension in all image files"),
        (lambda folder: (folder / "text_emb/text_emb_1.npy").unlink(), "partition 1 without its counterpart"),
        (lambda folder: np.save(folder / "img_emb/img_emb_1.npy", np.ones((2, 4), np.float16)), "3 rows, one per row of"),
        (lambda folder: (folder / "metadata/metadata_1.parquet").write_bytes(b"PAR1 cut"), "a whole Parquet file"),
        (lambda folder: np.save(folder / "img_emb/img_emb_1.npy", np.array([{}, 1, 2]), allow_pickle=True), "never loaded"),
    ],
    ids=["dimension", "missing file", "row count", "cut metadata", "pickle"],
)
def test_files_that_do_not_fit_are_refused_by_name(manifest: Manifest, tmp_path: Path, break_it, complaint: str) -> None:
    keys = keys_of(manifest)
    write_partitions(tmp_path, [keys[3:], keys[:3]])
    break_it(tmp_path)
    with pytest.raises(ConfigError, match=complaint):
        join(manifest, str(tmp_path))


def test_embeddings_of_other_data_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of their keys"):
        join(manifest, str(write_partitions(tmp_path, [["990001", "990002"]])))


@pytest.mark.skipif(not POMOLOGICAL.is_dir(), reason="the real data of ../shared is not here")
def test_clip_retrievals_scrambled_partitions_join_completely(tmp_path: Path) -> None:
    real = build_manifest(str(POMOLOGICAL / "shards"), str(tmp_path))
    joined = join(real, str(POMOLOGICAL / "embeddings"))
    assert (joined.matched, joined.counts, joined.dim("image"), joined.dim("text")) == (7501, {}, 64, 64)


def test_embeddings_inside_the_tars_are_read_like_any_other(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float16)

    def member(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()

    rows = [{"txt": f"{number}", "npy": member(vectors[number])} for number in range(9)]
    rows[2]["npy"] = member(np.array([{"a": 1}], dtype=object))
    rows[4]["npy"] = member(vectors[4].view(np.int16))  # as long as the others, and no floats
    rows[6]["npy"] = member(np.full(6, np.nan, np.float16))
    del rows[7]["npy"]
    ShardWriter(str(tmp_path / "shards"), 4).write_all(rows)
    manifest = build_manifest(str(tmp_path / "shards"))
    joined = join(manifest, "members", ("image",))
    assert (joined.dim("image"), joined.matched) == (6, 7)
    assert joined.counts == {"unreadable_embedding": 1, "missing_embedding": 2}
    joined.save(tmp_path / "join")
    found, bad = EmbeddingJoin.load(tmp_path / "join").read(np.arange(9), "image")
    good = [0, 1, 3, 5, 8]
    np.testing.assert_array_equal(found[good], vectors[good].astype(np.float32))
    kinds = {2: "missing_embedding", 4: "nan_embedding", 6: "nan_embedding", 7: "missing_embedding"}
    assert {index: kind for index, kind, _ in bad} == kinds
    assert join(manifest, "members:image=npy", ("image",)).matched == 7
    with pytest.raises(ConfigError, match="members with the text embeddings"):
        join(manifest, "members", ("text",))
    with pytest.raises(ConfigError, match="float vectors"):
        join(manifest, "members:text=txt", ("text",))
    with pytest.raises(ConfigError, match="image=EXT"):
        join(manifest, "members:npy", ("image",))
