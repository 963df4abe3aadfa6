"""A run resumed at slot 5·10⁹ of a manifest with 10 million rows: time to the first batch, and memory.

    .venv/bin/python benchmarks/scale.py --rows 10000000 --slot 5000000000

The rows are made, what is read is real: one tar of 1,000 small JPEGs with captions stands under the names of all shards (hard links), and the
manifest gives every one of its places to as many rows of other keys. A keep-list leaves out every fiftieth row, so that the selection is an array of
its own. Two fresh processes then resume: one without Ray, one through Ray Data (its start is not counted).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from _results import Results, Row, add_option
from PIL import Image

BATCH, SHARD = 256, 1000


def generate(folder: Path, rows: int) -> None:
    """Shards and manifest."""
    from diptych.datasets.manifest_writer import ManifestWriter
    from diptych.datasets.shards import ShardWriter
    from diptych.datasets.survey import Survey, key_hash, survey_shard

    def sample(number: int) -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
        return {"jpg": file.getvalue(), "txt": f"picture {number}"}

    ShardWriter(str(folder), samples_per_shard=SHARD).write_all(sample(number) for number in range(SHARD))
    first = folder / "00000.tar"
    survey = survey_shard(str(first), first.name, statistics=False)
    names = [f"{number:05d}.tar" for number in range(rows // SHARD)]
    with ManifestWriter(str(folder / ".diptych")) as writer:
        for number, name in enumerate(names):
            if number:
                os.link(first, folder / name)
            keys = [f"{number:05d}{index:03d}" for index in range(SHARD)]
            table = survey.table.set_column(1, "key", pa.array(keys))
            table = table.set_column(2, "key_hash", pa.array([key_hash(key) for key in keys], pa.uint64()))
            writer.add(Survey(name, survey.bytes, table, [], f"{survey.digest}{number}", {}))
        writer.commit(str(folder))


def resume(folder: Path, slot: int, with_ray: bool) -> dict[str, float]:
    """Everything that a worker does before its first batch; seconds and bytes."""
    import psutil

    from diptych.batches import ImageNeed, Needs
    from diptych.config import DataConfig
    from diptych.datasets.keep import Selection
    from diptych.datasets.manifest import Manifest
    from diptych.datasets.reader import SampleSource
    from diptych.datasets.stream import LocalStream, StreamSpec

    make: Any = LocalStream
    if with_ray:
        import ray

        from diptych.datasets.ray_stream import RayStream

        make = RayStream
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    process = psutil.Process()
    before, begin = process.memory_info().rss, time.perf_counter()
    manifest = Manifest.load(str(folder / ".diptych"))
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    selection = Selection.load(str(folder / "rows.npy"), len(rows), "scale")
    spec = StreamSpec(SampleSource.of(manifest, None, DataConfig()), selection, Needs(image=ImageNeed(64)), 0, BATCH)
    step = slot // BATCH
    shares = iter(make(spec, 0, 1, step, step + 1_000_000))
    share = next(shares)
    seconds = time.perf_counter() - begin
    assert share.arrays["slot"][0] == step * BATCH
    assert np.array_equal(share.arrays["row"], spec.order().rows(share.arrays["slot"]))
    assert share.arrays["image"].std() > 10
    shares.close()
    after = process.memory_info()
    return {"seconds": seconds, "rss": after.rss, "grown": after.rss - before, "mapped": after.shared, "rows": manifest.samples}


def fresh(folder: Path, slot: int, how: str) -> dict[str, float]:
    """`resume` in a process of its own."""
    call = [sys.executable, __file__, "--folder", str(folder), "--slot", str(slot), "--resume", how]
    found = subprocess.run(call, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--slot", type=int, default=5_000_000_000)
    parser.add_argument("--folder", type=Path, help="keep the data here; otherwise a temporary folder")
    parser.add_argument("--resume", choices=["local", "ray"], help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    add_option(parser)
    options = parser.parse_args()
    if options.resume:
        print(json.dumps(resume(options.folder, options.slot, options.resume == "ray")))
        return
    results = Results(__file__, options.results)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not (folder / "rows.npy").is_file():
            begin = time.perf_counter()
            generate(folder, options.rows)
            np.save(folder / "rows.npy", np.flatnonzero(np.arange(options.rows) % 50).astype(np.int64))
            print(f"made {options.rows:,} rows in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        figures = {}
        for how, name in (("local", "without Ray"), ("ray", "through Ray Data")):
            figures[how] = found = fresh(folder, options.slot, how)
            print(
                f"{found['rows']:,} rows, slot {options.slot:,}, {name}: first batch of {BATCH} after {found['seconds']:.2f} s; "
                f"memory {found['rss'] / 1e6:.0f} MB, of which the stream added {found['grown'] / 1e6:.0f} MB"
            )
            case = f"resume, {found['rows']:,} rows, slot {options.slot:,}, {name}"
            results.add(Row(f"{case}: first batch of {BATCH}", "s", [found["seconds"]], headline=True))
            results.add(Row(f"{case}: memory that the stream adds", "MB", [found["grown"] / 1e6]))
        results.finish()
        if options.json:
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
