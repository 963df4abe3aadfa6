"""The stream on Ray Data: every train worker runs its own, and read tasks on any node fill its blocks.

One read task is one block, so a task's payload is a few kilobytes of rows and slots, and what it returns arrives whole and
in order. Blocks are handed to Ray Data a bounded segment at a time, so that a run of 10⁹ slots costs what a short one does. The first
block, one step, is read by the training worker itself. Lost read workers are Ray's to replace; an error inside a read is raised here as itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray import cloudpickle
from ray.data import ExecutionOptions, ExecutionResources
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from diptych.batches import FIELDS, Fault, Needs, StepBatch
from diptych.datasets.reader import Samples, SampleSource, read_rows
from diptych.datasets.stream import Assembler, Block, Plan, StreamSpec

SEGMENT_BLOCKS = 256
"""Blocks that Ray Data plans at once; the next segment starts before this one ends."""
TURNS_PER_SECOND, TURNS_AT_REST = 100, 2
"""Of Ray Data's loop, at most; and while a block lies ready, or after turns that brought nothing. A turn takes 2 ms."""
READ_NICENESS = 19
"""Of a read task; Ray's workers have 15. What is read ahead can wait for a core that trains; a loop that waits for data leaves its core."""
_FAULT, _ERROR, _TAIL = "fault", "error", "tail"


def read_block(source: SampleSource, rows: np.ndarray, slots: np.ndarray, needs: Needs, seed: int) -> list[pa.Table]:
    """Body of a read task: one Arrow table, with `pack`'s columns, or with the error in the only row."""
    os.setpriority(os.PRIO_PROCESS, 0, READ_NICENESS)
    try:
        return [pack(read_rows(source, rows, slots, needs, seed))]
    except Exception as error:
        # As data, because Ray Data rewrites the message of what it sees raised and logs 200 lines of its own stack.
        error.add_note("In a read task:\n" + traceback.format_exc())
        return [pa.table({_ERROR: pa.array([cloudpickle.dumps(error)], pa.binary())})]


def pack(samples: Samples) -> pa.Table:
    """Arrays as columns of fixed-size bytes, without a copy; faults as JSON in their rows."""
    columns, fields = [], []
    for key, array in samples.arrays.items():
        array = np.ascontiguousarray(array)
        kind = pa.binary(array[0].nbytes)
        columns.append(pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(array.reshape(-1).view(np.uint8))]))
        # The shape of a row travels with its column, so that a block explains itself.
        fields.append(pa.field(key, kind, metadata={_TAIL: json.dumps(array.shape[1:])}))
    faults: list[str | None] = [None] * len(samples.arrays["slot"])
    for index, fault in samples.faults:
        faults[index] = json.dumps(asdict(fault))
    return pa.Table.from_arrays([*columns, pa.array(faults, pa.string())], schema=pa.schema([*fields, pa.field(_FAULT, pa.string())]))


def unpack(tables: list[pa.Table]) -> Samples:
    """What `pack` packed; the arrays are views of one table's memory, and read-only."""
    arrays = {}
    for field in tables[0].schema:
        if field.name == _FAULT:
            continue
        tail = tuple(json.loads(field.metadata[_TAIL.encode()]))
        pieces = [_view(chunk).view(FIELDS[field.name].dtype).reshape(-1, *tail) for table in tables for chunk in table[field.name].chunks]
        arrays[field.name] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    texts = [text for table in tables for text in table[_FAULT].to_pylist()]
    return Samples(arrays, [(index, Fault(**json.loads(text))) for index, text in enumerate(texts) if text is not None], 0)


def _view(chunk: pa.Array) -> np.ndarray:
    width = chunk.type.byte_width
    return np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * width : (chunk.offset + len(chunk)) * width]


class SlotsDatasource(Datasource):
    """Blocks `first` to `stop` of a plan as read tasks."""

    def __init__(self, plan: Plan, first: int, stop: int) -> None:
        super().__init__()
        self.blocks = [plan.block(number) for number in range(first, stop)]
        self._spec, self._bytes = plan.spec, plan.block_bytes

    def estimate_inmemory_data_size(self) -> int:
        """Decoded bytes of all blocks."""
        return self._bytes * len(self.blocks)

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        """One task per block, whatever the parallelism asked for."""
        spec = self._spec
        return [
            ReadTask(
                partial(read_block, spec.source, block.rows, block.wanted, spec.needs, spec.seed),
                BlockMetadata(num_rows=len(block.wanted), size_bytes=self._bytes, exec_stats=None, input_files=None),
            )
            for block in self.blocks
        ]


class Paced(ExecutionCallback):
    """Lets Ray Data's loop turn when there is something to do, and not much oftener.

    By itself it waits until all running tasks have output, 0.1 s at most. Where the training loop waits for blocks, a reader that has ended
    its own waits for the next as long; where reading is as far ahead as it may be, all output is there, and the loop turns without
    a pause, in a thread beside the training loop: half of a core, and the interpreter's lock. So it is told not to wait, and waits here.
    """

    def __init__(self) -> None:
        self._last = -math.inf
        self._done: list[tuple[int, int]] = []
        self._pause = 0.0
        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = 0.001

    def on_execution_step(self, executor: Any) -> None:
        """Sleep until a reader has something new and no block lies ready, or the longest pause is over."""
        pause = 0.001
        while not executor._consumer_idling() and time.monotonic() < self._last + 1 / TURNS_AT_REST:
            time.sleep(pause)  # longer and longer: at full speed the block is taken at once, in training after seconds
            pause = min(2 * pause, 0.1)
        time.sleep(max(0.0, self._last + 1 / TURNS_PER_SECOND - time.monotonic()))
        if executor._consumer_idling():
            self._await_readers(executor)
        self._last = time.monotonic()

    def _await_readers(self, executor: Any) -> None:
        # What lies there after a turn that brought nothing may not be taken yet, and would end every wait at once.
        done = [(operator.metrics.num_task_outputs_generated, operator.metrics.num_tasks_finished) for operator in executor._topology]
        brought, self._done = done != self._done, done
        # Facts of a block are fetched by a thread that nobody can wait for, so the first pauses are short.
        self._pause = 2 / TURNS_PER_SECOND if brought else min(2 * self._pause, 1 / TURNS_AT_REST)
        tasks = [task.get_waitable() for operator in executor._topology for task in operator.get_active_tasks()]
        there, running = ray.wait(tasks, num_returns=len(tasks), timeout=0, fetch_local=False) if tasks else ([], [])
        if there and brought:
            return
        if running:
            ray.wait(running, num_returns=1, timeout=self._pause, fetch_local=False)
        else:
            time.sleep(self._pause)


class _Segment:
    """Consecutive blocks in one execution of Ray Data, begun at once in a thread of its own."""

    def __init__(self, plan: Plan, first: int, stop: int, cpus: float, claims: bool) -> None:
        self.first, self.stop = first, stop
        self._plan, self._cpus, self._claims = plan, cpus, claims
        self._blocks: list[Block] = []
        self._tables: Iterator[pa.Table] = iter(())
        self._head: pa.Table | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._begin, name=f"diptych-segment-{first}", daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        try:
            source = SlotsDatasource(self._plan, self.first, self.stop)
            self._blocks = source.blocks
            dataset = _dataset(source, self._cpus, self._claims, self._plan)
            self._tables = iter(
                dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=self._plan.spec.prefetch_blocks)
            )
            self._head = next(self._tables, None)
        except BaseException as error:  # Raised where the segment is consumed.
            self._error = error

    def read(self) -> Iterator[tuple[Block, Samples]]:
        """Every block, whole, with what was read for it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        for block in self._blocks:
            tables: list[pa.Table] = []
            missing = len(block.wanted)
            while missing > 0:
                table = self._head if self._head is not None else next(self._tables, None)
                self._head = None
                if table is not None and _ERROR in table.column_names:
                    raise cloudpickle.loads(table[_ERROR][0].as_py())
                if table is None:
                    raise RuntimeError(f"the stream ended {missing} rows before the end of the block at row {block.start}")
                tables.append(table)
                missing -= table.num_rows
            yield block, unpack(tables)

    def close(self) -> None:
        """End the execution, if it is still running."""
        self._thread.join()
        close = getattr(self._tables, "close", None)
        if close is not None:
            close()


def _dataset(source: SlotsDatasource, cpus: float, claims: bool, plan: Plan) -> Any:
    # Up to two tasks more than CPUs keep the cores busy while Ray replaces those that ended; the parts are rounded down so that all fit.
    tasks = max(1, math.ceil(cpus)) + min(2, math.floor(cpus))
    part = math.floor(cpus / tasks * 1e4) / 1e4 if claims else 0
    dataset = ray.data.read_datasource(source, override_num_blocks=len(source.blocks), num_cpus=part, concurrency=tasks)
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.enable_auto_log_stats = False
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Paced]
    # A block is never cut: its size is bounded where it is planned.
    context.target_max_block_size = None
    ahead = plan.spec.prefetch_blocks + 2 * tasks + 2
    context.execution_options = ExecutionOptions(
        resource_limits=ExecutionResources(cpu=cpus, object_store_memory=ahead * max(plan.block_bytes, 1 << 20)),
        preserve_order=True,
        verbose_progress=False,
    )
    return dataset


class RayStream:
    """This worker's shares of the steps [start_step, stop_step), read by Ray Data with at most `cpus` logical CPUs.

    Without `claims` the read tasks run beside whatever else the cluster does, as many at once, and claim no CPU for themselves.
    """

    def __init__(
        self,
        spec: StreamSpec,
        rank: int,
        world_size: int,
        start_step: int,
        stop_step: int | None,
        cpus: float = 1.0,
        claims: bool = True,
    ) -> None:
        if cpus <= 0:
            raise ValueError(f"cpus: {cpus} logical CPUs for reading; at least a part of one is needed (cluster.data_cpus)")
        self.plan, self.cpus, self.claims = Plan(spec, rank, world_size, start_step, stop_step), cpus, claims
        # Ray Data tells of every execution, and that it shows no bars; a run has one execution per segment.
        logging.getLogger("ray.data").setLevel(logging.ERROR)

    def __iter__(self) -> Iterator[StepBatch]:
        assembler = Assembler(self.plan)
        with contextlib.closing(self._blocks()) as blocks:
            for block, samples in blocks:
                yield from assembler.add(block, samples)

    def _blocks(self) -> Generator[tuple[Block, Samples], None, None]:
        """Every block: the first read here, the others from one segment after the other; the next one begins while this one's last blocks are still read."""
        plan = self.plan
        overlap = 2 * math.ceil(self.cpus) + plan.spec.prefetch_blocks
        segments: list[_Segment] = []

        def begin(first: int) -> None:
            if first < plan.blocks:
                segments.append(_Segment(plan, first, min(first + SEGMENT_BLOCKS, plan.blocks), self.cpus, self.claims))

        try:
            if plan.blocks:
                # The first block is one step, which need not wait until Ray Data has started.
                block = plan.block(0)
                samples = read_rows(plan.spec.source, block.rows, block.wanted, plan.spec.needs, plan.spec.seed)
                begin(1)
                yield block, samples
            while segments:
                for number, item in enumerate(segments[0].read(), segments[0].first):
                    if len(segments) == 1 and segments[0].stop - number <= overlap:
                        begin(segments[0].stop)
                    yield item
                segments.pop(0).close()
        finally:
            for segment in segments:
                segment.close()
