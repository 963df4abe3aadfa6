"""Seconds until the batch at slot k is there again, in a fresh process: our stream, webdataset skipping, torchdata's StatefulDataLoader.

    .venv/bin/python benchmarks/resume.py OUT --slots 2048 8192 32768 --peers FOLDER

Shards of generated scenes, batches of 64, no Ray, no loader processes, manifest and files known to the machine. Ours computes what stands at the slot
and reads that. webdataset has no place to go on from: the fastest way that it offers is to skip raw samples before they are decoded, which reads
every tar up to there. StatefulDataLoader is given the state that it saved at the slot and replays the samples before it, decoded. It
takes part if it can be imported, also from `--peers FOLDER`. Each side checks that the batch is the right one. Exit status 1 if our seconds grow with the slot.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _fresh import add_peers_option, can_import, fresh
from _results import Results, Row, Size, add_option
from PIL import Image
from scene_shards import write_scenes

BATCH, SIDE = 64, 64
PEERS = {"webdataset": "webdataset, raw samples skipped", "stateful": "torchdata's StatefulDataLoader"}


def ours(folder: Path, slot: int) -> float:
    """Everything that a worker's stream does before its first batch."""
    from diptych.batches import ImageNeed, Needs
    from diptych.config import DataConfig
    from diptych.datasets.keep import Selection
    from diptych.datasets.manifest import open_manifest
    from diptych.datasets.reader import SampleSource
    from diptych.datasets.stream import LocalStream, StreamSpec

    begin = time.perf_counter()
    manifest = open_manifest(str(folder))
    source = SampleSource.of(manifest, None, DataConfig(decoder="pil"))
    spec = StreamSpec(source, Selection(None, manifest.samples, manifest.digest), Needs(image=ImageNeed(SIDE)), 0, BATCH)
    shares = iter(LocalStream(spec, 0, 1, slot // BATCH, 1 << 40))
    share = next(shares)
    seconds = time.perf_counter() - begin
    shares.close()  # type: ignore[attr-defined]
    assert np.array_equal(share.arrays["row"], spec.order().rows(np.arange(slot, slot + BATCH)))
    return seconds


def _decoded(sample: dict[str, Any]) -> tuple[str, np.ndarray]:
    return sample["__key__"], np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))


def _shards(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar"))


def _check(keys: list[str], folder: Path, slot: int) -> None:
    """These peers read in the order of the tars, over and over."""
    from diptych.datasets.manifest import open_manifest

    manifest = open_manifest(str(folder))
    rows = np.arange(slot, slot + BATCH) % manifest.samples
    assert keys == manifest.rows(rows, ["key"])["key"].to_pylist()


def webdataset(folder: Path, slot: int) -> float:
    """Skips before it decodes."""
    import webdataset as wds

    begin = time.perf_counter()
    raw = iter(wds.WebDataset(_shards(folder), shardshuffle=False).repeat())
    found = [_decoded(sample) for sample in itertools.islice(raw, slot, slot + BATCH)]
    seconds = time.perf_counter() - begin
    _check([key for key, _ in found], folder, slot)
    return seconds


def stateful(folder: Path, slot: int) -> float:
    """Goes on from the state that it saved at the slot; to come there the first time is not counted."""
    import webdataset as wds
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        dataset = wds.WebDataset(_shards(folder), shardshuffle=False).repeat().map(_decoded)
        return StatefulDataLoader(dataset, batch_size=BATCH, collate_fn=list)

    first = loader()
    for _ in itertools.islice(first, slot // BATCH):
        pass
    state = first.state_dict()
    begin = time.perf_counter()
    again = loader()
    again.load_state_dict(state)
    batches: Iterator[Any] = iter(again)
    found = next(batches)
    seconds = time.perf_counter() - begin
    _check([key for key, _ in found], folder, slot)
    return seconds


SIDES = {"ours": ours, "webdataset": webdataset, "stateful": stateful}


def measured(side: str, slot: int, options: argparse.Namespace) -> float:
    """One measurement, in a process of its own; ours in its own environment, not with what the peers' folder holds of the same libraries."""
    peers = None if side == "ours" else options.peers
    return float(fresh(__file__, [str(options.out), "--side", side, "--slots", str(slot)], peers)["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--slots", type=int, nargs="+", default=[2048, 8192, 32_768])
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=3)
    add_peers_option(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    add_option(parser)
    options = parser.parse_args()
    folder = options.out / "shards"
    if options.side:
        print(json.dumps({"seconds": SIDES[options.side](folder, options.slots[0])}))
        return
    assert all(slot % BATCH == 0 for slot in options.slots), f"slots are multiples of {BATCH}"
    sides = list(SIDES)
    if not can_import("torchdata", options.peers):
        print("left out: torchdata cannot be imported; --peers FOLDER names where it is installed", file=sys.stderr)
        sides.remove("stateful")
    write_scenes(folder, options.scenes, SIDE)
    measured("ours", 0, options)  # builds the manifest
    results = Results(__file__, options.results)
    for slot in options.slots:
        runs: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.repeat):
            for side in sides:
                runs[side].append(measured(side, slot, options))
        print(f"slot {slot:,}: " + ", ".join(f"{side} {min(seconds):.3f} s" for side, seconds in runs.items()), flush=True)
        # Constant up to what opening files and threads takes from one time to another.
        size = Size("resume", "slots", slot, at_most=0.15)
        for side in sides[1:]:
            what = f"resume at slot {slot:,}: first batch of {BATCH}, beside {PEERS[side]}"
            headline = slot == max(options.slots)
            results.add(Row(what, "s", runs["ours"], PEERS[side], runs[side], less=True, headline=headline, size=size))
    sys.exit(0 if results.finish() else 1)


if __name__ == "__main__":
    main()
