"""`reorder`: every embedding in the row that its key names, whatever the widths, gaps, order and size of the parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.config import ConfigError
from diptych.datasets import embeddings as joins
from diptych.datasets import reorder, reorder_index
from diptych.datasets.manifest import open_manifest
from diptych.datasets.npy import NpyFile, open_npy
from diptych.datasets.reorder_index import ShardRows, index_width, parse_places
from diptych.datasets.reorder_report import reorder_embeddings
from diptych.datasets.shards import ShardWriter
from diptych.pipelines.reorder import run

DIM = 6


def vector(key: str, modality: str = "img_emb", dtype: type = np.float16) -> np.ndarray:
    """The one embedding of a key, never zero."""
    return (np.array([*key.encode()[-DIM:]], np.float64) / 64 + (modality == "text_emb")).astype(dtype)


def write_partitions(folder: Path, parts: list[list[str]], modalities: tuple[str, ...] = ("img_emb",), dtype: type = np.float16) -> None:
    """clip-retrieval's layout, with these keys in this order."""
    (folder / "metadata").mkdir(parents=True)
    for number, keys in enumerate(parts):
        for modality in modalities:
            (folder / modality).mkdir(exist_ok=True)
            rows = np.stack([vector(key, modality, dtype) for key in keys]) if keys else np.empty((0, DIM), dtype)
            np.save(folder / modality / f"{modality}_{number}.npy", rows)
        table = pa.table({"image_path": pa.array(keys, pa.string()), "caption": pa.array(keys, pa.string())})
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")


def write_shards(folder: Path, samples: dict[int, list[int]], per_shard: int, total: int | None = None) -> list[str]:
    """Tars that hold the samples of these indices; the others of `total` per shard failed to download. Returns the keys."""
    writer = ShardWriter(str(folder), per_shard)
    for shard, present in samples.items():
        count = per_shard if total is None else total
        writer.write_shard(
            shard, [{"jpg": b"x", "txt": "a"} if index in present else {"status": "failed_to_download"} for index in range(count)]
        )
    manifest = open_manifest(str(folder))
    return manifest.rows(np.arange(manifest.samples), ["key"])["key"].to_pylist()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_widths_come_from_the_data_and_gaps_are_zero_rows(tmp_path: Path, width: int) -> None:
    per_shard = 10**width
    total = min(per_shard - 1, 1203)  # the last shard of a set is not full
    gaps = {0, 1, total // 2, total - 1}  # at the start, in the middle and at the end
    present = [index for index in range(total) if index not in gaps]
    keys = write_shards(tmp_path / "shards", {0: present, 1: present, 7: present}, per_shard, total)
    assert {len(key) for key in keys} == {5 + width}
    scrambled = [keys[position] for position in np.random.default_rng(width).permutation(len(keys))]
    write_partitions(tmp_path / "emb", [scrambled[: len(keys) // 2], scrambled[len(keys) // 2 :]], ("img_emb", "text_emb"))

    result = run(str(tmp_path / "emb"), str(tmp_path / "shards"), str(tmp_path / "out"))

    assert result["faults"] == []
    assert (result["samples_in"], result["samples_out"], result["gaps"]) == (len(keys), len(keys), 3 * len(gaps))
    assert result["index_width"] == width
    for modality in ("img_emb", "text_emb"):
        assert [path.name for path in sorted((tmp_path / "out" / modality).iterdir())] == [f"{modality}_{n:05d}.npy" for n in (0, 1, 7)]
        for shard in (0, 1, 7):
            rows = np.load(tmp_path / "out" / modality / f"{modality}_{shard:05d}.npy")
            assert rows.dtype == np.float16
            assert rows.shape == (total, DIM)
            for index in range(0, total, max(1, total // 50)):
                key = f"{shard * per_shard + index:0{5 + width}d}"
                expected = np.zeros(DIM) if index in gaps else vector(key, modality)
                np.testing.assert_array_equal(rows[index], expected)
    listed = pq.read_table(tmp_path / "out" / "gaps.parquet").to_pylist()
    assert {(row["shard"], row["index"], row["reason"]) for row in listed} == {
        (f"{shard:05d}", index, "no_sample") for shard in (0, 1, 7) for index in gaps
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_keys_land_in_their_own_row(tmp_path: Path, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 3))
    # Also beyond five digits, where img2dataset's names and keys grow.
    shards = data.draw(st.lists(st.integers(0, 120_000), min_size=1, max_size=4, unique=True))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    places = data.draw(st.sets(st.tuples(st.sampled_from(shards), st.integers(0, 10**width - 1)), min_size=1, max_size=40))
    keys = data.draw(st.permutations([f"{shard:05d}{index:0{width}d}" for shard, index in sorted(places)]))
    cut = data.draw(st.integers(0, len(keys)))
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    write_partitions(folder / "emb", [list(keys[:cut]), list(keys[cut:])], dtype=dtype)
    rows = [ShardRows(f"{shard:05d}", 10**width) for shard in sorted(shards)]
    present = {f"{shard:05d}": np.array(sorted(index for s, index in places if s == shard), np.int64) for shard in shards}
    report = reorder_embeddings(str(folder / "emb"), str(folder / "out"), rows, width, present.__getitem__)
    assert report.samples_out == len(keys)
    assert report.faults_total == 0
    found = {int(path.stem.rpartition("_")[2]): np.load(path) for path in (folder / "out" / "img_emb").iterdir()}
    assert set(found) == {shard for shard, _ in places}
    assert all(array.dtype == dtype and len(array) == 10**width for array in found.values())
    for shard, array in found.items():
        for index, row in enumerate(array):
            expected = vector(f"{shard:05d}{index:0{width}d}", dtype=dtype) if (shard, index) in places else np.zeros(DIM)
            np.testing.assert_array_equal(row, expected)


def test_small_windows_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"{shard:05d}{index:02d}" for shard in range(3) for index in range(0, 100, 3)]
    scrambled = [keys[position] for position in np.random.default_rng(0).permutation(len(keys))]
    write_partitions(tmp_path / "emb", [scrambled])
    rows, nothing = [ShardRows(f"{shard:05d}", 100) for shard in range(3)], np.arange(0, 100, 3)
    reorder_embeddings(str(tmp_path / "emb"), str(tmp_path / "whole"), rows, 2, lambda _: nothing)
    monkeypatch.setattr(reorder, "WINDOW_BYTES", 7 * DIM * 2)
    monkeypatch.setattr(reorder.ranged, "LOCAL_GAP", 2 * DIM * 2)
    reorder_embeddings(str(tmp_path / "emb"), str(tmp_path / "pieces"), rows, 2, lambda _: nothing)
    for path in (tmp_path / "whole" / "img_emb").iterdir():
        assert path.read_bytes() == (tmp_path / "pieces" / "img_emb" / path.name).read_bytes()


def test_rows_of_loader_workers_that_take_turns_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers, shards, per_shard, batch = 4, 16, 100, 10
    keys = [
        f"{first + worker:05d}{index:02d}"
        for first in range(0, shards, workers)
        for start in range(0, per_shard, batch)
        for worker in range(workers)
        for index in range(start, start + batch)
    ]
    write_partitions(tmp_path / "emb", [keys], ("img_emb", "text_emb"))
    read: list[int] = []
    usual = NpyFile.read_into
    monkeypatch.setattr(NpyFile, "read_into", lambda array, start, rows: (read.append(len(rows)), usual(array, start, rows))[1])
    rows, nothing = [ShardRows(f"{shard:05d}", per_shard) for shard in range(shards)], np.arange(per_shard)
    report = reorder_embeddings(str(tmp_path / "emb"), str(tmp_path / "out"), rows, 2, lambda _: nothing, jobs=1)
    assert report.samples_out == len(keys)
    assert sum(read) == 2 * len(keys)
    for shard in range(shards):
        for modality in ("img_emb", "text_emb"):
            expected = np.stack([vector(f"{shard:05d}{index:02d}", modality) for index in range(per_shard)])
            np.testing.assert_array_equal(np.load(tmp_path / "out" / modality / f"{modality}_{shard:05d}.npy"), expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["0000000", "0000001", "0000000"], "stand more than once, such as '0000000'"),
        (["0000000", "0000950"], "name a shard that has no tar, such as '0000950'"),
        (["0000000", "0000099"], "index beyond their shard's number of samples, such as '0000099'"),
        (["0000000", "photo/7.jpg"], "not a shard's digits followed by an index, such as 'photo/7.jpg'"),
        (["photo/7.jpg"], "joins them by key"),
        (["00000"], "name a shard that has no tar"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_written(tmp_path: Path, keys: list[str], message: str) -> None:
    write_partitions(tmp_path / "emb", [["0000001"] * 0 + keys])
    with pytest.raises(ValueError, match=message):
        reorder_embeddings(str(tmp_path / "emb"), str(tmp_path / "out"), [ShardRows("00000", 50)], 2, lambda _: np.arange(50))
    assert not list(tmp_path.glob("out/**/*.npy"))


def test_shards_without_index_digits_or_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pack more than one sample per shard"):
        index_width("00000", 5)
    with pytest.raises(ValueError, match="numbered tars"):
        index_width("train", 9)
    write_partitions(tmp_path / "emb", [["0000001"]])
    with pytest.raises(ValueError, match="numbered tars"):
        reorder_embeddings(str(tmp_path / "emb"), str(tmp_path / "out"), [ShardRows("part-0", 50)], 2, lambda _: np.arange(50))


def test_shards_beyond_five_digits_keep_the_width(tmp_path: Path) -> None:
    keys = write_shards(tmp_path / "shards", {0: [0, 3], 123_456: [1, 2]}, 10)
    assert keys == ["000000", "000003", "1234561", "1234562"]
    write_partitions(tmp_path / "emb", [keys[2:]])
    result = run(str(tmp_path / "emb"), str(tmp_path / "shards"), str(tmp_path / "out"))
    assert (result["index_width"], result["samples_out"]) == (1, 2)
    manifest = open_manifest(str(tmp_path / "shards"))
    join = joins.join(manifest, str(tmp_path / "out"), ("image",))
    vectors, bad = join.read(np.arange(4), "image")
    assert [index for index, _, _ in bad] == [0, 1]
    np.testing.assert_array_equal(vectors[2:], np.stack([vector(key).astype(np.float32) for key in keys[2:]]))


def test_samples_without_a_usable_embedding_are_faults(tmp_path: Path) -> None:
    keys = write_shards(tmp_path / "shards", {0: [0, 1, 2, 3, 5], 1: [0, 1], 2: [4]}, 10)
    embedded = [key for key in keys if key not in ("000001", "000010", "000011")]
    write_partitions(tmp_path / "emb", [embedded])
    path = tmp_path / "emb" / "img_emb" / "img_emb_0.npy"
    rows = np.load(path)
    rows[embedded.index("000002")] = 0
    rows[embedded.index("000003"), 2] = np.nan
    rows[embedded.index("000024"), 1] = -np.inf
    np.save(path, rows)
    result = run(str(tmp_path / "emb"), str(tmp_path / "shards"), str(tmp_path / "out"))
    assert {(fault["shard"], fault["key"], fault["kind"]) for fault in result["faults"]} == {
        ("00000.tar", "000001", "missing_embedding"),
        ("00000.tar", "000002", "bad_embedding"),
        ("00000.tar", "000003", "bad_embedding"),
        ("00001.tar", "", "missing_embeddings"),
        ("00002.tar", "000024", "bad_embedding"),
    }
    written = np.load(tmp_path / "out" / "img_emb" / "img_emb_00000.npy")
    assert np.flatnonzero(written.any(axis=1)).tolist() == [0, 5]
    assert not (tmp_path / "out" / "img_emb" / "img_emb_00001.npy").exists()
    assert result["samples_out"] == 2


def test_a_killed_call_goes_on_where_it_stopped(tmp_path: Path) -> None:
    keys = write_shards(tmp_path / "shards", {shard: [0, 1, 2] for shard in range(4)}, 10)
    write_partitions(tmp_path / "emb", [keys], ("img_emb", "text_emb"))
    call = (str(tmp_path / "emb"), str(tmp_path / "shards"), str(tmp_path / "out"))
    first = run(*call)
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.npy")}
    kept = tmp_path / "out" / "img_emb" / "img_emb_00000.npy"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "out" / "text_emb" / "text_emb_00002.npy").unlink()
    cut = tmp_path / "out" / "img_emb" / "img_emb_00003.npy"
    cut.write_bytes(cut.read_bytes()[:-5])  # as a power failure may leave it
    (tmp_path / "out" / "reorder.json").write_text(
        json.dumps(json.loads((tmp_path / "out" / "reorder.json").read_text()) | {"status": "running"})
    )
    second = run(*call)
    assert second["shards_reused"] == 2
    assert {name: second[name] for name in ("samples_in", "samples_out", "gaps", "faults")} == {
        name: first[name] for name in ("samples_in", "samples_out", "gaps", "faults")
    }
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.npy")} == files
    assert kept.stat().st_mtime_ns == stamp
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"img_emb", "text_emb", "gaps.parquet", "reorder.json"}


def test_a_record_that_a_power_failure_emptied_is_no_record(tmp_path: Path) -> None:
    keys = write_shards(tmp_path / "shards", {0: [0, 1, 2]}, 10)
    write_partitions(tmp_path / "emb", [keys])
    call = (str(tmp_path / "emb"), str(tmp_path / "shards"), str(tmp_path / "out"))
    run(*call)
    (tmp_path / "out" / "reorder.json").write_bytes(b"")
    with pytest.raises(ConfigError, match="--overwrite"):
        run(*call)
    assert run(*call, overwrite=True)["samples_out"] == 3


def test_many_keys_in_any_order_spill_to_several_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reorder_index, "BUCKET_ROWS", 25)
    monkeypatch.setattr(reorder_index, "KEYS_PER_BATCH", 7)
    monkeypatch.setattr(reorder_index, "SPILL_ROWS", 20)
    keys = [f"{shard:05d}{index:02d}" for shard in (0, 1, 2, 4, 9) for index in range(0, 20, 3)]
    scrambled = [keys[position] for position in np.random.default_rng(1).permutation(len(keys))]
    write_partitions(tmp_path / "emb", [scrambled[:30], scrambled[30:]])
    rows = [ShardRows(f"{shard:05d}", 20) for shard in (0, 1, 2, 4, 9)]
    call = (str(tmp_path / "emb"), str(tmp_path / "out"), rows, 2, lambda _: np.arange(0, 20, 3))
    report = reorder_embeddings(*call)
    assert (report.samples_out, report.gaps, report.faults_total) == (35, 65, 0)
    for shard in rows:
        found = np.load(tmp_path / "out" / "img_emb" / f"img_emb_{shard.name}.npy")
        np.testing.assert_array_equal(found[::3], np.stack([vector(f"{shard.name}{index:02d}") for index in range(0, 20, 3)]))
    write_partitions(tmp_path / "twice", [scrambled[:30], [*scrambled[30:], "0000403"]])
    with pytest.raises(ValueError, match="1 keys stand more than once, such as '0000403'"):
        reorder_embeddings(str(tmp_path / "twice"), *call[1:], overwrite=True)


def test_another_result_is_not_mixed_in(tmp_path: Path) -> None:
    keys = write_shards(tmp_path / "shards", {0: [0, 1, 2], 1: [0]}, 10)
    write_partitions(tmp_path / "emb", [keys])
    write_partitions(tmp_path / "other", [keys[:2]])
    run(str(tmp_path / "emb"), str(tmp_path / "shards"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="--overwrite"):
        run(str(tmp_path / "other"), str(tmp_path / "shards"), str(tmp_path / "out"))
    result = run(str(tmp_path / "other"), str(tmp_path / "shards"), str(tmp_path / "out"), overwrite=True)
    assert result["samples_out"] == 2
    assert [path.name for path in (tmp_path / "out" / "img_emb").iterdir()] == ["img_emb_00000.npy"]


def test_the_join_reads_the_way_back(tmp_path: Path) -> None:
    keys = write_shards(tmp_path / "shards", {0: [0, 2, 9], 3: [1, 4]}, 10)
    write_partitions(tmp_path / "emb", [keys[::-1]], ("img_emb", "text_emb"), np.float32)
    run(str(tmp_path / "emb"), str(tmp_path / "shards"), str(tmp_path / "out"))
    manifest = open_manifest(str(tmp_path / "shards"))
    rows = np.arange(manifest.samples)
    for folder in ("emb", "out"):
        join = joins.join(manifest, str(tmp_path / folder))
        assert join.matched == len(keys)
        assert join.counts == {}
        for which, modality in (("image", "img_emb"), ("text", "text_emb")):
            vectors, bad = join.read(rows, which)
            assert bad == []
            np.testing.assert_array_equal(vectors, np.stack([vector(key, modality, np.float32) for key in keys]))


def test_partitions_that_disagree_are_refused(tmp_path: Path) -> None:
    write_partitions(tmp_path / "emb", [["000000", "000001"], ["000002"]])
    np.save(tmp_path / "emb" / "img_emb" / "img_emb_1.npy", np.ones((2, DIM), np.float16))
    with pytest.raises(ValueError, match="rows disagree"):
        reorder_embeddings(str(tmp_path / "emb"), str(tmp_path / "out"), [ShardRows("00000", 10)], 1, lambda _: np.arange(3))
    (tmp_path / "emb" / "img_emb" / "img_emb_1.npy").unlink()
    with pytest.raises(ValueError, match=r"partitions \[1\] stand only in one"):
        reorder_embeddings(str(tmp_path / "emb"), str(tmp_path / "out"), [ShardRows("00000", 10)], 1, lambda _: np.arange(3))


def test_arrays_that_cannot_be_read_safely_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([[{"a": 1}]], object), allow_pickle=True)
    with pytest.raises(ValueError, match="never loaded"):
        open_npy(str(tmp_path / "objects.npy"))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.ones((3, 4))))
    with pytest.raises(ValueError, match="Fortran"):
        open_npy(str(tmp_path / "fortran.npy"))
    np.save(tmp_path / "cut.npy", np.ones((3, 4)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match="was cut"):
        open_npy(str(tmp_path / "cut.npy"))
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(ValueError, match=r"not a \.npy file"):
        open_npy(str(tmp_path / "text.npy"))


@given(st.lists(st.one_of(st.none(), st.text(max_size=20), st.from_regex(r"[0-9]{1,20}", fullmatch=True)), max_size=30))
def test_places_are_the_integer_value_of_digits(keys: list[str | None]) -> None:
    places, digits = parse_places(pa.array(["0", *keys], pa.string()).slice(1))
    for key, place, length in zip(keys, places.tolist(), digits.tolist(), strict=True):
        if key is not None and key.isascii() and key.isdigit() and len(key) <= 18:
            assert (place, length) == (int(key), len(key))
        else:
            assert (place, length) == (-1, 0)


def test_an_object_store_gives_the_same_files(tmp_path: Path) -> None:
    import fsspec

    keys = write_shards(tmp_path / "shards", {0: [0, 2, 9], 3: [1, 4]}, 10)
    write_partitions(tmp_path / "emb", [keys[::-1]], ("img_emb", "text_emb"))
    run(str(tmp_path / "emb"), str(tmp_path / "shards"), str(tmp_path / "out"))
    store = fsspec.filesystem("memory")
    for path in (tmp_path / "emb").rglob("*.*"):
        store.pipe_file(f"/reorder/emb/{path.relative_to(tmp_path / 'emb')}", path.read_bytes())
    for expected in (0, 2):
        result = run("memory://reorder/emb", str(tmp_path / "shards"), "memory://reorder/out")
        assert (result["samples_out"], result["shards_reused"]) == (5, expected)
    local = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in (tmp_path / "out").rglob("*.npy")}
    remote = {name.removeprefix("/reorder/out/"): store.cat_file(name) for name in store.find("/reorder/out") if name.endswith(".npy")}
    assert remote == local
    store.rm("/reorder", recursive=True)
