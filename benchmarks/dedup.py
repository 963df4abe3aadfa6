"""`dedup` on planted near-duplicates, beside a flat faiss search and beside the image-to-prompt seed's method.

    .venv/bin/python benchmarks/dedup.py --rows 1000000 --only ours      (one measurement per call, if time is short)
    .venv/bin/python benchmarks/dedup.py --rows 1000000

`rows` random unit vectors of `dim`, of which 5 % are near-duplicates of another with cosines evenly from 0.91 to 0.999; threshold
0.9. Each side is a fresh process with two threads.

* ours: k-means, cells, matrix products, exact check of what is doubtful, one kept per group. All rows; recall over all planted pairs,
  and every pair found is checked in float64 from the original vectors.
* flat: faiss IndexFlatIP, 10 neighbours of 20,000 sampled rows (`--sampled`); its time for all rows is extrapolated from that.
* seed: faiss IndexIVFFlat with 5 lists, 20 neighbours, one probe, as the seed has it, for the same sampled rows, likewise extrapolated; it
  drops every member of a near pair, so its loss is counted: samples dropped beyond those that had to go.

With faiss's build for GPUs, and one there, all three use it: ours for k-means and the cells, the peers for all of their search.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _memory import peak_megabytes
from _results import Results, Row, Size, add_option

THRESHOLD = 0.9


def generate(rows: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [rows, dim], int64 [planted, 2]: the pairs that were planted)."""
    random = np.random.default_rng(0)
    copies = rows // 20
    vectors = random.standard_normal((rows, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sources = random.choice(rows - copies, copies, replace=False)
    cosine = random.uniform(0.91, 0.999, (copies, 1)).astype(np.float32)
    noise = random.standard_normal((copies, dim), dtype=np.float32)
    noise -= (noise * vectors[sources]).sum(1, keepdims=True) * vectors[sources]
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    vectors[rows - copies :] = cosine * vectors[sources] + np.sqrt(1 - cosine**2) * noise
    return vectors, np.stack([sources, np.arange(rows - copies, rows)], 1)


def ours(path: Path, planted: np.ndarray, probes: int) -> dict[str, Any]:
    """All of `dedup` but the reading of Parquet and the writing of lists."""
    from diptych.datasets import dedup

    stored = np.load(path)
    start, busy = time.perf_counter(), time.process_time()
    vectors = dedup.Vectors.of(stored, stored)
    cells = dedup.build_cells(vectors, dedup.plan(len(stored), probes), probes)
    built = time.perf_counter() - start
    pairs = dedup.near_pairs(vectors, THRESHOLD, cells)
    kept_for = dedup.representatives(pairs, np.arange(len(stored)))
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    memory = peak_megabytes()
    original = np.load(path, mmap_mode="r")
    lowest = min(
        (cosines(original, pairs.a[i : i + 65536], pairs.b[i : i + 65536]).min() for i in range(0, len(pairs.a), 65536)), default=1.0
    )
    found = np.isin(planted[:, 0] * len(stored) + planted[:, 1], pairs.a * len(stored) + pairs.b)
    return {
        "seconds": seconds, "cpu_seconds": busy, "seconds_cells": built, "cells": len(cells), "probes": probes, "recall": float(found.mean()), "pairs": len(pairs.a),
        "lowest_cosine": float(lowest), "dropped": int((kept_for != np.arange(len(stored))).sum()), "peak_mb": memory,
    }  # fmt: skip


def cosines(vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In float64."""
    left, right = vectors[a].astype(np.float64), vectors[b].astype(np.float64)
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def searched(path: Path, planted: np.ndarray, side: str, sampled: int) -> dict[str, Any]:
    """A faiss index over all rows, asked for the neighbours of sampled rows; half of the sample are planted duplicates."""
    import faiss

    from diptych.datasets.dedup import on_gpus

    vectors = np.load(path)
    rows, dim = vectors.shape
    random = np.random.default_rng(1)
    count = min(sampled, len(planted) * 2, rows // 2)
    ends = planted[random.choice(len(planted), count // 2, replace=False)]
    others = random.choice(rows - len(planted), count // 2, replace=False)
    queries = np.concatenate([ends[:, 1], others])
    start, busy = time.perf_counter(), time.process_time()
    if side == "flat":
        index, neighbours = on_gpus(faiss.IndexFlatIP(dim)), 10
    else:
        quantizer, neighbours = faiss.IndexFlatIP(dim), 20
        index = on_gpus(faiss.IndexIVFFlat(quantizer, dim, 5, faiss.METRIC_INNER_PRODUCT))
        index.train(vectors)
    index.add(vectors)
    built, busy_built = time.perf_counter() - start, time.process_time() - busy
    cosine, found = index.search(vectors[queries], neighbours)
    seconds, busy = time.perf_counter() - start - built, time.process_time() - busy - busy_built
    near = (cosine >= THRESHOLD) & (found != queries[:, None]) & (found >= 0)
    hit = (near[: len(ends)] & (found[: len(ends)] == ends[:, :1])).any(axis=1)
    return {
        "seconds_built": built, "seconds_sampled": seconds, "seconds_all": built + seconds * rows / len(queries), "cpu_seconds_all": busy_built + busy * rows / len(queries), "sampled": len(queries),
        "recall": float(hit.mean()), "peak_mb": peak_megabytes(),
    }  # fmt: skip


def record(results: Results, runs: dict[str, list[dict[str, Any]]], rows: int, dim: int) -> None:
    """Ours alone and beside each peer that was measured."""
    from diptych.datasets.dedup import gpus

    where = ", on a GPU" if gpus() else ""
    case, ours = f"dedup, {rows:,} rows × {dim}{where}", runs.get("ours")
    if not ours:
        return
    seconds, size = [run["seconds"] for run in ours], Size(f"dedup, {dim} columns{where}", "rows", rows)
    for side, name in (("flat", "faiss, every row against every row"), ("seed", "the seed's faiss index of 5 lists")):
        if side in runs:
            theirs = [run["seconds_all"] for run in runs[side]]
            results.add(Row(f"{case}, beside {name}", "s", seconds, name, theirs, less=True, headline=True, size=size))
            recalls = [[run["recall"] for run in found] for found in (ours, runs[side])]
            results.add(Row(f"{case}, beside {name}: recall of planted pairs", "", recalls[0], name, recalls[1]))
    if len(runs) == 1:
        results.add(Row(case, "s", seconds, size=size))
    results.add(Row(f"{case}: recall of planted pairs", "", [run["recall"] for run in ours], at_least=0.99))
    results.add(Row(f"{case}: lowest cosine of a pair found", "", [run["lowest_cosine"] for run in ours], at_least=THRESHOLD))
    results.add(Row(f"{case}: peak memory", "MB", [run["peak_mb"] for run in ours]))


def main() -> None:
    """Generate once, measure each side in a process of its own, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 316_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--probes", type=int, default=6)
    parser.add_argument("--sampled", type=int, default=20_000)
    parser.add_argument("--only", choices=["ours", "flat", "seed"], nargs="+", default=["ours", "flat", "seed"])
    parser.add_argument("--side", choices=["ours", "flat", "seed"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--repeat", type=int, default=1, help="rounds in which the sides take turns; the last one is printed")
    add_option(parser)
    arguments = parser.parse_args()
    if arguments.side:
        planted = np.load(arguments.work / "planted.npy")
        path = arguments.work / "vectors.npy"
        found = (
            ours(path, planted, arguments.probes)
            if arguments.side == "ours"
            else searched(path, planted, arguments.side, arguments.sampled)
        )
        print(json.dumps(found))
        return
    recorded = Results(__file__, arguments.results)
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(prefix="diptych-dedup-") as scratch:
            work = arguments.work / str(rows) if arguments.work else Path(scratch)
            runs = measured(arguments, rows, work)
        record(recorded, runs, rows, arguments.dim)
        last = {side: found[-1] for side, found in runs.items()}
        print(json.dumps({"benchmark": "dedup", "rows": rows, "dim": arguments.dim, "threshold": THRESHOLD, "results": last}))
    sys.exit(0 if recorded.finish() else 1)


def measured(arguments: argparse.Namespace, rows: int, work: Path) -> dict[str, list[dict[str, Any]]]:
    """What each side found in each of its turns, on vectors that are generated once."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "vectors.npy").exists():
        vectors, planted = generate(rows, arguments.dim)
        np.save(work / "planted.npy", planted)
        np.save(work / "vectors.npy", vectors)
        del vectors
    runs: dict[str, list[dict[str, Any]]] = {}
    for side in arguments.only * arguments.repeat:
        command = [sys.executable, __file__, "--side", side, "--work", str(work), "--probes", str(arguments.probes)]
        command += ["--sampled", str(arguments.sampled)]
        environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
        answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        runs.setdefault(side, []).append(json.loads(answer.splitlines()[-1]))
        print(side, json.dumps(runs[side][-1], indent=2), flush=True)
    return runs


if __name__ == "__main__":
    main()
