"""`filter` and `keep`: a condition keeps exactly the samples for which it is true, and can do nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.config import ConfigError
from diptych.datasets.filter import filter_rows
from diptych.datasets.keep import read_keep
from diptych.datasets.manifest import Manifest, open_manifest
from diptych.datasets.shards import ShardWriter
from diptych.pipelines import filter as filter_verb
from diptych.pipelines import keep as keep_verb

CAPTIONS = ["a red apple", "pear", None, "  two  green   pears ", "naïve café ☕", "NULL"]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six samples in two shards: sizes 10·(i+1) × 20, a score in the JSON, one JSON that is none."""
    samples = []
    for index, caption in enumerate(CAPTIONS):
        fields = {
            "score": index / 2,
            "lang": "en" if index % 2 else None,
            "LANG": "other",
            "KEY": 1,
            "odd name'\"": index,
            "nested": {"a": index},
        }
        sample = {"jpg": jpeg(10 * (index + 1), 20), "json": fields}
        samples.append(sample | ({"txt": caption} if caption is not None else {}))
    samples[4]["json"] = b"{not json"
    ShardWriter(str(tmp_path / "shards"), 3).write_all(samples)
    return tmp_path / "shards"


@pytest.fixture
def manifest(shards: Path) -> Manifest:
    return open_manifest(str(shards))


def jpeg(width: int, height: int) -> bytes:
    from io import BytesIO

    from PIL import Image

    stream = BytesIO()
    Image.new("RGB", (width, height)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("width >= 30", [2, 3, 4, 5]),
        ("aspect < 1", [0]),
        ("caption IS NULL", [2]),
        ("caption_length > 10", [0, 3, 4]),
        ("word_count = 3", [0, 3, 4]),
        ("word_count = 0", [2]),
        ("caption = 'NULL'", [5]),
        ("caption LIKE '%pear%' OR score >= 2.5", [1, 3, 5]),
        ("lang = 'en'", [1, 3, 5]),
        ("lang IS NULL", [0, 2, 4]),
        ('"odd name\'""" = 3', [3]),
        ("(meta->>'$.nested.a')::INT = 1", [1]),
        ("shard = '00001.tar' AND key > '000010'", [4, 5]),
        ("list_contains(members, 'txt')", [0, 1, 3, 4, 5]),
        ("row % 2 = 0 -- a comment", [0, 2, 4]),
        ("bytes < 0", []),
    ],
)
def test_a_condition_keeps_the_samples_for_which_it_is_true(manifest: Manifest, where: str, expected: list[int]) -> None:
    assert filter_rows(manifest, where).tolist() == expected


def test_similarity_is_a_column_where_it_is_given(manifest: Manifest) -> None:
    similarity = np.array([0.1, 0.5, np.nan, 0.9, -1, 0], np.float32)
    assert filter_rows(manifest, "similarity > 0.3", similarity).tolist() == [1, 3]
    assert filter_rows(manifest, "similarity IS NULL", similarity).tolist() == [2]
    with pytest.raises(ConfigError, match="similarity"):
        filter_rows(manifest, "similarity > 0.3")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("widht > 3", "Did you mean width"),
        ('caption = "red"', "single quotes"),
        ("width >", "Parser Error"),
        ("", "--where"),
        ("1=1); DELETE FROM shard_names; --", "Parser Error"),
        ("key IN (SELECT content FROM read_text('/etc/hostname'))", "Permission Error"),
        ("key IN (SELECT url FROM read_csv('http://127.0.0.1:9/x.csv'))", "Error"),
        ("1 = 1; SET enable_external_access = true", "Error"),
        ("count(*) > 1", "Error"),
    ],
)
def test_wrong_conditions_are_refused_with_the_columns_named(manifest: Manifest, where: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        filter_rows(manifest, where)
    assert "caption_length" in str(caught.value)
    assert "score" in str(caught.value)


def test_verbs_write_keep_lists_that_combine(shards: Path, manifest: Manifest, tmp_path: Path) -> None:
    wide, worded, out = (str(tmp_path / f"{name}.parquet") for name in ("wide", "worded", "out"))
    result = filter_verb.run(str(shards), wide, "width >= 30")
    assert (result["samples_in"], result["samples_out"], result["faults"]) == (6, 4, [])
    filter_verb.run(str(shards), worded, "word_count = 3")
    for how, expected in (("and", [3, 4]), ("or", [0, 2, 3, 4, 5]), ("minus", [2, 5])):
        result = keep_verb.run(how, [wide, worded], out, shards=str(shards))
        assert read_keep(out, manifest).tolist() == expected
        assert (result["samples_in"], result["samples_out"]) == (4, len(expected))
    with pytest.raises(ConfigError, match="and, or, minus"):
        keep_verb.run("xor", [wide, worded], out, shards=str(shards))


def test_filter_by_similarity_reads_embeddings_by_key(shards: Path, manifest: Manifest, tmp_path: Path) -> None:
    keys = manifest.rows(np.arange(6), ["key"])["key"].to_pylist()
    folder = tmp_path / "emb"
    image, text = np.eye(6, dtype=np.float16)[::-1].copy(), np.eye(6, dtype=np.float16)[::-1].copy()
    text[0] = np.roll(text[0], 1)  # the last sample's caption points elsewhere
    image[1] = 0
    for name, rows in (("img_emb", image), ("text_emb", text)):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / f"{name}_0.npy", rows[:5])  # the first sample has none
    (folder / "metadata").mkdir()
    pq.write_table(pa.table({"image_path": keys[::-1][:5]}), folder / "metadata" / "metadata_0.parquet")
    result = filter_verb.run(str(shards), str(tmp_path / "keep.parquet"), "similarity > 0.99", embeddings=str(folder))
    assert read_keep(str(tmp_path / "keep.parquet"), manifest).tolist() == [1, 2, 3]
    assert [(fault["key"], fault["kind"]) for fault in result["faults"]] == [(keys[0], "missing_embedding")]


def test_an_empty_data_set_keeps_nothing(tmp_path: Path) -> None:
    ShardWriter(str(tmp_path / "shards"), 10).write_shard(0, [{"status": "failed_to_download"}])
    assert filter_rows(open_manifest(str(tmp_path / "shards")), "width > 1").tolist() == []
