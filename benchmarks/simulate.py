"""Five thousand million samples, by simulation: what grows is measured at three sizes and extrapolated, what is counted is counted with the real code.

    .venv/bin/python benchmarks/simulate.py OUT --rows 1000000 3000000 10000000 --samples 5000000000

* manifest: tars of 10,000 samples are written by the indexer, each with keys of its own; seconds, bytes and peak memory at each of `--rows`, and what they come to at
  `--samples` in proportion (memory: on a straight line); the fitted exponents say whether that is fair. One tar is walked `WALKS` times; how walking grows, `verbs.py` measures.
  Memory is that which is private: what is mapped of files is page cache. The pieces of which the indexer takes a manifest are made smaller than the smallest of `--rows`, and
  selections are bitmaps, as large ones are, so that only what really grows is carried on.
* order: the order of an epoch at a hundredth, a tenth and all of `--samples`, made anew as by a worker that resumes; seconds and memory, for each `--chunk`.
* cluster: 256 workers take steps of 16,384 samples from pictures of 20 to 60 kB in an object store, through 64 readers. Plans, order, coalescing of
  ranges and read tasks are those of `diptych train`; only the bytes are made up. Requests, bytes and the blocks that cross the network are counted.
* dedup: cells and comparisons per vector that `dedup` would plan, and the bytes of the vectors.

Every measurement is a fresh process. Exit status 1 if an exponent is above its goal, or the workers' shares are not each sample once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from _memory import PrivateMemory, peak_megabytes
from _results import Results, Row, Size, add_option

if TYPE_CHECKING:
    from diptych.datasets.survey import Survey

SHARD, STRIDE, SIDE, BATCH, WORKERS, READERS, BUCKET = 10_000, 1 << 16, 256, 16_384, 256, 64, "s3://bucket/shards"
WALKS, PIECE = 25, 1 << 16
LINEAR = 1.15
"""Goal for exponents of what should be linear; caches and fixed costs leave some room."""


def manifest(out: Path, rows: int) -> dict[str, float]:
    """Walk a tar, write a manifest of `rows` samples and open it."""
    from diptych.datasets import keep, manifest_writer
    from diptych.datasets.manifest import Manifest
    from diptych.datasets.survey import survey_shard

    tar = a_tar(out, min(SHARD, rows))
    begin = time.perf_counter()
    surveys = [survey_shard(str(tar), "000000.tar", statistics=False) for _ in range(WALKS)]
    walked = time.perf_counter() - begin
    manifest_writer.CHUNK_ROWS = keep.CHUNK_ROWS = manifest_writer.HASHES_AT_ONCE = PIECE
    keep.ARRAY_BYTES = 0
    folder, written = out / f"manifest-{rows}-{os.getpid()}", 0.0
    with PrivateMemory() as building, manifest_writer.ManifestWriter(str(folder)) as writer:
        for number in range(rows // surveys[0].table.num_rows):
            survey = renamed(surveys[0], number)
            begin = time.perf_counter()
            writer.add(survey)
            written += time.perf_counter() - begin
        begin = time.perf_counter()
        writer.commit(str(tar.parent))
        committed = time.perf_counter() - begin
    with PrivateMemory() as splitting:
        begin = time.perf_counter()
        opened = Manifest.load(str(folder))
        loaded = time.perf_counter() - begin
        begin = time.perf_counter()
        train, _ = keep.select(opened, (), 0.01, 0)
        selected = time.perf_counter() - begin
    assert opened.samples == rows
    assert 0.98 * rows < train.samples < rows
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "walk": walked, "write": written, "commit": committed, "open": loaded, "select": selected, "bytes": size, "walked": WALKS * surveys[0].table.num_rows,
        "columns": sum(path.stat().st_size for path in folder.rglob("*.bin")), "peak_mb": building.peak, "split_mb": splitting.peak,
    }  # fmt: skip


def a_tar(out: Path, samples: int) -> Path:
    """A tar of small pictures with captions."""
    from PIL import Image

    from diptych.datasets.shards import ShardWriter

    file, tar = io.BytesIO(), out / "one" / "00000.tar"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(file, "JPEG")
    if not tar.is_file():
        captions = ({"jpg": file.getvalue(), "txt": f"a photo of thing number {n} on a wooden table"} for n in range(samples))
        ShardWriter(str(tar.parent), samples_per_shard=samples).write_all(captions)
    return tar


def renamed(survey: Survey, number: int) -> Survey:
    """The same as that of shard `number`, with keys of its own."""
    import pyarrow as pa

    from diptych.datasets.survey import Survey, key_hash

    keys = [f"{number:06d}{index:04d}" for index in range(survey.table.num_rows)]
    table = survey.table.set_column(1, "key", pa.array(keys))
    table = table.set_column(2, "key_hash", pa.array([key_hash(key) for key in keys], pa.uint64()))
    return Survey(f"{number:06d}.tar", survey.bytes, table, [], f"{survey.digest}{number}", {})


def starts(samples: int) -> np.ndarray:
    """First row of every shard."""
    return np.minimum(np.arange(-(-samples // SHARD) + 1, dtype=np.int64) * SHARD, samples)


def order(samples: int, chunk: int) -> dict[str, float]:
    """What a worker does to know the rows of a step in the middle of an epoch far away."""
    from diptych.datasets.keep import Selection
    from diptych.datasets.order import Order

    shards = starts(samples)
    before = peak_megabytes()
    begin = time.perf_counter()
    made = Order(Selection(None, samples, "simulated"), shards, 0, chunk=chunk)
    slots = 7 * samples + samples // 2 + np.arange(BATCH)
    rows = made.rows(slots)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    made.rows(slots + BATCH)
    assert len(np.unique(rows)) == BATCH
    return {"first": first, "next": time.perf_counter() - begin, "peak_mb": peak_megabytes() - before}


class Traffic:
    """Stands for the object store: counts the ranged reads that the real reader asks for, and answers with zeros."""

    def __init__(self) -> None:
        self.requests = self.bytes = 0
        self._lock = threading.Lock()

    def read_range(self, url: str, offset: int, size: int, retries: int = 0) -> bytes:
        """In the place of `ranged.read_range`."""
        with self._lock:
            self.requests += 1
            self.bytes += size
        return bytes(size)


class Shards:
    """Stands for the manifest of tars that nobody made: picture i of a shard begins at i · 64 kB."""

    root = BUCKET

    def __init__(self, samples: int) -> None:
        self.shard_starts, self.samples = starts(samples), samples

    def shard_url(self, shard: int) -> str:
        """Where a shard would lie."""
        return f"{BUCKET}/{shard:06d}.tar"

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard, offset, size) of each row's picture."""
        from diptych.datasets import draws

        return rows // SHARD, rows % SHARD * STRIDE, 20_000 + draws.below(1, rows, 40_001)


def cluster(samples: int, chunk: int, steps: int) -> dict[str, float]:
    """Every block of every worker for some steps in the middle of an epoch, read by readers in turn."""
    from ray import cloudpickle

    from diptych.batches import ImageNeed, Needs
    from diptych.config import DataConfig
    from diptych.datasets import ranged, reader
    from diptych.datasets.keep import Selection
    from diptych.datasets.ray_stream import SlotsDatasource
    from diptych.datasets.stream import Plan, StreamSpec

    shards, traffic = Shards(samples), Traffic()
    reader._open = lambda _: reader.OpenSource(shards, None)  # type: ignore[assignment,arg-type]
    ranged.read_range = traffic.read_range
    source = reader.SampleSource("s3://bucket/manifest", BUCKET, retries=DataConfig().read_retries, decoder="opencv", digest="0" * 64)
    spec = StreamSpec(source, Selection(None, samples, "simulated"), Needs(image=ImageNeed(SIDE)), 0, BATCH, shuffle_chunk=chunk)
    shared = spec.order()
    StreamSpec.order = lambda _: shared  # type: ignore[method-assign]  # one process is all workers
    first = samples // 2 // BATCH
    plans = [Plan(spec, rank, WORKERS, first, first + steps) for rank in range(WORKERS)]
    wanted, blocks, task_bytes, decoded = [], 0, 0, 0
    per_reader = np.zeros(READERS, np.int64)
    shards_of_step: set[int] = set()
    needed = 0
    for plan in plans:
        tasks = SlotsDatasource(plan, 0, plan.blocks).get_read_tasks(plan.blocks)
        task_bytes += sum(len(cloudpickle.dumps(task)) for task in tasks)
        for number in range(plan.blocks):
            block = plan.block(number)
            places = reader._Places(*shards.places(block.rows))
            by_place = np.lexsort((places.offsets, places.shards))
            for part in reader._parts(by_place, places.sizes):
                before = traffic.bytes
                for _ in reader._read_members(shards, part, places, 0):  # type: ignore[arg-type]
                    pass
                per_reader[blocks % READERS] += traffic.bytes - before
            wanted.append(block.wanted)
            needed += int(places.sizes.sum())
            decoded += len(block.wanted) * 3 * SIDE**2
            blocks += 1
            shards_of_step.update(places.shards[block.wanted < (first + 1) * BATCH].tolist())
    everything = np.sort(np.concatenate(wanted))
    count = steps * BATCH
    return {
        "once": bool(np.array_equal(everything, first * BATCH + np.arange(count))), "requests": traffic.requests / count,
        "read_over_needed": traffic.bytes / needed, "read": traffic.bytes / count, "decoded": decoded / count, "tasks": blocks / steps,
        "task_bytes": task_bytes / count, "shards_of_a_step": len(shards_of_step), "busiest_over_mean": per_reader.max() / per_reader.mean(),
    }  # fmt: skip


def dedup(samples: int, dim: int = 384, probes: int = 6) -> dict[str, float]:
    """What `dedup` would plan."""
    from diptych.datasets.dedup import plan

    cells = plan(samples, probes)
    return {"cells": cells, "products": cells + probes * probes * samples / cells, "bytes": 2.0 * samples * dim}


def fresh(out: Path, *words: object) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, str(out), "--measure", *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if found.returncode:
        sys.stderr.write(found.stderr[-4000:])
        raise SystemExit(f"{' '.join(command)} ended with {found.returncode}")
    return json.loads(found.stdout.splitlines()[-1])


def record_manifest(options: argparse.Namespace, results: Results) -> None:
    """Growth over `--rows`, and what it comes to at `--samples`."""
    found = {rows: [fresh(options.out, "manifest", rows) for _ in range(options.repeat)] for rows in sorted(options.rows)}
    labels = {
        "write": "writing the rows", "commit": "faults of the whole and the commit", "open": "opening it", "select": "splitting off validation",
    }  # fmt: skip
    walks = [run for runs in found.values() for run in runs]
    walked = int(walks[0]["walked"])
    seconds = statistics.median(run["walk"] for run in walks) * options.samples / walked
    results.add(Row(f"walking the tars of {walked:,} samples", "s", [run["walk"] for run in walks], less=True))
    case = f"{options.samples:,} samples, in proportion to {walked:,}: walking the tars"
    results.add(Row(case, "s", [seconds], less=True))
    results.add(Row(f"{case} by {READERS} processes", "h", [seconds / 3600 / READERS], less=True, headline=True))
    sizes = {"bytes": ("size of the manifest", "B"), "columns": ("what every node maps of it", "B"), "peak_mb": ("peak memory of the indexer", "MB"), "split_mb": ("peak memory after the split", "MB")}  # fmt: skip
    for key, label in labels.items():
        for rows, runs in found.items():
            size = Size(f"manifest: {label}", "samples", rows, at_most=LINEAR)
            results.add(Row(f"manifest of {rows:,} samples: {label}", "s", [run[key] for run in runs], less=True, size=size))
    for key, (label, unit) in sizes.items():
        for rows, runs in found.items():
            results.add(Row(f"manifest of {rows:,} samples: {label}", unit, [run[key] for run in runs], less=True))
    for key, label, unit in [*((key, label, "s") for key, label in labels.items()), *((key, *pair) for key, pair in sizes.items())]:
        points = [(rows, statistics.median(run[key] for run in runs)) for rows, runs in found.items()]
        if unit == "MB":  # most of it is there without a row
            line = statistics.linear_regression([size for size, _ in points], [value for _, value in points])
            value, how = max(points[-1][1], line.intercept + line.slope * options.samples), "on a straight line"
        else:
            value, how = points[-1][1] * options.samples / points[-1][0], f"in proportion to {points[-1][0]:,}"
        case = f"{options.samples:,} samples, {how}"
        results.add(Row(f"{case}: {label}", unit, [value], less=True, headline=key in ("bytes", "peak_mb")))


def record_order(options: argparse.Namespace, results: Results) -> None:
    """Seconds and memory of the first step after a resume."""
    for chunk in options.chunk:
        for samples in (options.samples // 100, options.samples // 10, options.samples):
            runs = [fresh(options.out, "order", samples, chunk) for _ in range(options.repeat)]
            case = f"order of {samples:,} samples, data.shuffle_chunk={chunk}"
            size = Size(f"resume, data.shuffle_chunk={chunk}", "samples", samples, at_most=LINEAR)
            results.add(Row(f"{case}: first step after a resume", "s", [run["first"] for run in runs], less=True, size=size))
            results.add(Row(f"{case}: a step of the same epoch", "s", [run["next"] for run in runs], less=True))
            results.add(Row(f"{case}: memory of a worker", "MB", [run["peak_mb"] for run in runs], less=True))


def record_cluster(options: argparse.Namespace, results: Results) -> None:
    """Traffic per sample; counts, so once is enough."""
    labels = {
        "requests": ("ranged requests per sample", ""), "read_over_needed": ("bytes read over bytes of pictures", "×"),
        "read": ("bytes from the object store per sample", "B"), "decoded": ("decoded bytes to a worker per sample", "B"),
        "tasks": ("read tasks per step", ""), "task_bytes": ("bytes of task descriptions per sample", "B"),
        "shards_of_a_step": ("shards that a step touches", ""), "busiest_over_mean": ("bytes of the busiest reader over the mean", "×"),
    }  # fmt: skip
    for chunk in options.chunk:
        found = fresh(options.out, "cluster", options.samples, chunk, options.steps)
        case = f"{WORKERS} workers, {READERS} readers, {options.samples:,} samples, data.shuffle_chunk={chunk}"
        results.check(f"{case}: every sample of {options.steps} steps is read once", bool(found["once"]))
        for key, (label, unit) in labels.items():
            results.add(Row(f"{case}: {label}", unit, [found[key]], less=True, headline=key == "read_over_needed"))


def record_dedup(options: argparse.Namespace, results: Results) -> None:
    """Counts."""
    for samples in (options.samples // 5000, options.samples):
        found = dedup(samples)
        for key, label, unit in (("cells", "cells", ""), ("products", "comparisons per vector", ""), ("bytes", "vectors in memory", "B")):
            results.add(Row(f"dedup of {samples:,} samples × 384: {label}", unit, [found[key]], less=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000], help="multiples of 10,000")
    parser.add_argument("--samples", type=int, default=5_000_000_000)
    parser.add_argument("--chunk", type=int, nargs="+", default=[32, 1024], help="data.shuffle_chunk")
    parser.add_argument("--steps", type=int, default=5, help="of the simulated cluster")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", choices=["manifest", "order", "cluster", "dedup"], default=["manifest", "order", "cluster", "dedup"]
    )
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    add_option(parser)
    options = parser.parse_args()
    if options.measure:
        name, *numbers = options.measure[0], *map(int, options.measure[1:])
        measured = {
            "manifest": lambda: manifest(options.out, *numbers),
            "order": lambda: order(*numbers),
            "cluster": lambda: cluster(*numbers),
        }
        print(json.dumps(measured[name]()))
        return
    results = Results(__file__, options.results)
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"manifest": record_manifest, "order": record_order, "cluster": record_cluster, "dedup": record_dedup}
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        options.out = Path(scratch)
        for name in options.only:
            record[name](options, results)
            print(f"{name}: done", file=sys.stderr, flush=True)
    sys.exit(0 if results.finish() else 1)


if __name__ == "__main__":
    main()
