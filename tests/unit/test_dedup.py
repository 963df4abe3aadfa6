"""`dedup`: every near pair and no other, one sample of a group stays by the stated rule, and verbs write what training reads."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.config import ConfigError
from diptych.datasets import dedup
from diptych.datasets.dedup import Pairs, Vectors, build_cells, estimate_recall, near_pairs, plan, representatives
from diptych.datasets.keep import read_keep
from diptych.datasets.manifest import open_manifest
from diptych.datasets.shards import ShardWriter
from diptych.pipelines import dedup as verb

pytest.importorskip("faiss")


def planted(rows: int, copies: int, dim: int = 64, low: float = 0.9, seed: int = 0) -> np.ndarray:
    """Random vectors; the last `copies` are near-duplicates of some others, with cosines from `low` to 1."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((rows, dim)).astype(np.float32)
    sources = random.choice(rows - copies, copies, replace=False)
    base = vectors[sources] / np.linalg.norm(vectors[sources], axis=1, keepdims=True)
    noise = random.standard_normal((copies, dim))
    noise -= (noise * base).sum(1, keepdims=True) * base
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    cosine = random.uniform(low, 1, (copies, 1))
    vectors[rows - copies :] = 3 * (cosine * base + np.sqrt(1 - cosine**2) * noise)
    return vectors


def all_near(vectors: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    """Every near pair, by brute force in float64."""
    with np.errstate(invalid="ignore", divide="ignore"):
        units = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    left, right = np.nonzero(np.triu(np.nan_to_num(units @ units.T), 1) >= threshold)
    return set(zip(left.tolist(), right.tolist(), strict=True))


def as_set(pairs: Pairs) -> set[tuple[int, int]]:
    found = set(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))
    assert len(found) == len(pairs.a)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(1, 12), st.floats(0.3, 1.0), st.integers(0, 10_000))
def test_comparing_all_finds_exactly_the_near_pairs(rows: int, dim: int, threshold: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((rows, dim)).astype(np.float32)
    vectors[random.integers(rows)] = vectors[random.integers(rows)]
    vectors[random.integers(rows)] = 0
    vectors[random.integers(rows), 0] = np.nan
    usable = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    pairs = near_pairs(Vectors.of(vectors), threshold, None)
    possible, certain = (
        {pair for pair in all_near(np.nan_to_num(vectors), threshold + slack) if usable[list(pair)].all()} for slack in (-1e-6, 1e-6)
    )
    assert certain <= as_set(pairs) <= possible
    assert set(pairs.a.tolist()) | set(pairs.b.tolist()) <= set(np.flatnonzero(usable).tolist())


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = Vectors.of(planted(500, 100))
    whole = near_pairs(vectors, 0.9, None)
    monkeypatch.setattr(dedup, "_BLOCK", 7)
    monkeypatch.setattr(dedup, "MOST_PAIRS", 30 + 2 * len(whole.a))
    pieces = near_pairs(vectors, 0.9, None)
    for name in ("a", "b", "similarity"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-6)


def test_cells_find_nearly_all_and_nothing_false() -> None:
    array = planted(20_000, 1000, low=0.91)
    vectors = Vectors.of(array)
    found = near_pairs(vectors, 0.9, build_cells(vectors, plan(len(array), 6), 6))
    exact = near_pairs(vectors, 0.9, None)
    assert as_set(found) <= as_set(exact)
    assert len(found.a) >= 0.99 * len(exact.a)
    assert len(exact.a) >= 1000
    measured = estimate_recall(vectors, found, 0.9, samples=2000)
    assert measured["pairs"] >= 50
    assert abs(measured["recall"] - len(found.a) / len(exact.a)) < 0.02
    worse = Pairs(found.a[::2], found.b[::2], found.similarity[::2])
    assert abs(estimate_recall(vectors, worse, 0.9, samples=2000)["recall"] - 0.5) < 0.1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.sets(st.tuples(st.integers(0, 29), st.integers(0, 29))), st.randoms(use_true_random=False))
def test_what_is_dropped_has_a_near_duplicate_that_stays(rows: int, edges: set[tuple[int, int]], random: Any) -> None:
    edges = {(a, b) for a, b in edges if a < b < rows}
    ordered = np.array(sorted(edges), np.int64).reshape(-1, 2)
    pairs = Pairs(ordered[:, 0], ordered[:, 1], np.full(len(ordered), 0.95, np.float32))
    preference = np.array(random.sample(range(rows), rows), np.int64)
    kept_for = representatives(pairs, preference)
    kept = {row for row in range(rows) if kept_for[row] == row}
    for row, leader in enumerate(kept_for.tolist()):
        assert leader in kept
        assert row == leader or (min(row, leader), max(row, leader)) in edges
    assert not any(a in kept and b in kept for a, b in edges)
    # Greedy by preference: the first row always stays, and every kept row comes before those dropped for it.
    rank = {int(row): place for place, row in enumerate(preference)}
    assert all(rank[int(leader)] <= rank[row] for row, leader in enumerate(kept_for))


def picture(side: int, colour: int) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (side, side), (colour, 255 - colour, colour)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    """Eight samples: 0, 3 and 5 alike in both (5 is the largest picture), 1 and 2 alike in the image only, 7 has no embedding."""
    sides = [16, 16, 16, 24, 16, 32, 16, 16]
    samples = [{"jpg": picture(side, 20 * index), "txt": f"<b>caption</b> {index}"} for index, side in enumerate(sides)]
    ShardWriter(str(tmp_path / "shards"), 5).write_all(samples)
    manifest = open_manifest(str(tmp_path / "shards"))
    keys = manifest.column("key").to_pylist()
    image, text = np.eye(8, dtype=np.float16), np.eye(8, dtype=np.float16)
    image[3] = image[0] + 0.05
    image[5] = image[0] - 0.03
    image[2] = image[1]
    text[3] = text[5] = text[0]
    folder = tmp_path / "emb"
    order = [6, 5, 4, 3, 2, 1, 0]
    for name, rows in (("img_emb", image), ("text_emb", text)):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / f"{name}_0.npy", rows[order])
    (folder / "metadata").mkdir()
    pq.write_table(pa.table({"image_path": [keys[row] for row in order]}), folder / "metadata" / "metadata_0.parquet")
    return str(tmp_path / "shards"), str(folder)


@pytest.mark.parametrize(("on", "dropped"), [("image", [0, 2, 3]), ("text", [0, 3]), ("both", [0, 3])])
def test_the_largest_picture_of_a_group_stays(data: tuple[str, str], tmp_path: Path, on: str, dropped: list[int]) -> None:
    shards, embeddings = data
    out = tmp_path / "out"
    result = verb.run(shards, str(out), embeddings, {"on": on, "threshold": 0.95})
    manifest = open_manifest(shards)
    kept = read_keep(str(out / "keep.parquet"), manifest)
    assert kept.tolist() == [row for row in range(8) if row not in dropped]
    assert (result["samples_in"], result["samples_out"], result["dropped"]) == (8, 8 - len(dropped), len(dropped))
    assert [(fault["key"], fault["kind"]) for fault in result["faults"]] == [("000012", "missing_embedding")]
    groups = pq.read_table(out / "groups.parquet").to_pylist()
    assert {row["row"] for row in groups if not row["kept"]} == set(dropped)
    leader = next(row for row in groups if row["row"] == 5)
    assert leader["kept"]
    assert [row["row"] for row in groups if row["group"] == leader["group"]] == [5, 0, 3]
    assert all(0.95 <= row["similarity"] <= 1.0001 for row in groups)
    page = (out / "pairs.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * result["pairs"]
    assert "<b>caption</b> 0" not in page
    assert "&lt;b&gt;caption&lt;/b&gt; 0" in page
    assert {path.name for path in out.iterdir()} == {"keep.parquet", "groups.parquet", "pairs.html", "dedup.json"}


def test_semdedup_stays_inside_its_clusters(data: tuple[str, str], tmp_path: Path) -> None:
    shards, embeddings = data
    result = verb.run(shards, str(tmp_path / "out"), embeddings, {"threshold": 0.95, "clusters": 3})
    assert result["method"] == "semdedup"
    assert result["cells"] == 3
    assert 0 < result["dropped"] <= 3


@pytest.mark.parametrize("wrong", [{"on": "sound"}, {"threshold": 1.5}, {"threshold": 0.0}, {"probes": 0}, {"clusters": -1}])
def test_settings_that_mean_nothing_are_refused(data: tuple[str, str], tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        verb.run(data[0], str(tmp_path / "out"), data[1], wrong)


def test_more_pairs_than_memory_should_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "MOST_PAIRS", 1000)
    with pytest.raises(ConfigError, match="Raise it"):
        near_pairs(Vectors.of(np.ones((2000, 4), np.float32)), 0.9, None)
