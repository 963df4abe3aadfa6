"""Which sample stands at slot i: a pure function of (seed, digest of the selection, order parameters, i).

A run is one stream of slots without an epoch seam. Slot i belongs to epoch i // N of the N selected samples. In an epoch
the shards are permuted, the resulting sequence is cut into chunks of neighbours, the chunks are permuted, and samples are
permuted within consecutive groups. An epoch costs O(shards) when it is first touched, whatever N and the size of chunks, a
group O(group), and nothing is computed for the slots before, so slot 5·10⁹ is as near as slot 0.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple, TypeVar

import numpy as np

from diptych.datasets import draws
from diptych.datasets.keep import Selection

K = TypeVar("K")
V = TypeVar("V")

_EPOCHS, _GROUPS = 3, 64
"""Epochs and groups kept; a block of steps touches one or two of each, a substitute one more."""


class _Epoch(NamedTuple):
    key: int
    shard_ends: np.ndarray
    """int64 [S]: samples up to and including each shard, in the epoch's order of shards."""
    shifts: np.ndarray
    """int64 [S]: what to add to a place in the epoch's sequence to get the place in the selection."""
    chunks: draws.Permutation
    """Of ceil(N / chunk): the chunk at each place."""
    short_at: int
    """Where the last chunk, which may be shorter, went."""


class Order:
    """Slots → manifest rows of a `Selection` of N samples. Safe to share between threads.

    `shard_starts` is int64 [S+1]: the first manifest row of every shard, and the number of rows at its end. Of a selection that is
    a memory map only the pages asked for are read.
    """

    def __init__(
        self, selection: Selection, shard_starts: np.ndarray, seed: int, *, chunk: int = 32, group: int = 8192, shuffle: bool = True
    ) -> None:
        self.selection, self.samples = selection, selection.samples
        if not self.samples:
            raise ValueError("order: no samples are selected; check data.keep and data.validation_share")
        if chunk < 1 or group < 1:
            raise ValueError(f"order: data.shuffle_chunk = {chunk} and data.shuffle_group = {group} must be at least 1")
        self.chunk, self.group, self.shuffle = chunk, group, shuffle
        self._key = draws.key_of("order", seed, selection.digest, chunk, group)
        bounds = selection.before(shard_starts)
        counts = np.diff(bounds)
        assert counts.sum() == self.samples, "a selected row lies outside the manifest"
        filled = np.flatnonzero(counts)
        self._starts, self._counts = bounds[filled], counts[filled]
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, slots: np.ndarray) -> np.ndarray:
        """int64 manifest rows at `slots` (int64, any shape, not negative)."""
        return np.asarray(self.selection[self.places(slots)], np.int64)

    def substitutes(self, slots: np.ndarray, tries: int) -> np.ndarray:
        """int64 manifest rows that stand in at bad `slots` on try `tries` (1, 2, …): other places of the same epoch."""
        epochs = slots // self.samples
        within = draws.below(draws.key_of(self._key, "substitute", tries), slots, self.samples)
        return self.rows(epochs * self.samples + within)

    def places(self, slots: np.ndarray) -> np.ndarray:
        """int64 places in the selection (0…N−1) at `slots`."""
        slots = np.asarray(slots, np.int64)
        assert slots.size == 0 or slots.min() >= 0, "slots are not negative"
        epochs, within = np.divmod(slots, self.samples)
        if not self.shuffle:
            return within
        places = np.empty_like(within)
        with self._lock:
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                places[chosen] = self._epoch_places(int(epoch), within[chosen])
        return places

    def _epoch_places(self, number: int, within: np.ndarray) -> np.ndarray:
        epoch = _keep(self._epochs, number, self._epochs.get(number) or self._make_epoch(number), _EPOCHS)
        groups, offsets = np.divmod(within, self.group)
        shuffled = np.empty_like(within)
        for group in np.unique(groups):
            chosen = groups == group
            found = self._groups.get((number, int(group)))
            permuted = _keep(self._groups, (number, int(group)), self._make_group(epoch, int(group)) if found is None else found, _GROUPS)
            shuffled[chosen] = group * self.group + permuted[offsets[chosen]]
        sequence = self._unchunk(epoch, shuffled)
        return sequence + epoch.shifts[np.searchsorted(epoch.shard_ends, sequence, side="right")]

    def _unchunk(self, epoch: _Epoch, places: np.ndarray) -> np.ndarray:
        """Places behind the permutation of chunks → places before it, although one chunk is shorter than the others."""
        short = self.samples - (epoch.chunks.length - 1) * self.chunk
        behind = places >= epoch.short_at * self.chunk + short
        # Behind the short chunk everything stands `chunk - short` earlier than it would with whole chunks.
        at, offset = np.divmod(np.where(behind, places + (self.chunk - short), places), self.chunk)
        return epoch.chunks(at) * self.chunk + offset

    def _make_epoch(self, number: int) -> _Epoch:
        key = draws.key_of(self._key, number)
        shards = draws.permutation(draws.key_of(key, "shards"), len(self._counts))
        ends = np.cumsum(self._counts[shards])
        shifts = self._starts[shards] - (ends - self._counts[shards])
        chunks = draws.Permutation(draws.key_of(key, "chunks"), -(-self.samples // self.chunk))
        return _Epoch(key, ends, shifts, chunks, chunks.place_of(chunks.length - 1))

    def _make_group(self, epoch: _Epoch, group: int) -> np.ndarray:
        length = min(self.group, self.samples - group * self.group)
        return draws.permutation(draws.key_of(epoch.key, "group", group), length)


def _keep(cache: OrderedDict[K, V], key: K, value: V, limit: int) -> V:
    """Put `value` in as the newest, and let the oldest go."""
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > limit:
        cache.popitem(last=False)
    return value
