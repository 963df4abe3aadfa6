"""The stream on Ray Data delivers what the stream without Ray does, through lost workers and over segments."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from ray.data._internal.execution import streaming_executor_state

from diptych.batches import ImageNeed, Needs, StepBatch
from diptych.config import DataConfig
from diptych.datasets import ray_stream
from diptych.datasets.keep import Selection
from diptych.datasets.manifest import build_manifest
from diptych.datasets.reader import SampleSource
from diptych.datasets.shards import ShardWriter
from diptych.datasets.stream import LocalStream, StreamSpec

SAMPLES, BAD = 300, {7, 150, 151}


def sample(number: int) -> dict:
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    data = file.getvalue()
    return {"jpg": data[:-50] if number in BAD else data, "txt": f"number {number}"}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    folder = str(tmp_path_factory.mktemp("shards"))
    ShardWriter(folder, samples_per_shard=100).write_all([sample(number) for number in range(SAMPLES)])
    source = SampleSource.of(build_manifest(folder), None, DataConfig())
    return StreamSpec(source, Selection(None, SAMPLES, "digest"), Needs(image=ImageNeed(32)), 0, 10, block_megabytes=0.1)


def assert_same(left: list[StepBatch], right: list[StepBatch]) -> None:
    assert [share.step for share in left] == [share.step for share in right]
    for one, other in zip(left, right, strict=True):
        assert one.faults == other.faults
        assert list(one.arrays) == list(other.arrays)
        for key in one.arrays:
            np.testing.assert_array_equal(one.arrays[key], other.arrays[key])
            assert one.arrays[key].dtype == other.arrays[key].dtype


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (2, 3)])
def test_the_same_shares_as_without_ray(
    ray_session: Any, spec: StreamSpec, rank: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Segments so short that several begin and end.
    monkeypatch.setattr(ray_stream, "SEGMENT_BLOCKS", 5)
    found = list(ray_stream.RayStream(spec, rank, world_size, 3, 63, cpus=2))
    expected = list(LocalStream(spec, rank, world_size, 3, 63))
    assert_same(expected, found)
    assert sum(len(share.faults) for share in found) > 0
    assert all(array.flags.writeable for array in found[-1].arrays.values())


def test_a_finite_stream_ends(ray_session: Any, spec: StreamSpec) -> None:
    finite = replace(spec, selection=Selection(np.arange(25), 25, "held out"), finite=True)
    assert_same(list(LocalStream(finite, 1, 2, 0, None)), list(ray_stream.RayStream(finite, 1, 2, 0, None, cpus=0.5)))


@pytest.mark.parametrize("there", [[], ["00000.tar"]], ids=["in the worker", "in a read task"])
def test_the_readers_error_arrives_as_itself(ray_session: Any, spec: StreamSpec, tmp_path: Path, there: list[str]) -> None:
    for name in there:
        (tmp_path / name).symlink_to(Path(spec.source.root, name))
    good = np.setdiff1d(np.arange(SAMPLES), sorted(BAD))
    lost = replace(spec, source=replace(spec.source, root=str(tmp_path)), selection=Selection(good, len(good), "good"), finite=True)
    with pytest.raises(FileNotFoundError) as caught:
        list(ray_stream.RayStream(lost, 0, 1, 0, None, cpus=1))
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{tmp_path}/0000{len(there)}.tar'"
    assert not there or "read_rows" in caught.value.__notes__[0]


def test_the_first_block_needs_no_ray(spec: StreamSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_stream, "_Segment", None)
    one_step = replace(spec, selection=Selection(np.arange(10), 10, "held out"), finite=True)
    assert_same(list(LocalStream(one_step, 0, 1, 0, None)), list(ray_stream.RayStream(one_step, 0, 1, 0, None)))


def test_a_lost_read_worker_is_replaced_and_nothing_is_lost(ray_session: Any, spec: StreamSpec) -> None:
    # Slow enough (small blocks, many of them) that a kill falls into the middle of the reads.
    slow = replace(spec, block_megabytes=0.03)
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.2) and len(killed) < 2:
            for pid in _read_workers():
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break

    thread = threading.Thread(target=kill)
    found = []
    for share in ray_stream.RayStream(slow, 0, 1, 0, 200, cpus=2):
        if share.step == 0:
            thread.start()
        found.append(share)
        time.sleep(0.01)
    ended.set()
    thread.join()
    assert killed, "no read worker was there to kill"
    assert_same(list(LocalStream(slow, 0, 1, 0, 200)), found)


def _read_workers() -> list[int]:
    """Processes of this Ray that run a read task now: they rename themselves after the task."""
    import psutil

    here = psutil.Process()
    found = []
    for process in here.children(recursive=True):
        try:
            if any("ReadSlots" in part for part in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_what_is_read_ahead_leaves_the_training_loop_alone(ray_session: Any, spec: StreamSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all there that may be read ahead, Ray Data's loop turned without a pause, in a thread of the training worker."""
    turned: list[float] = []
    really = ray_stream.Paced.on_execution_step

    def counted(self: Any, executor: Any) -> None:
        turned.append(time.monotonic())
        really(self, executor)

    monkeypatch.setattr(ray_stream.Paced, "on_execution_step", counted)
    with contextlib.closing(iter(ray_stream.RayStream(replace(spec, block_megabytes=2), 0, 1, 0, 100_000, cpus=2))) as shares:
        for _ in range(100):
            next(shares)
        time.sleep(3)  # until nothing more may be read
        begin = time.monotonic()
        time.sleep(3)
        seconds = time.monotonic() - begin
    assert 0 < len([when for when in turned if begin <= when <= begin + seconds]) <= seconds * ray_stream.TURNS_AT_REST + 2


def test_reading_at_full_speed_does_not_wait_for_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop slept a tenth of a second with every block: two cores were busy for 1.1 of 2 s."""
    assert streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S <= 0.1, "this Ray waits elsewhere"
    slept: list[float] = []
    monkeypatch.setattr(ray_stream.time, "sleep", slept.append)
    executor = mock.Mock(_topology=[])
    executor._consumer_idling.side_effect = itertools.chain([False, False], itertools.repeat(True))  # it takes the block after two looks
    paced = ray_stream.Paced()
    paced._last = time.monotonic()
    paced.on_execution_step(executor)
    assert 0 < sum(slept) <= 0.04
    assert streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S < 0.01


def test_read_tasks_give_way_to_training(ray_session: Any, spec: StreamSpec) -> None:
    import psutil

    own = os.getpriority(os.PRIO_PROCESS, 0)
    list(ray_stream.RayStream(replace(spec, block_megabytes=0.03), 0, 1, 0, 20, cpus=2))
    # Readers stay for a while, and what they were set to stays with them.
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.add(process.nice())
    assert ray_stream.READ_NICENESS in found
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


KEPT = """
import os, time
import psutil
from diptych.pipelines.ray_context import ray_session
with ray_session(cpus=1, logical_cpus=1) as ray:
    def read():
        time.sleep(1)
        return os.getpid()
    remote, readers = ray.remote(num_cpus=0.3)(read), set()
    while len(readers) < 2:
        readers |= set(ray.get([remote.remote() for _ in range(3)]))
    time.sleep(5)
    print(sum(psutil.pid_exists(reader) for reader in readers) == len(readers))
"""
AHEAD = """
import time
import psutil
from diptych.pipelines.ray_context import ray_session
with ray_session(cpus=4, logical_cpus=4) as ray:
    time.sleep(5)
    lines = ["".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    print(sum(line.startswith("ray::IDLE") for line in lines))
"""


def _in_a_ray_of_its_own(code: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout.split()[-1]


def test_a_local_ray_begins_no_process_before_there_is_work_for_it() -> None:
    assert _in_a_ray_of_its_own(AHEAD) == "0"


def test_processes_that_read_a_block_are_there_for_the_next_one() -> None:
    """Ray ends what was idle for a second above the number of CPUs, and a new process takes two seconds of a processor to begin."""
    assert _in_a_ray_of_its_own(KEPT) == "True"


def test_a_consumer_that_stops_early_leaves_nothing_running(ray_session: Any, spec: StreamSpec) -> None:
    before = set(_read_workers())  # a read that an earlier test's killed worker made Ray repeat
    iterator = iter(ray_stream.RayStream(replace(spec, block_megabytes=0.03), 0, 1, 0, 100_000, cpus=2))
    next(iterator)
    iterator.close()
    deadline = time.monotonic() + 90
    while set(_read_workers()) - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not set(_read_workers()) - before
