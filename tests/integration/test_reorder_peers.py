"""DALLE2-pytorch's own loader and embedding-reader read what `reorder` writes of real img2dataset and clip-retrieval output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from diptych.pipelines import reorder


@pytest.fixture(scope="module")
def reordered(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("reordered")
    source, manifest = shared_data / "pomological", tmp_path_factory.mktemp("manifest")
    return out, reorder.run(str(source / "embeddings"), str(source / "shards"), str(out), manifest=str(manifest))


@pytest.fixture(scope="module")
def by_key(shared_data: Path) -> dict[str, dict[str, np.ndarray]]:
    """Key → embedding as clip-retrieval wrote it."""
    found: dict[str, dict[str, np.ndarray]] = {"img_emb": {}, "text_emb": {}}
    for metadata in sorted((shared_data / "pomological" / "embeddings" / "metadata").iterdir()):
        number = metadata.stem.rpartition("_")[2]
        keys = pq.read_table(metadata, columns=["image_path"])["image_path"].to_pylist()
        for modality, vectors in found.items():
            rows = np.load(metadata.parent.parent / modality / f"{modality}_{number}.npy")
            vectors.update(zip(keys, rows, strict=True))
    return found


def test_every_embedding_is_delivered(reordered: tuple[Path, dict[str, Any]]) -> None:
    _, result = reordered
    assert (result["samples_in"], result["samples_out"], result["gaps"]) == (7501, 7501, 79)
    assert result["faults"] == []
    assert result["modalities"] == {"img_emb": "float16 [64]", "text_emb": "float16 [64]"}


def test_dalle2_pytorch_reads_every_sample_with_its_own_embeddings(
    reordered: tuple[Path, dict[str, Any]], by_key: dict[str, dict[str, np.ndarray]], shared_data: Path
) -> None:
    loader = pytest.importorskip("dalle2_pytorch.dataloaders.decoder_loader", exc_type=ImportError)
    out, result = reordered
    dataset = loader.ImageEmbeddingDataset(
        str(shared_data / "pomological" / "shards" / "{00000..00007}.tar"),
        img_embedding_folder_url=str(out / "img_emb"),
        text_embedding_folder_url=str(out / "text_emb"),
        index_width=result["index_width"],
        extra_keys=["__key__"],
        shuffle_shards=False,
    )
    seen = 0
    for _, embedding, key in dataset:
        np.testing.assert_array_equal(embedding["img"].numpy(), by_key["img_emb"][key])
        np.testing.assert_array_equal(embedding["text"].numpy(), by_key["text_emb"][key])
        seen += 1
    assert seen == 7501


def test_embedding_reader_reads_every_row(reordered: tuple[Path, dict[str, Any]], by_key: dict[str, dict[str, np.ndarray]]) -> None:
    package = pytest.importorskip("embedding_reader")
    out, result = reordered
    counts = [len(np.load(path, mmap_mode="r")) for path in sorted((out / "img_emb").iterdir())]
    keys = [f"{shard:05d}{index:03d}" for shard, count in enumerate(counts) for index in range(count)]
    for modality, vectors in by_key.items():
        reader = package.EmbeddingReader(str(out / modality), file_format="npy")
        assert reader.count == result["rows"] == len(keys)
        seen = 0
        for rows, places in reader(batch_size=1000, show_progress=False):
            for row, place in zip(rows, places["i"], strict=True):
                expected = vectors.get(keys[place])
                seen += expected is not None
                np.testing.assert_array_equal(row, np.zeros(64) if expected is None else expected.astype(np.float32))
        assert seen == 7501
