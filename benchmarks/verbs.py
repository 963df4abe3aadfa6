"""`index`, `pack` and `ingest` beside webdataset's index, its `ShardWriter` and img2dataset, at several sizes each.

    .venv/bin/python benchmarks/verbs.py OUT --repeat 3

* index: `build_manifest` (keys, captions, byte ranges, picture sizes, faults, digest) beside what `widsindex` computes (checksum and number of
  samples of each tar), over generated scenes of 64². `widsindex` walks tar after tar; here its functions get a process for each core.
* pack: `diptych pack` of a folder of JPEGs with `metadata.csv` beside the loop of webdataset's documentation around `ShardWriter`, which copies bytes and
  looks at none, in a process for each core.
* ingest: `diptych ingest`, which is img2dataset as Ray tasks, beside img2dataset itself with as many processes and threads, from a server of
  Python's standard library on this machine; JPEGs of 128², stored at 128².

Every measurement is a fresh process, whose imports count; sides take turns. No goals are set but that seconds grow no faster than the data.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import http.server
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from _fresh import fresh
from _results import Results, Row, Size, add_option
from scene_shards import write_scenes

CORES = os.cpu_count() or 1
SIZES = {"index": [4000, 16_000, 64_000], "pack": [1000, 4000, 16_000], "ingest": [500, 1500, 4500]}
PEERS = {"index": "widsindex's functions", "pack": "webdataset's ShardWriter", "ingest": "img2dataset"}
PER_SHARD, SIDE, THREADS = 1000, 128, 32


def scenes(out: Path, count: int) -> Path:
    """Tars of `count` scenes: those of the smallest size under as many names as it takes."""
    folder, least = out / f"index-{count}", min(SIZES["index"])
    if not folder.is_dir():
        write_scenes(out / "scenes", least, 64)
        tars = sorted((out / "scenes").glob("*.tar"))
        folder.mkdir()
        for number in range(count // PER_SHARD):
            shutil.copy(tars[number % len(tars)], folder / f"{number:05d}.tar")
    return folder


def pictures(out: Path, count: int) -> Path:
    """`count` JPEGs in a folder with `metadata.csv`."""
    from diptych.datasets.scenes import samples

    folder = out / f"pictures-{count}"
    if not (folder / "metadata.csv").is_file():
        folder.mkdir(exist_ok=True)
        with (folder / "metadata.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "text"])
            for number, sample in enumerate(samples(0, 0, count, SIDE)):
                (folder / f"{number:06d}.jpg").write_bytes(sample["jpg"])
                table.writerow([f"{number:06d}.jpg", sample["txt"]])
    return folder


def our_index(source: Path, out: Path) -> int:
    """Samples indexed."""
    from diptych.datasets.manifest import build_manifest

    return build_manifest(str(source), str(out), jobs=CORES).samples


def peers_index(source: Path, _: Path) -> int:
    """Samples counted."""
    with multiprocessing.get_context("fork").Pool(CORES) as pool:
        return sum(count for _, count in pool.map(_shard_facts, sorted(source.glob("*.tar"))))


def _shard_facts(tar: Path) -> tuple[str, int]:
    from wids import wids

    return wids.compute_file_md5sum(str(tar)), wids.compute_num_samples(str(tar))


def our_pack(source: Path, out: Path) -> int:
    """Samples packed."""
    from diptych.pipelines import pack

    return int(pack.run(str(source), str(out), {"samples_per_shard": PER_SHARD}, jobs=CORES)["samples_out"])


def peers_pack(source: Path, out: Path) -> int:
    """Samples written."""
    with (source / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    out.mkdir()
    parts = [(source, out, part, rows[part::CORES]) for part in range(CORES)]
    with multiprocessing.get_context("fork").Pool(CORES) as pool:
        return sum(pool.starmap(_write, parts))


def _write(source: Path, out: Path, part: int, rows: list[dict[str, str]]) -> int:
    import webdataset as wds

    with wds.ShardWriter(str(out / f"{part}-%05d.tar"), maxcount=PER_SHARD, verbose=0) as writer:
        for row in rows:
            writer.write({"__key__": Path(row["file_name"]).stem, "jpg": (source / row["file_name"]).read_bytes(), "txt": row["text"]})
    return len(rows)


def our_ingest(source: Path, out: Path) -> int:
    """Pictures downloaded."""
    from diptych.pipelines import ingest

    options = {"samples_per_shard": 250, "size": SIDE, "threads": THREADS}
    return int(ingest.run(str(source / "urls.csv"), str(out), options, jobs=CORES)["samples_out"])


def peers_ingest(source: Path, out: Path) -> int:
    """Pictures downloaded."""
    from img2dataset import download

    download(
        url_list=str(source / "urls.csv"), input_format="csv", url_col="url", caption_col="caption", output_format="webdataset",
        output_folder=str(out), image_size=SIDE, number_sample_per_shard=250, processes_count=CORES, thread_count=THREADS,
    )  # fmt: skip
    return sum(json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json"))


VERBS: dict[str, tuple[Callable[[Path, Path], int], Callable[[Path, Path], int]]] = {
    "index": (our_index, peers_index),
    "pack": (our_pack, peers_pack),
    "ingest": (our_ingest, peers_ingest),
}


@contextlib.contextmanager
def served(folder: Path) -> Iterator[None]:
    """`folder` on a port of this machine, with its pictures' addresses in `urls.csv`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "metadata.csv").open(newline="") as file, (folder / "urls.csv").open("w", newline="") as urls:
        table = csv.writer(urls)
        table.writerow(["url", "caption"])
        table.writerows([f"http://127.0.0.1:{port}/{row['file_name']}", row["text"]] for row in csv.DictReader(file))
    command = [sys.executable, __file__, str(folder), "--serve", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            if server.poll() is not None:
                raise SystemExit(f"the server of {folder} ended with {server.returncode}")
            time.sleep(0.05)
        yield
    finally:
        server.terminate()
        server.wait()


def serve(folder: Path, port: int) -> None:
    """Files of `folder`, for ever. The library's own queue of five connections would turn downloaders away."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    http.server.ThreadingHTTPServer.request_queue_size = 1024
    http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


def measured(verb: str, side: str, source: Path, out: Path, count: int) -> float:
    """Seconds of one fresh process, which must have treated every sample."""
    target = out / "target"
    shutil.rmtree(target, ignore_errors=True)
    begin = time.perf_counter()
    found = fresh(__file__, [str(out), "--measure", f"{side}/{verb}", "--source", str(source), "--target", str(target)])
    seconds = time.perf_counter() - begin
    assert found["samples"] == count, f"{verb}, {side}: {found['samples']} of {count} samples"
    return seconds


def compare(verb: str, count: int, options: argparse.Namespace, results: Results) -> None:
    """Both sides in turn at one size."""
    source = scenes(options.out, count) if verb == "index" else pictures(options.out, count)
    runs: dict[str, list[float]] = {"ours": [], "peer": []}
    with served(source) if verb == "ingest" else contextlib.nullcontext():
        for _ in range(options.repeat):
            for side, seconds in runs.items():
                seconds.append(measured(verb, side, source, options.out, count))
    print(f"{verb}, {count:,}: " + ", ".join(f"{side} {min(seconds):.2f} s" for side, seconds in runs.items()), flush=True)
    rates = {side: [count / one for one in seconds] for side, seconds in runs.items()}
    size = Size(verb, "samples", count, at_most=1.1)
    results.add(Row(f"{verb}, {count:,} samples", "samples/s", rates["ours"], PEERS[verb], rates["peer"], size=size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS))
    parser.add_argument("--sizes", type=int, nargs="+", help="instead of the sizes of each verb; multiples of 4,000 for index")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    add_option(parser)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.serve:
        serve(options.out, options.serve)
    if options.measure:
        side, verb = options.measure.split("/")
        print(json.dumps({"samples": VERBS[verb][side == "peer"](options.source, options.target)}))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(__file__, options.results)
    for verb in options.verbs:
        for count in options.sizes or SIZES[verb]:
            compare(verb, count, options, results)
    sys.exit(0 if results.finish() else 1)


if __name__ == "__main__":
    main()
