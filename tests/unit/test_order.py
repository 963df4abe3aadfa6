"""The order is a pure function of the slot, and every epoch is a permutation of the selection."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.datasets import draws
from diptych.datasets.keep import Selection
from diptych.datasets.order import Order


@st.composite
def selections(draw: st.DrawFn) -> tuple[Selection, np.ndarray]:
    """A manifest of a few shards, some empty, and a selection that may leave whole shards out."""
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0))
    starts = np.cumsum([0, *counts])
    total = int(starts[-1])
    if draw(st.booleans()):
        return Selection(None, total, "all"), starts
    chosen = draw(st.sets(st.integers(0, total - 1), min_size=1))
    return Selection(np.array(sorted(chosen), np.int64), len(chosen), "some"), starts


orders = st.tuples(selections(), st.integers(0, 3), st.integers(1, 9), st.integers(1, 40))


@given(orders, st.integers(0, 10**6), st.sampled_from([0, draws.LISTED]))
def test_every_epoch_is_a_permutation_of_the_selection(made: tuple, epoch: int, listed: int) -> None:
    (selection, starts), seed, chunk, group = made
    slots = epoch * selection.samples + np.arange(selection.samples)
    expected = np.arange(selection.samples) if selection.rows is None else selection.rows
    with mock.patch.object(draws, "LISTED", listed):
        assert sorted(Order(selection, starts, seed, chunk=chunk, group=group).rows(slots)) == expected.tolist()


@given(orders, st.data())
def test_a_slot_is_the_same_however_it_is_asked_for(made: tuple, data: st.DataObject) -> None:
    (selection, starts), seed, chunk, group = made
    slots = np.array(data.draw(st.lists(st.integers(0, 5 * selection.samples), min_size=1, max_size=20)))
    together = Order(selection, starts, seed, chunk=chunk, group=group).rows(slots)
    alone = [int(Order(selection, starts, seed, chunk=chunk, group=group).rows(np.array([slot]))[0]) for slot in slots]
    assert together.tolist() == alone


@given(orders)
def test_without_shuffling_the_order_is_the_manifests(made: tuple) -> None:
    (selection, starts), seed, _, _ = made
    order = Order(selection, starts, seed, shuffle=False)
    expected = np.arange(selection.samples) if selection.rows is None else selection.rows
    assert order.rows(np.arange(2 * selection.samples)).tolist() == [*expected, *expected]


def _thousand(digest: str = "d", seed: int = 0, **sizes: int) -> Order:
    return Order(Selection(None, 1000, digest), np.arange(0, 1001, 100), seed, **sizes)


def test_epochs_seeds_digests_and_sizes_give_other_orders() -> None:
    first = _thousand().rows(np.arange(1000))
    others = [
        _thousand().rows(1000 + np.arange(1000)),
        _thousand(seed=1).rows(np.arange(1000)),
        _thousand(digest="e").rows(np.arange(1000)),
        _thousand(chunk=16).rows(np.arange(1000)),
        _thousand(group=64).rows(np.arange(1000)),
    ]
    for other in others:
        assert (first == other).mean() < 0.02


def test_samples_of_a_window_come_from_few_chunks() -> None:
    order = Order(Selection(None, 100_000, "d"), np.arange(0, 100_001, 1000), 0, chunk=32, group=1024)
    window = np.sort(order.rows(np.arange(1024)))
    # 1,024 neighbours in the stream are 32 chunks of 32 neighbours in the shards (a few are cut at a shard's end).
    assert (np.diff(window) > 1).sum() + 1 <= 40


def test_within_a_group_samples_are_mixed() -> None:
    rows = _thousand(chunk=50, group=500).rows(np.arange(500))
    assert (np.diff(rows) == 1).mean() < 0.05


def test_the_order_is_the_same_in_another_process() -> None:
    code = (
        "import numpy as np; from diptych.datasets.keep import Selection; from diptych.datasets.order import Order; np.random.seed(7);"
        "print(Order(Selection(None, 1000, 'd'), np.arange(0, 1001, 100), 0).rows(np.arange(5000)).tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, check=True, capture_output=True, text=True).stdout
    assert found == f"{_thousand().rows(np.arange(5000)).tolist()}\n"


def test_the_order_does_not_change_between_releases() -> None:
    # Checkpoints name a slot: another order would silently train on other samples after an upgrade.
    assert _thousand().rows(np.array([0, 1, 2, 999, 1000, 123_456])).tolist() == [761, 774, 858, 89, 815, 595]


def test_the_order_of_many_chunks_does_not_change_between_releases() -> None:
    many = Order(Selection(None, 1 << 22, "d"), np.arange(0, (1 << 22) + 1, 1 << 12), 0, chunk=2)
    assert many.rows(np.array([0, 1, 2, 1 << 22, 123_456_789])).tolist() == [777325, 1915342, 730669, 4153449, 3235799]
    assert draws.Permutation(0, draws.LISTED)(np.arange(3)).tolist() == draws.permutation(0, draws.LISTED)[:3].tolist()


@pytest.mark.parametrize(("samples", "shard"), [(10_000_000, 1000), (5_000_000_000, 100_000)])
def test_a_slot_far_away_is_immediate_and_small(samples: int, shard: int) -> None:
    tracemalloc.start()
    begin = time.perf_counter()
    order = Order(Selection(None, samples, "d"), np.arange(0, samples + 1, shard), 0)
    rows = order.rows(5_000_000_000 + np.arange(256))
    seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(rows)) == 256
    assert seconds < 2
    assert peak < 30e6


def test_substitutes_belong_to_the_selection_and_depend_on_slot_and_try() -> None:
    selection = Selection(np.arange(0, 3000, 3), 1000, "d")
    order = Order(selection, np.array([0, 1500, 3000]), 0)
    slots = np.arange(10_000, 10_500)
    first, second = order.substitutes(slots, 1), order.substitutes(slots, 2)
    assert (first % 3 == 0).all()
    assert (first == second).mean() < 0.02
    assert order.substitutes(slots[7:8], 1)[0] == first[7]


def test_nothing_selected_and_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples are selected"):
        Order(Selection(None, 0, "d"), np.array([0, 0]), 0)
    with pytest.raises(ValueError, match="shuffle_chunk"):
        Order(Selection(None, 5, "d"), np.array([0, 5]), 0, chunk=0)


@given(st.integers(0, 2**64 - 1), st.integers(1, 2000))
@settings(max_examples=30)
def test_permutations_are_permutations(key: int, length: int) -> None:
    assert sorted(draws.permutation(key, length)) == list(range(length))


@given(st.integers(0, 2**64 - 1), st.integers(1, 2000), st.data())
@settings(max_examples=30)
def test_permutations_place_by_place_are_permutations_and_their_reverse(key: int, length: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, length - 1))
    for listed in (0, draws.LISTED):
        with mock.patch.object(draws, "LISTED", listed):
            permuted = draws.Permutation(key, length)
        values = permuted(np.arange(length))
        assert sorted(values) == list(range(length))
        assert permuted.place_of(int(values[place])) == place


def test_long_permutations_are_as_mixed_as_sorted_ones() -> None:
    length = draws.LISTED + 12_345
    values = draws.Permutation(draws.key_of(0, "long"), length)(np.arange(length))
    counts, _ = np.histogram(values[:100_000], bins=20, range=(0, length))
    assert np.abs(counts - 5000).max() < 400
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.005
    # Of independent neighbours 200 in a million lie within 100 of each other; digits of a place alone would bring thousands together.
    assert (np.abs(np.diff(values)) <= 100).sum() < 300
    other = draws.Permutation(draws.key_of(1, "long"), length)(np.arange(length))
    assert (values == other).sum() < 10


def test_draws_are_uniform_and_unrelated_between_keys() -> None:
    counters = np.arange(100_000)
    values = draws.uniform(draws.key_of(0, "a"), counters)
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert np.abs(counts - 5000).max() < 400
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(values, draws.uniform(draws.key_of(1, "a"), counters))[0, 1]) < 0.02
    assert draws.below(draws.key_of(0, "b"), counters, 7).max() == 6
