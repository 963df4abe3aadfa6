"""Rows per second and peak memory of `reorder`, beside embedding-dataset-reordering's algorithm with its bugs mended.

    .venv/bin/python benchmarks/reorder.py --rows 100000 1000000 10000000

Made data in clip-retrieval's layout: partitions of a million rows, tars of 10,000 samples with one dead link in a hundred,
two loader workers interleaved, captions and URLs in the metadata as the real thing has. Each measurement is a fresh
process; both sides in turn, medians of `--repeat`; exit status 1 if a goal is missed. The peer's algorithm (per partition:
pandas over the whole metadata, a Python loop over its rows, a list per shard, `np.save`) is written here anew with what it
needs to give a right result at all: widths as given, pandas 2, the dtype kept, trailing gaps filled. It handles images
only, so both are given images only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from _memory import peak_megabytes
from _results import Results, Row, Size, add_option

SHARD, WIDTH, PARTITION, DEAD = 10_000, 4, 1_000_000, 100


def generate(folder: Path, rows: int, dim: int) -> None:
    """`rows` URLs as clip-retrieval's output, float16 [n, dim] per partition."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    random = np.random.default_rng(0)
    pool = random.standard_normal((4096, dim)).astype(np.float16)
    for part, start in enumerate(range(0, rows, PARTITION)):
        urls = np.arange(start, min(start + PARTITION, rows))
        urls = urls[urls % DEAD != DEAD - 1]
        # Two workers take turns by batches of 256, each with its own tar.
        tar = (urls // SHARD) % 2
        turn = np.empty(len(urls), np.int64)
        for worker in (0, 1):
            mine = np.flatnonzero(tar == worker)
            turn[mine] = np.arange(len(mine)) // 256 * 2 + worker
        urls = urls[np.argsort(turn, kind="stable")]
        embeddings = pool[urls % len(pool)]
        embeddings[:, 0] = (urls % 2000).astype(np.float16) + 1  # so that a row tells which sample it is
        np.save(folder / "img_emb" / f"img_emb_{part:02d}.npy", embeddings)
        columns = {
            "image_path": [f"{url:09d}" for url in urls],
            "caption": [f"a photo of thing number {url} on a wooden table" for url in urls],
            "url": [f"https://example.org/images/{url}.jpg" for url in urls],
            "width": np.full(len(urls), 256, np.int32),
            "height": np.full(len(urls), 256, np.int32),
        }
        pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{part:02d}.parquet")


def peer(source: Path, out: Path, rows: int) -> None:
    """The peer's algorithm, mended."""
    (out / "img_emb").mkdir(parents=True)
    for array_file, metadata_file in zip(sorted((source / "img_emb").iterdir()), sorted((source / "metadata").iterdir()), strict=True):
        table = pd.read_parquet(metadata_file)
        table["shard"] = table.image_path.str[:-WIDTH].astype(int)
        table["index"] = table.image_path.str[-WIDTH:].astype(int)
        table["position"] = table.index
        table = table[["position", "shard", "index"]].sort_values(by=["shard", "index"])
        embeddings = np.load(array_file)
        blank = np.zeros(embeddings.shape[1], embeddings.dtype)
        collected: list[np.ndarray] = []
        current = -1

        def save(shard: int, collected: list[np.ndarray], blank: np.ndarray = blank) -> None:
            collected.extend([blank] * (min(SHARD, rows - shard * SHARD) - len(collected)))
            np.save(out / "img_emb" / f"img_emb_{shard:05d}.npy", collected)

        for position, shard, index in zip(table["position"], table["shard"], table["index"], strict=True):
            if shard != current:
                if current >= 0:
                    save(current, collected)
                collected, current = [], shard
            collected.extend([blank] * (index - len(collected)))
            collected.append(embeddings[position])
        save(current, collected)


def ours(source: Path, out: Path, rows: int) -> None:
    """`diptych reorder` without its command line."""
    from diptych.datasets.reorder_index import ShardRows
    from diptych.datasets.reorder_report import reorder_embeddings

    shards = [ShardRows(f"{number:05d}", min(SHARD, rows - number * SHARD)) for number in range(-(-rows // SHARD))]
    samples = np.flatnonzero(np.arange(SHARD) % DEAD != DEAD - 1)
    report = reorder_embeddings(
        str(source), str(out), shards, WIDTH, lambda name: samples if (int(name) + 1) * SHARD <= rows else samples[samples < rows % SHARD]
    )
    assert report.faults_total == 0
    assert report.samples_out == report.samples_in


def check(out: Path, rows: int) -> None:
    """Every row is its own sample's, and every gap is zeros."""
    for number in range(-(-rows // SHARD)):
        found = np.load(out / "img_emb" / f"img_emb_{number:05d}.npy")
        urls = np.arange(number * SHARD, min((number + 1) * SHARD, rows))
        expected = np.where(urls % DEAD == DEAD - 1, 0, urls % 2000 + 1).astype(np.float16)
        assert found.dtype == np.float16, f"shard {number} has another dtype"
        assert np.array_equal(found[:, 0], expected), f"shard {number} is wrong"


def measure(side: str, source: Path, out: Path, rows: int) -> dict[str, float]:
    """One fresh process; its own clock (imports left out) and its peak resident memory."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--side", side, "--source", str(source), "--out", str(out), "--rows", str(rows)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    check(out, rows)
    shutil.rmtree(out)
    return result


def record(results: Results, found: dict[str, list[dict[str, float]]], rows: int, dim: int) -> None:
    """Speed and memory of ours, and of the peer where it was measured."""
    if "ours" not in found:
        return
    case, peer = f"reorder, {rows:,} rows × {dim}", "embedding-dataset-reordering's algorithm, mended" if "peer" in found else None
    rates = {side: [rows / one["seconds"] for one in runs] for side, runs in found.items()}
    peaks = {side: [one["peak_mb"] for one in runs] for side, runs in found.items()}
    size = Size(f"reorder, {dim} columns", "rows", rows, at_most=1.1)
    results.add(Row(case, "rows/s", rates["ours"], peer, rates.get("peer"), at_least=10.0 if peer else None, headline=True, size=size))
    results.add(Row(f"{case}: peak memory", "MB", peaks["ours"], peer, peaks.get("peer"), less=True))


def main() -> None:
    """Generate, measure both sides, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-reorder"))
    parser.add_argument("--only", choices=["ours", "peer"], nargs="+", default=["ours", "peer"])
    parser.add_argument("--side", choices=["ours", "peer"])
    parser.add_argument("--source", type=Path)
    parser.add_argument("--out", type=Path)
    add_option(parser)
    arguments = parser.parse_args()
    if arguments.side:
        run = ours if arguments.side == "ours" else peer
        import diptych.datasets.reorder_report  # noqa: F401 - both clocks start after the imports

        start = time.perf_counter()
        run(arguments.source, arguments.out, arguments.rows[0])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_mb": peak_megabytes()}))
        return
    recorded, results = Results(__file__, arguments.results), []
    for rows in arguments.rows:
        source = arguments.work / f"source-{rows}"
        shutil.rmtree(source, ignore_errors=True)
        generate(source, rows, arguments.dim)
        found: dict[str, list[dict[str, float]]] = {side: [] for side in arguments.only}
        for _ in range(arguments.repeat):
            for side in arguments.only:
                found[side].append(measure(side, source, arguments.work / "out", rows))
        for side, runs in found.items():
            rate = rows / statistics.median(one["seconds"] for one in runs)
            peak = max(one["peak_mb"] for one in runs)
            results.append({"side": side, "rows": rows, "dim": arguments.dim, "rows_per_second": rate, "peak_mb": peak})
            print(f"{side:>5} {rows:>11,} rows × {arguments.dim}  {rate:>12,.0f} rows/s  peak {peak:>7,.0f} MB", flush=True)
        record(recorded, found, rows, arguments.dim)
        shutil.rmtree(source)
    print(json.dumps({"benchmark": "reorder", "results": results}))
    sys.exit(0 if recorded.finish() else 1)


if __name__ == "__main__":
    main()
