"""Which rows a worker gets, in blocks, and how blocks become the shares of steps; and the stream without Ray.

Step t takes slots [tG, (t+1)G), whatever the number of workers; each of n workers takes ceil(G/n) consecutive ones, padded
with rows of weight zero. A worker's shares, one behind the other, are its row stream; a block is a piece of it, bounded by
bytes. Bad samples are replaced where blocks are consumed, by rows that are a function of (seed, slot, try), so the
samples of a run depend neither on the number of workers nor on where blocks begin.

Shape legend: R rows of a block, U samples read for it, B rows of a share.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from diptych.batches import FIELDS, Fault, Needs, StepBatch
from diptych.config import RunConfig
from diptych.datasets.keep import Selection
from diptych.datasets.order import Order
from diptych.datasets.reader import Samples, SampleSource, read_rows, row_bytes

MOST_ROWS = 4096
"""Rows of a block at most: where rows are a few hundred bytes, the first batch should not wait for megabytes of them."""
MOST_TRIES = 100
"""Substitutes tried for one slot."""


@dataclass(frozen=True)
class StreamSpec:
    """A stream, whole but for the workers that share it. Small and picklable."""

    source: SampleSource
    selection: Selection
    needs: Needs
    seed: int
    global_batch_size: int
    micro_batches: int = 1
    finite: bool = False
    """One pass that ends, padded to a whole step (validation); otherwise epoch follows epoch without end."""
    shuffle: bool = True
    shuffle_chunk: int = 32
    shuffle_group: int = 8192
    block_megabytes: float = 32.0
    prefetch_blocks: int = 2

    @classmethod
    def of(cls, source: SampleSource, selection: Selection, config: RunConfig, *, finite: bool) -> StreamSpec:
        """The training stream of `config`, or, if `finite`, one pass over at most `validation.samples` of the selection."""
        data, batch = config.data, config.train.global_batch_size
        spec = cls(
            source=source,
            selection=selection,
            needs=config.task.needs(),
            seed=config.seed,
            global_batch_size=batch,
            micro_batches=config.train.micro_batches,
            shuffle=data.shuffle,
            shuffle_chunk=data.shuffle_chunk,
            shuffle_group=data.shuffle_group,
            block_megabytes=data.block_megabytes,
            prefetch_blocks=data.prefetch_blocks,
        )
        if not finite:
            return spec
        selection = _spread(selection, config.validation.samples)
        size = min(config.validation.batch_size or batch, selection.samples) if selection.samples else batch
        return replace(spec, selection=selection, global_batch_size=size, micro_batches=1, finite=True, shuffle=False)

    def order(self) -> Order:
        """Slot → manifest row."""
        starts = self.source.opened().manifest.shard_starts
        return Order(
            self.selection, starts, self.seed, chunk=self.shuffle_chunk, group=self.shuffle_group, shuffle=self.shuffle and not self.finite
        )

    @property
    def steps(self) -> int | None:
        """Steps of a finite stream; None = without end."""
        return -(-self.selection.samples // self.global_batch_size) if self.finite else None

    def share_size(self, world_size: int) -> int:
        """B: rows of one worker's share of a step, padding included."""
        share = -(-self.global_batch_size // world_size)
        return -(-share // self.micro_batches) * self.micro_batches


def _spread(selection: Selection, samples: int) -> Selection:
    """At most `samples` rows, spread evenly over the selection."""
    if samples >= selection.samples:
        return selection
    rows = selection[np.arange(samples, dtype=np.int64) * selection.samples // max(samples, 1)]
    return Selection(rows, samples, f"{selection.digest}/{samples}")


class Block(NamedTuple):
    """A piece of a worker's row stream."""

    start: int
    """Place of its first row in the worker's row stream, which starts with the stream's first step."""
    slots: np.ndarray
    """int64 [R]: slot of each row; -1 on padding."""
    wanted: np.ndarray
    """int64 [U], ascending: slots whose samples are read."""
    places: np.ndarray
    """int64 [R]: which of `wanted` fills each row; padding repeats a sample that is read anyway."""
    rows: np.ndarray
    """int64 [U]: manifest rows of `wanted`."""


class Plan:
    """A worker's row stream for the steps [start_step, stop_step), cut into blocks. Costs nothing per step before it is asked."""

    def __init__(self, spec: StreamSpec, rank: int, world_size: int, start_step: int, stop_step: int | None) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} workers: ranks are 0 to {world_size - 1}")
        last = spec.steps if stop_step is None else stop_step if spec.steps is None else min(stop_step, spec.steps)
        if last is None:
            raise ValueError("stop_step: only a finite stream ends by itself; name the step to stop before")
        self.spec, self.rank, self.world_size = spec, rank, world_size
        self.start_step, self.stop_step = start_step, max(last, start_step)
        self.share = spec.share_size(world_size)
        self.order = spec.order()
        self.total = (self.stop_step - start_step) * self.share
        self.block_rows = self._block_rows()
        # The first block is one step, so that the first batch does not wait for the samples of later ones.
        self._first_rows = min(self.share, self.block_rows, self.total)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-(self.total - self._first_rows) // self.block_rows) + (self._first_rows > 0)

    @property
    def block_bytes(self) -> int:
        """Decoded bytes of a whole block."""
        return self.block_rows * self._row_bytes()

    def block(self, number: int) -> Block:
        """Block `number`."""
        start = self._first_rows + (number - 1) * self.block_rows if number else 0
        stop = min(start + self.block_rows, self.total) if number else self._first_rows
        places = np.arange(start, stop, dtype=np.int64)
        slots, content = self._slots(places)
        wanted, inverse = np.unique(content, return_inverse=True)
        return Block(start, slots, wanted, inverse, self.order.rows(wanted))

    def _slots(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(slot of each place in the row stream or -1, slot of the sample that fills it)."""
        spec = self.spec
        steps, inside = np.divmod(places, self.share)
        first = (steps + self.start_step) * spec.global_batch_size
        per_worker = -(-spec.global_batch_size // self.world_size)
        step_size = np.full(len(places), spec.global_batch_size, np.int64)
        if spec.finite:
            step_size = np.minimum(step_size, spec.selection.samples - first)
        begin = self.rank * per_worker
        count = np.clip(step_size - begin, 0, per_worker)
        # Padding repeats the share's last sample, or the step's first where the share has none: finite, and of weight zero.
        content = np.where(count > 0, first + begin + np.minimum(inside, count - 1), first)
        return np.where(inside < count, content, -1), content

    def _block_rows(self) -> int:
        most = max(1, min(int(self.spec.block_megabytes * 1e6) // self._row_bytes(), max(MOST_ROWS, self.share)))
        return most // self.share * self.share if most >= self.share else most

    def _row_bytes(self) -> int:
        return row_bytes(self.spec.needs, self.spec.source.opened())


class Assembler:
    """Blocks in their order → shares of steps, with substitutes in the place of bad samples."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._step = plan.start_step
        self._expected = 0
        self._pending: list[tuple[dict[str, np.ndarray], list[tuple[int, Fault]]]] = []
        self._rows = 0

    def add(self, block: Block, samples: Samples) -> Iterator[StepBatch]:
        """Take one block with what was read for it; yields every share that is now whole."""
        if block.start != self._expected or not np.array_equal(samples.arrays["slot"], block.wanted):
            raise RuntimeError(
                f"the stream is out of order: rows from {self._expected} on were due, with slots {block.wanted[:4].tolist()}…; "
                f"rows from {block.start} on came, with slots {samples.arrays['slot'][:4].tolist()}… Nothing was trained on them."
            )
        self._expected += len(block.slots)
        arrays, faults = fill(self.plan, block, samples)
        self._pending.append((arrays, faults))
        self._rows += len(block.slots)
        share = self.plan.share
        while self._rows >= share:
            yield self._take(share)

    def _take(self, count: int) -> StepBatch:
        pieces: list[dict[str, np.ndarray]] = []
        found: list[Fault] = []
        self._rows -= count
        while count:
            arrays, faults = self._pending[0]
            length = len(arrays["slot"])
            taken = min(count, length)
            pieces.append({key: array[:taken] for key, array in arrays.items()})
            found += [fault for index, fault in faults if index < taken]
            rest = [(index - taken, fault) for index, fault in faults if index >= taken]
            if taken == length:
                self._pending.pop(0)
            else:
                self._pending[0] = ({key: array[taken:] for key, array in arrays.items()}, rest)
            count -= taken
        whole = pieces[0] if len(pieces) == 1 else {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        self._step += 1
        return StepBatch(self._step - 1, {key: np.ascontiguousarray(array) for key, array in whole.items()}, found)


def fill(plan: Plan, block: Block, samples: Samples) -> tuple[dict[str, np.ndarray], list[tuple[int, Fault]]]:
    """(arrays [R, …] with all keys of the needs, `(index into the R rows, fault)` of bad samples that stood at a slot)."""
    arrays, found = samples.arrays, samples.faults
    if found:
        arrays, found = _substitute(plan, block, samples)
    if len(block.wanted) != len(block.slots) or not np.array_equal(block.places, np.arange(len(block.places))):
        arrays = {key: array[block.places] for key, array in arrays.items()}
    padding = block.slots < 0
    arrays = arrays | {"slot": block.slots, "weight": (~padding).astype(np.float32)}
    if padding.any():
        arrays["row"] = np.where(padding, -1, arrays["row"])
    # Padding repeats a sample; a fault belongs to the row that holds it in earnest, if this worker has that.
    index_of = {int(slot): index for index, slot in enumerate(block.slots) if slot >= 0} if found else {}
    faults = [(index_of[fault.slot], fault) for _, fault in found if fault.slot in index_of]
    return {key: arrays[key] for key in FIELDS if key in arrays}, faults


def _substitute(plan: Plan, block: Block, samples: Samples) -> tuple[dict[str, np.ndarray], list[tuple[int, Fault]]]:
    """Samples of the same epoch in the place of bad ones; the faults of all that were met."""
    spec, found = plan.spec, list(samples.faults)
    arrays = {key: np.array(array) for key, array in samples.arrays.items()}
    bad = np.array([index for index, _ in samples.faults], np.int64)
    for tries in range(1, MOST_TRIES + 1):
        slots = block.wanted[bad]
        read = read_rows(spec.source, plan.order.substitutes(slots, tries), slots, spec.needs, spec.seed)
        for key, array in read.arrays.items():
            arrays[key][bad] = array
        found += [(int(bad[index]), fault) for index, fault in read.faults]
        bad = bad[[index for index, _ in read.faults]]
        if not len(bad):
            return arrays, found
    last = found[-1][1]
    raise ValueError(
        f"slot {last.slot}: {MOST_TRIES} substitutes were bad too, the last one {last.shard}/{last.key} ({last.kind}: {last.detail}). "
        "Nearly every sample lacks what the task needs; `diptych index` lists the faults of the shards."
    )


class LocalStream:
    """This worker's shares of the steps [start_step, stop_step), read ahead by `threads` of this process, a block each. No Ray."""

    def __init__(self, spec: StreamSpec, rank: int, world_size: int, start_step: int, stop_step: int | None, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"threads: {threads}; at least one thread has to read")
        self.plan, self.threads = Plan(spec, rank, world_size, start_step, stop_step), threads

    def __iter__(self) -> Iterator[StepBatch]:
        spec, plan = self.plan.spec, self.plan
        assembler = Assembler(plan)

        def read(number: int) -> tuple[Block, Samples]:
            block = plan.block(number)
            return block, read_rows(spec.source, block.rows, block.wanted, spec.needs, spec.seed)

        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="diptych-stream")
        # Each thread has a block in hand while `prefetch_blocks` are ready.
        numbers = iter(range(plan.blocks))
        ahead = deque(pool.submit(read, number) for number in itertools.islice(numbers, spec.prefetch_blocks + self.threads))
        try:
            while ahead:
                found = ahead.popleft().result()
                ahead.extend(pool.submit(read, number) for number in itertools.islice(numbers, 1))
                yield from assembler.add(*found)
        finally:
            pool.shutdown(cancel_futures=True)
