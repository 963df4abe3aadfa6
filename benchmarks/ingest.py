"""Images per second from the same tars on the same cores: our streams, webdataset's DataLoader, Ray's read_webdataset, mosaicml-streaming, bare decode.

    .venv/bin/python benchmarks/ingest.py --size 512 1024 --shards ../shared/data/pomological/shards --repeat 3 --peers FOLDER

Made data of each `--size`: crops of pictures with the spectrum of natural images (1/f noise, correlated colours), JPEG quality 95 as img2dataset writes
them; then the shards of `--shards`. At equal decode every contender uses Pillow with `draft`; as shipped, webdataset decodes with `decode("pil")` and
resizes, Ray with its own decoder and resizes, ours with `data.decoder=auto`. Ours reads in two ways, whose samples are the same: by read tasks on Ray, as a
command does unless told otherwise, and by as many threads of the worker as there are cores (`cluster.data_cpus=0 cluster.read_threads=N`, "own reading"). mosaicml-streaming reads its own format, whose making is timed beside our
index of the tars; it takes part if it can be imported, also from `--peers FOLDER` (its pins do not go with ours). Every measurement is a fresh process; its clock runs from about a third of
the images to about five sixths of them, so that neither start-up nor what was read ahead counts, and `first` is the time to the first batch.
Of pictures below 1024² three times as many are taken, of `--shards`, which may be small, four times, so that a measurement lasts ten seconds.
Contenders take turns (Ray as it ships, several minutes long, one turn only); medians, with (lowest to highest). `--memory` measures the peak resident memory of a read worker instead. Exit status 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _fresh import add_peers_option, can_import, fresh
from _memory import status_megabytes
from _results import Results, Row, add_option
from PIL import Image

if TYPE_CHECKING:
    from diptych.datasets.stream import StreamSpec

BATCH = 64
LEAST = 4000
"""Images of a measurement: of fewer, the blocks under way when the clock starts and stops are too large a part."""
PAIRS = (
    ("threads", "webdataset", 1.0, "at equal decode, own reading"),
    ("threads", "ray", 2.5, "at equal decode, own reading"),
    ("threads", "mosaic", 1.0, "at equal decode, own reading"),
    ("threads", "bare", 0.85, "at equal decode, own reading"),
    ("tasks", "webdataset", None, "at equal decode"),
    ("tasks", "ray", None, "at equal decode"),
    ("tasks", "mosaic", None, "at equal decode"),
    ("tasks", "bare", None, "at equal decode"),
    ("tasks-shipped", "webdataset-shipped", 2.5, "as shipped"),
    ("tasks-shipped", "ray-shipped", 5.0, "as shipped"),
    ("threads-shipped", "webdataset-shipped", None, "as shipped, own reading"),
)
"""Ours, whom beside, the goal for the ratio, and what the pair have in common. At equal decode the goal is for the faster of our two
ways to read, as shipped for the one that a command takes unless told otherwise."""
MEASURED_ONCE = ("ray-shipped",)
"""Of minutes a turn, and several times slower than its goal allows."""
PEERS = {
    "webdataset": "webdataset's DataLoader",
    "ray": "Ray's read_webdataset",
    "mosaic": "mosaicml-streaming",
    "bare": "bare decode",
}
MEMORY_GOAL = 0.6e9


def generate(folder: Path, images: int, size: int) -> None:
    """Shards of 500 samples."""
    from diptych.datasets.shards import ShardWriter

    random = np.random.default_rng(0)
    pool = [_picture(random, 2 * size) for _ in range(6)]

    def samples() -> Iterator[dict[str, Any]]:
        for number in range(images):
            left, top = random.integers(0, size, 2)
            crop = pool[number % len(pool)].crop((left, top, left + size, top + size))
            file = io.BytesIO()
            crop.save(file, "JPEG", quality=95)
            yield {"jpg": file.getvalue(), "txt": f"picture {number}"}

    ShardWriter(str(folder), samples_per_shard=500).write_all(samples())


def _picture(random: np.random.Generator, side: int) -> Image.Image:
    frequencies = np.fft.fftfreq(side)
    radius = np.hypot(*np.meshgrid(frequencies, frequencies))
    radius[0, 0] = 1

    def layer() -> np.ndarray:
        return np.fft.ifft2(np.exp(2j * np.pi * random.random((side, side))) / radius**1.3).real

    shared = layer()
    colours = np.stack([shared + 0.35 * layer() for _ in range(3)], axis=-1)
    colours = (colours - colours.mean()) / colours.std()
    return Image.fromarray(np.clip(125 + 55 * colours, 0, 255).astype(np.uint8))


def decode_with_draft(data: bytes, target: int) -> np.ndarray:
    """What every contender does at equal decode."""
    picture = Image.open(io.BytesIO(data))
    picture.draft("RGB", (target, target))
    return _resized(picture.convert("RGB"), target)


def _resized(picture: Image.Image, target: int) -> np.ndarray:
    if picture.size != (target, target):
        picture = picture.resize((target, target), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def timed(batches: Iterable[int], images: int) -> dict[str, float]:
    """Rate between about a third of the images and about five sixths of them.

    A contender that reads ahead has decoded some of what it hands over next. That counts for it where the clock starts and against it where
    the clock stops, because it reads ahead there as well. What was read side by side comes together, hundreds of pictures at once, so the clock starts and
    stops with the batch that was waited for the longest, within a twelfth of the images to either side.
    """
    begin = time.perf_counter()
    times, seen = [], []
    for count in batches:
        times.append(time.perf_counter() - begin)
        seen.append(count + (seen[-1] if seen else 0))
    waits = np.diff(times, prepend=0.0)
    marks = []
    for share in (1 / 3, 5 / 6):
        around = np.searchsorted(seen, [images * (share - 1 / 12), images * (share + 1 / 12)])
        marks.append(around[0] + int(np.argmax(waits[slice(*around)])))
    start, stop = marks
    return {"rate": (seen[stop] - seen[start]) / (times[stop] - times[start]), "first": times[0], "images": seen[-1]}


def spec_of(folder: Path, target: int, decoder: str) -> StreamSpec:
    """What both of our streams read."""
    from diptych.batches import ImageNeed, Needs
    from diptych.config import DataConfig
    from diptych.datasets.keep import Selection
    from diptych.datasets.manifest import open_manifest
    from diptych.datasets.reader import SampleSource
    from diptych.datasets.stream import StreamSpec

    manifest = open_manifest(str(folder))
    source = SampleSource.of(manifest, None, DataConfig(decoder=decoder))
    return StreamSpec(source, Selection(None, manifest.samples, manifest.digest), Needs(image=ImageNeed(target)), 0, BATCH)


def tasks(folder: Path, images: int, target: int, cores: int, decoder: str) -> dict[str, float]:
    """One worker's stream from read tasks on `cores`."""
    from diptych.datasets.ray_stream import RayStream
    from diptych.pipelines.ray_context import ray_session

    spec = spec_of(folder, target, decoder)
    with ray_session(cores, logical_cpus=cores):
        stream = RayStream(spec, 0, 1, 0, images // BATCH, cpus=cores)
        result = timed((len(share.arrays["image"]) for share in stream), images)
        return result | {"peak_rss": read_worker_peak()}


def threads(folder: Path, images: int, target: int, cores: int, decoder: str) -> dict[str, float]:
    """One worker's stream, read by `cores` threads of its own."""
    from diptych.datasets.stream import LocalStream

    stream = LocalStream(spec_of(folder, target, decoder), 0, 1, 0, images // BATCH, threads=cores)
    return timed((len(share.arrays["image"]) for share in stream), images)


def read_worker_peak() -> float:
    """Largest resident memory that any of Ray's worker processes has had, in bytes."""
    import psutil

    peaks = [0.0]
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::"):
                peaks.append(1e6 * status_megabytes("VmHWM", process.pid))
        except (psutil.Error, OSError, IndexError, StopIteration):
            continue
    return max(peaks)


def _stack(samples: list[np.ndarray]) -> Any:
    """Batches are made in the loader's workers and cross as shared tensors."""
    import torch

    return torch.from_numpy(np.stack(samples))


def webdataset(folder: Path, images: int, target: int, cores: int, shipped: bool) -> dict[str, float]:
    """webdataset's loader with one worker per core."""
    import webdataset as wds

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = wds.WebDataset(tars, shardshuffle=False, workersplitter=wds.split_by_worker).repeat()
    if shipped:
        dataset = dataset.decode("pil").map(lambda sample: _resized(sample["jpg"], target))
    else:
        dataset = dataset.map(lambda sample: decode_with_draft(sample["jpg"], target))
    loader = wds.WebLoader(dataset.batched(BATCH, collation_fn=_stack), batch_size=None, num_workers=cores, prefetch_factor=4)

    def batches() -> Iterator[int]:
        seen = 0
        for batch in loader:
            yield len(batch)
            seen += len(batch)
            if seen >= images:
                return

    return timed(batches(), images)


def ray_webdataset(folder: Path, images: int, target: int, cores: int, shipped: bool) -> dict[str, float]:
    """`ray.data.read_webdataset`, on the same Ray as ours."""
    from diptych.pipelines.ray_context import ray_session

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    tars *= -(-images // (500 * len(tars)))

    def draft(sample: dict[str, Any]) -> dict[str, Any]:
        return {"jpg": decode_with_draft(sample["jpg"], target)}

    def resize(row: dict[str, Any]) -> dict[str, Any]:
        return {"jpg": _resized(Image.fromarray(row["jpg"]), target)}

    with ray_session(cores, logical_cpus=cores) as ray:
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.read_webdataset(tars, decoder=True if shipped else draft)
        dataset = dataset.map(resize) if shipped else dataset
        loader = dataset.iter_batches(batch_size=BATCH, batch_format="numpy", prefetch_batches=2)
        return timed((len(batch["jpg"]) for batch in loader), images)


def converted(folder: Path) -> Path:
    """Where mosaicml-streaming's copy of `folder` stands."""
    return folder.with_name(folder.name + "-mds")


def preparation(folder: Path, name: str) -> dict[str, float]:
    """Seconds until the tars can be read for the first time: our index, or mosaicml-streaming's copy of them."""
    begin = time.perf_counter()
    if name == "ours":
        from diptych.datasets.manifest import build_manifest

        with tempfile.TemporaryDirectory() as scratch:
            build_manifest(str(folder), scratch, jobs=1)
    else:
        from streaming import MDSWriter

        with MDSWriter(out=str(converted(folder)), columns={"jpg": "bytes", "txt": "str"}, exist_ok=True) as writer:
            for path in sorted(folder.glob("*.tar")):
                with tarfile.open(path) as tar:
                    members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
                for member, data in members.items():
                    if member.endswith(".jpg"):
                        writer.write({"jpg": data, "txt": members[member.removesuffix(".jpg") + ".txt"].decode()})
    return {"seconds": time.perf_counter() - begin}


def mosaic(folder: Path, images: int, target: int, cores: int) -> dict[str, float]:
    """mosaicml-streaming's loader over its own copy, in one epoch that is as long as the measurement."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> np.ndarray:
            return decode_with_draft(super().__getitem__(index)["jpg"], target)

    dataset = Decoded(local=str(converted(folder)), epoch_size=images, batch_size=BATCH, shuffle=False)
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=cores, collate_fn=_stack, prefetch_factor=4)
    return timed((len(batch) for batch in loader), images)


def bare(folder: Path, images: int, target: int, cores: int) -> dict[str, float]:
    """The decoder alone in one plain process per core, on bytes that are in memory already."""
    from diptych.datasets import storage
    from diptych.datasets.manifest import open_manifest

    manifest = open_manifest(str(folder))
    rows = np.arange(min(images, manifest.samples, 500))
    shards, offsets, sizes = manifest.members(rows, ("jpg",))
    url = manifest.shard_url(int(shards[0]))
    data = storage.read_ranges(url, list(zip(offsets.tolist(), sizes.tolist(), strict=True)))
    barrier, results = multiprocessing.Barrier(cores), multiprocessing.SimpleQueue()
    workers = [
        multiprocessing.Process(target=_bare, args=(data[rank::cores], images // cores, target, barrier, results)) for rank in range(cores)
    ]
    for worker in workers:
        worker.start()
    rate = sum(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return {"rate": rate, "first": 0.0, "images": images}


def _bare(data: list[bytes], images: int, target: int, barrier: Any, results: Any) -> None:
    decode_with_draft(data[0], target)
    barrier.wait()
    begin = time.perf_counter()
    for number in range(images):
        decode_with_draft(data[number % len(data)], target)
    results.put(images / (time.perf_counter() - begin))


def measure(name: str, folder: Path, images: int, target: int, cores: int) -> dict[str, float]:
    """One measurement, in this process."""
    if name.startswith("prepare-"):
        return preparation(folder, name.removeprefix("prepare-"))
    shipped = name.endswith("-shipped")
    kind = name.removesuffix("-shipped")
    if kind in ("tasks", "threads"):
        return (tasks if kind == "tasks" else threads)(folder, images, target, cores, "auto" if shipped else "pil")
    if kind == "bare":
        return bare(folder, images, target, cores)
    if kind == "mosaic":
        return mosaic(folder, images, target, cores)
    return (webdataset if kind == "webdataset" else ray_webdataset)(folder, images, target, cores, shipped)


@dataclass(frozen=True)
class Case:
    """Pictures to measure with."""

    name: str
    folder: Path
    """Of the tars."""
    images: int
    """Of a measurement."""


def cases(options: argparse.Namespace, scratch: Path) -> Iterator[Case]:
    """Made pictures of each size, and those of `--shards`."""
    for size in options.size:
        folder = (options.folder or scratch) / f"{size}-{options.images}"
        if not folder.is_dir():
            generate(folder, -(-options.images * 2 // 1500) * 500, size)
        yield Case(f"{size}² JPEG → {options.target}²", folder, options.images * (1 if size >= 1024 else 3))
    if options.shards:
        folder = scratch / options.shards.parent.name
        folder.mkdir()
        for tar in options.shards.glob("*.tar"):  # links, so that nothing is written beside the data
            (folder / tar.name).symlink_to(tar.resolve())
        yield Case(f"{folder.name} → {options.target}²", folder, 4 * options.images)


def measured(name: str, options: argparse.Namespace, case: Case) -> dict[str, float]:
    """One measurement, in a process of its own."""
    words = ["--measure", name, "--folder", str(case.folder), "--images", str(case.images)]
    return fresh(__file__, [*words, "--target", str(options.target), "--cores", str(options.cores)], options.peers)


def compare(options: argparse.Namespace, case: Case, results: Results) -> dict[str, Any]:
    """All contenders in turns; rates and ratios."""
    pairs = list(PAIRS)
    if not can_import("streaming", options.peers):
        print("left out: mosaicml-streaming cannot be imported; --peers FOLDER names where it is installed", file=sys.stderr)
        pairs = [pair for pair in pairs if pair[1] != "mosaic"]
    else:
        prepare(options, case, results)
    if options.only_prepare:
        return {}
    names = list(dict.fromkeys(name for pair in pairs for name in pair[:2]))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(options.repeat):
        for name in names:
            if turn and name in MEASURED_ONCE:
                continue
            runs[name].append(measured(name, options, case))
            print(f"turn {turn + 1}: {name:20} {runs[name][-1]['rate']:7.0f} images/s", file=sys.stderr)
    rates = {name: [run["rate"] for run in found] for name, found in runs.items()}
    print(f"\n{case.name}, {options.cores} cores, median of {options.repeat} (lowest to highest)")
    for name, found in rates.items():
        first = statistics.median(run["first"] for run in runs[name])
        print(
            f"  {name:20} {statistics.median(found):7.0f} images/s  ({min(found):.0f} to {max(found):.0f}), first batch after {first:.1f} s"
        )
    for pair in pairs:
        _record(results, runs, pair, case.name)
    ratios = {f"{one}/{other}": statistics.median(rates[one]) / statistics.median(rates[other]) for one, other, *_ in pairs}
    return {"rates": rates, "ratios": ratios}


def prepare(options: argparse.Namespace, case: Case, results: Results) -> None:
    """Our index and mosaicml-streaming's copy in turns; the last copy is what it reads."""
    seconds: dict[str, list[float]] = {"ours": [], "mosaic": []}
    for _ in range(options.repeat):
        for name, found in seconds.items():
            found.append(measured(f"prepare-{name}", options, case)["seconds"])
    what = f"{case.name}: until the tars can be read, an index beside a copy in its format"
    results.add(Row(what, "s", seconds["ours"], PEERS["mosaic"], seconds["mosaic"], less=True))


def _record(results: Results, runs: dict[str, list[dict[str, float]]], pair: tuple[str, str, float | None, str], case: str) -> None:
    """Rates of a pair of contenders, and their times to the first batch where both have one."""
    one, other, at_least, what = pair
    peer = PEERS[other.removesuffix("-shipped")]
    rates, first = ([[run[key] for run in runs[name]] for name in (one, other)] for key in ("rate", "first"))
    results.add(Row(f"{case}, {what}, beside {peer}", "images/s", rates[0], peer, rates[1], at_least=at_least, headline=True))
    if all(first[1]):
        results.add(Row(f"{case}, {what}, beside {peer}: first batch", "s", first[0], peer, first[1], less=True))


def memory(options: argparse.Namespace, case: Case, results: Results) -> dict[str, Any]:
    """Peak of a read worker."""
    found = measured("tasks-shipped", options, case)
    assert found["peak_rss"] > 0, "no read worker was found"
    results.add(Row(f"{case.name}: peak of a read worker", "GB", [found["peak_rss"] / 1e9], at_most=MEMORY_GOAL / 1e9))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=6000, help=f"images per measurement, {LEAST} or more; the data are two thirds of that"
    )
    parser.add_argument("--size", type=int, nargs="*", default=[512], help="sides of the stored JPEGs, in pixels")
    parser.add_argument("--target", type=int, default=256, help="side of the output, in pixels")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only-prepare", action="store_true", help="measure what comes before reading only")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory of a read worker only")
    parser.add_argument("--shards", type=Path, help="read these tars too, over and over")
    add_peers_option(parser)
    parser.add_argument("--folder", type=Path, help="keep the data here; otherwise a temporary folder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    add_option(parser)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.images, options.target, options.cores)))
        return
    if options.images < LEAST:
        parser.error(f"--images {options.images}: {LEAST} or more; of fewer the blocks under way are too large a part")
    results = Results(__file__, options.results)
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(options, Path(scratch)):
            figures[case.name] = (memory if options.memory else compare)(options, case, results)
    if options.json:
        print(json.dumps(figures))
    sys.exit(0 if results.finish() else 1)


if __name__ == "__main__":
    main()
