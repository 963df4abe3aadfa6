"""The samples of a run depend on seed and slot alone: not on workers, blocks, restarts, or which samples are bad."""

from __future__ import annotations

import io
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.batches import ImageNeed, Needs, StepBatch, check_batch
from diptych.config import DataConfig, RunConfig, TrainConfig, ValidationConfig, load_recipe
from diptych.datasets import stream
from diptych.datasets.keep import Selection
from diptych.datasets.manifest import build_manifest
from diptych.datasets.reader import SampleSource
from diptych.datasets.shards import ShardWriter
from diptych.datasets.stream import LocalStream, Plan, StreamSpec

SAMPLES = 50
BAD = {4, 19, 20, 33}


def sample(number: int) -> dict:
    colour = np.full((20, 20, 3), (number * 5, 255 - number * 5, number), np.uint8)
    file = io.BytesIO()
    Image.fromarray(colour).save(file, "PNG")
    data = file.getvalue()
    return {"png": data[:-20] if number in BAD else data, "txt": f"number {number}"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    folder = str(tmp_path_factory.mktemp("shards"))
    ShardWriter(folder, samples_per_shard=12).write_all([sample(number) for number in range(SAMPLES)])
    return SampleSource.of(build_manifest(folder), None, DataConfig())


@pytest.fixture(scope="module")
def spec(source: SampleSource) -> StreamSpec:
    return StreamSpec(
        source,
        Selection(None, SAMPLES, "digest"),
        Needs(image=ImageNeed(8)),
        seed=5,
        global_batch_size=7,
        shuffle_chunk=4,
        shuffle_group=16,
    )


def numbers(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The sample in each row, read off its colour."""
    return arrays["image"][:, 0, 0, 2].astype(int)


def gather(spec: StreamSpec, world_size: int, start: int, stop: int | None) -> tuple[dict[int, tuple[int, int]], list]:
    """(slot → (row, sample seen), faults) of all workers, with every promise about shares checked on the way."""
    seen: dict[int, tuple[int, int]] = {}
    faults = []
    sizes = set()
    for rank in range(world_size):
        expected = start
        for share in LocalStream(spec, rank, world_size, start, stop):
            assert share.step == expected
            expected += 1
            check_batch(share.arrays, spec.needs)
            sizes.add(len(share.arrays["slot"]))
            padding = share.arrays["slot"] < 0
            assert np.array_equal(padding, share.arrays["weight"] == 0)
            assert np.array_equal(padding, share.arrays["row"] < 0)
            for slot, row, number in zip(share.arrays["slot"], share.arrays["row"], numbers(share.arrays), strict=True):
                if slot >= 0:
                    assert slot not in seen
                    assert share.step * spec.global_batch_size <= slot < (share.step + 1) * spec.global_batch_size
                    seen[int(slot)] = (int(row), int(number))
            faults += share.faults
        assert expected == (stop if stop is not None else spec.steps)
    assert len(sizes) == 1
    assert next(iter(sizes)) % spec.micro_batches == 0
    return seen, sorted(faults, key=lambda fault: (fault.slot, fault.key))


@given(
    world_size=st.integers(1, 5),
    batch=st.integers(1, 13),
    micro_batches=st.integers(1, 3),
    start=st.integers(0, 40),
    steps=st.integers(1, 6),
    kilobytes=st.sampled_from([0.3, 1.5, 4.0, 32_000.0]),
)
@settings(deadline=None, max_examples=25)
def test_all_workers_together_take_every_slot_once(
    spec: StreamSpec, world_size: int, batch: int, micro_batches: int, start: int, steps: int, kilobytes: float
) -> None:
    made = replace(spec, global_batch_size=batch, micro_batches=micro_batches, block_megabytes=kilobytes / 1000)
    seen, _ = gather(made, world_size, start, start + steps)
    slots = np.arange(start * batch, (start + steps) * batch)
    assert sorted(seen) == slots.tolist()
    for slot, row in zip(slots.tolist(), made.order().rows(slots).tolist(), strict=True):
        # The picture in the row is the one that the order put there, or a good one in the place of a bad one.
        found_row, number = seen[slot]
        assert found_row == number
        assert number == row if row not in BAD else number not in BAD


def test_any_number_of_workers_sees_the_same_samples_faults_and_substitutes(spec: StreamSpec) -> None:
    expected = gather(spec, 1, 0, 20)
    assert {fault.key[-2:] for fault in expected[1]} == {f"{number % 12:02d}" for number in BAD}
    assert all(fault.kind == "undecodable_image" for fault in expected[1])
    for world_size in (2, 3, 4, 5):
        assert gather(spec, world_size, 0, 20) == expected


def test_blocks_of_any_size_give_the_same_shares(spec: StreamSpec) -> None:
    whole = list(LocalStream(spec, 1, 2, 0, 12))
    for megabytes in (1e-4, 0.0005, 0.003):
        pieces = list(LocalStream(replace(spec, block_megabytes=megabytes), 1, 2, 0, 12))
        assert Plan(replace(spec, block_megabytes=megabytes), 1, 2, 0, 12).blocks > 1
        assert_same(whole, pieces)


def assert_same(left: list[StepBatch], right: list[StepBatch]) -> None:
    assert [share.step for share in left] == [share.step for share in right]
    for one, other in zip(left, right, strict=True):
        assert one.faults == other.faults
        for key in one.arrays:
            np.testing.assert_array_equal(one.arrays[key], other.arrays[key])


@pytest.mark.parametrize("start", [1, 5, 8, 19])
def test_resumed_at_any_step_is_never_stopped(spec: StreamSpec, start: int) -> None:
    whole = list(LocalStream(spec, 1, 3, 0, 20))
    assert_same(whole[start:], list(LocalStream(spec, 1, 3, start, 20)))


def test_faults_stand_at_the_slot_that_the_bad_sample_had(spec: StreamSpec) -> None:
    for share in LocalStream(spec, 0, 1, 0, 20):
        for fault in share.faults:
            assert fault.slot in share.arrays["slot"]
            row = share.arrays["row"][share.arrays["slot"] == fault.slot]
            assert int(row[0]) not in BAD


def test_a_finite_stream_is_one_pass_in_order_padded_to_equal_steps(spec: StreamSpec) -> None:
    rows = np.array([2, 3, 9, 14, 25, 26, 27, 40, 41], np.int64)
    finite = replace(spec, selection=Selection(rows, len(rows), "held out"), finite=True, shuffle=False, global_batch_size=4)
    for world_size in (1, 2, 3, 4, 7):
        seen, _ = gather(finite, world_size, 0, None)
        assert [row for row, _ in (seen[slot] for slot in sorted(seen))] == rows.tolist()
        assert len({len(list(LocalStream(finite, rank, world_size, 0, None))) for rank in range(world_size)}) == 1
        last = list(LocalStream(finite, world_size - 1, world_size, 0, None))[-1].arrays
        # Padding repeats a sample, so that nothing computed from it is infinite.
        assert set(numbers(last).tolist()) <= set(rows.tolist())


def test_padding_of_a_bad_sample_is_neither_bad_nor_reported_twice(spec: StreamSpec) -> None:
    rows = np.array([1, 4], np.int64)
    finite = replace(spec, selection=Selection(rows, 2, "held out"), finite=True, global_batch_size=2, micro_batches=4)
    shares = [share for rank in range(2) for share in LocalStream(finite, rank, 2, 0, None)]
    assert [len(share.arrays["slot"]) for share in shares] == [4, 4]
    assert [fault.slot for share in shares for fault in share.faults] == [1]
    assert all((numbers(share.arrays) == 1).all() for share in shares)


def test_where_all_are_bad_the_stream_says_so(spec: StreamSpec) -> None:
    bad = replace(spec, selection=Selection(np.array(sorted(BAD)), len(BAD), "bad"))
    with pytest.raises(ValueError, match=r"substitutes were bad too.*undecodable_image"):
        next(iter(LocalStream(bad, 0, 1, 0, 1)))


def test_an_error_of_the_reader_is_raised_where_the_stream_is_consumed(spec: StreamSpec) -> None:
    lost = replace(spec, source=replace(spec.source, root="/does/not/exist"))
    with pytest.raises(FileNotFoundError, match="00000"):
        list(LocalStream(lost, 0, 1, 0, 5))


def test_blocks_out_of_order_are_refused(spec: StreamSpec) -> None:
    plan = Plan(replace(spec, block_megabytes=0.003), 0, 1, 0, 12)
    assembler = stream.Assembler(plan)
    block = plan.block(1)
    samples = stream.read_rows(spec.source, block.rows, block.wanted, spec.needs, spec.seed)
    with pytest.raises(RuntimeError, match="out of order"):
        list(assembler.add(block, samples))
    with pytest.raises(RuntimeError, match="out of order"):
        list(assembler.add(plan.block(0), samples))


def test_a_consumer_that_stops_early_leaves_no_thread(spec: StreamSpec) -> None:
    def readers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("diptych-stream")]

    iterator = iter(LocalStream(replace(spec, block_megabytes=0.003), 0, 1, 0, 10_000, threads=3))
    next(iterator)
    assert len(readers()) == 3
    iterator.close()
    assert not readers()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_side_by_side_give_the_shares_of_one(spec: StreamSpec, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of `threads` blocks ends last, and not before all are under way."""
    small = replace(spec, block_megabytes=0.0005)
    expected = list(LocalStream(small, 1, 2, 3, 30))
    plan = Plan(small, 1, 2, 3, 30)
    assert plan.blocks > 2 * threads
    firsts = [plan.block(number).wanted.tolist() for number in range(threads)]
    together, ended, read_rows = threading.Barrier(threads), [], stream.read_rows

    def read(source: SampleSource, rows: np.ndarray, slots: np.ndarray, *others: Any) -> stream.Samples:
        if slots.tolist() in firsts:
            number = firsts.index(slots.tolist())
            together.wait(timeout=20)
            time.sleep(0 if number else 0.2)
            ended.append(number)
        return read_rows(source, rows, slots, *others)

    monkeypatch.setattr(stream, "read_rows", read)
    assert_same(expected, list(LocalStream(small, 1, 2, 3, 30, threads=threads)))
    assert sorted(ended) == list(range(threads))
    assert ended[-1] == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_is_read_ahead_than_is_asked_for(spec: StreamSpec, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, read_rows = [], stream.read_rows

    def read(*given: Any) -> stream.Samples:
        begun.append(given)
        return read_rows(*given)

    monkeypatch.setattr(stream, "read_rows", read)
    good = Selection(np.array([0, 1, 2, 3, 5, 6, 7, 8]), 8, "good")
    iterator = iter(LocalStream(replace(spec, selection=good, block_megabytes=1e-4, global_batch_size=1), 0, 1, 0, 1000, threads=threads))
    for taken in (1, 2, 3):
        next(iterator)
        most = taken + spec.prefetch_blocks + threads
        deadline = time.monotonic() + 20
        while len(begun) < most and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(begun) == most
    iterator.close()


def test_planning_costs_nothing_per_step(spec: StreamSpec) -> None:
    plan = Plan(replace(spec, global_batch_size=1024), 3, 8, 5_000_000, 1_000_000_000)
    assert plan.block(10**6).slots[0] // 1024 == 5_000_001 + (10**6 - 1) * plan.block_rows // plan.share
    # The first batch waits for its own samples alone.
    assert len(plan.block(0).slots) == plan.share < plan.block_rows


def test_arrays_may_be_written_to(spec: StreamSpec) -> None:
    # torch.from_numpy shares the memory, and complains about arrays that are read-only.
    for share in LocalStream(spec, 0, 1, 0, 8):
        assert all(array.flags.writeable and array.flags.c_contiguous for array in share.arrays.values())


def test_a_spec_travels_and_follows_the_configuration(source: SampleSource) -> None:
    recipe = load_recipe("coca", "smoke")
    config: RunConfig = recipe.model_copy(
        update={
            "train": TrainConfig(global_batch_size=16, micro_batches=2),
            "validation": ValidationConfig(samples=9, batch_size=4),
            "data": DataConfig(shuffle_chunk=3, block_megabytes=1.0),
        }
    )
    selection = Selection(np.arange(0, 40, 2), 20, "digest")
    spec = StreamSpec.of(source, selection, config, finite=False)
    assert (spec.global_batch_size, spec.micro_batches, spec.shuffle_chunk, spec.steps) == (16, 2, 3, None)
    assert pickle.loads(pickle.dumps(spec)).order().rows(np.arange(3)).tolist() == spec.order().rows(np.arange(3)).tolist()
    held_out = StreamSpec.of(source, selection, config, finite=True)
    assert (held_out.global_batch_size, held_out.micro_batches, held_out.selection.samples, held_out.steps) == (4, 1, 9, 3)
    # Fewer than there are: spread over the selection, in its order.
    assert held_out.order().rows(np.arange(9)).tolist() == [0, 4, 8, 12, 16, 22, 26, 30, 34]


def test_wrong_calls_are_refused(spec: StreamSpec) -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Plan(spec, 2, 2, 0, 1)
    with pytest.raises(ValueError, match="stop_step"):
        Plan(spec, 0, 1, 0, None)
    with pytest.raises(ValueError, match="threads: 0"):
        LocalStream(spec, 0, 1, 0, 1, threads=0)


def test_a_path_is_not_needed_to_open_a_stream(spec: StreamSpec, tmp_path: Path) -> None:
    saved = Selection(np.arange(10), 10, "digest").save(tmp_path / "rows.npy")
    shares = list(LocalStream(replace(spec, selection=pickle.loads(pickle.dumps(saved))), 0, 1, 0, 3))
    assert {int(row) for share in shares for row in share.arrays["row"]} <= set(range(10)) - BAD
