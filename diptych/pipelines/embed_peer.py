"""`embed --engine clip-retrieval`: clip-retrieval itself, a group of tars at a time, and what it made put into our layout by key.

It runs in a process of its own, with its own readers, on whole tars. Its rows are kept as it wrote them; each is
checked to belong to a sample of its tars, the samples that it left out without a word are named, and only then does the partition count.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.batches import Fault
from diptych.config import ConfigError
from diptych.datasets import embed_layout, folders, storage
from diptych.datasets.embeddings import PREFIXES
from diptych.datasets.manifest import Manifest
from diptych.datasets.survey import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from diptych.pipelines.embed import EmbedOptions

# What the process runs: an architecture that open_clip does not know is added first.
_PROGRAM = """import json, sys
call = json.load(open(sys.argv[1]))
if call["config_file"]:
    import open_clip
    open_clip.add_model_config(call["config_file"])
from clip_retrieval.clip_inference.worker import worker
worker(**call["arguments"])
"""


class ShardLayout(embed_layout.Layout):
    """Partitions of whole tars: `samples` and `partition_size` count tars."""

    def read_outcome(self, partition: int) -> tuple[int, list[dict[str, Any]]]:
        """(rows, faults) of a finished partition."""
        import pyarrow.parquet as pq

        with folders.open_input(self.path("metadata", partition)) as stream:
            rows = pq.read_metadata(stream).num_rows
        return rows, json.loads(storage.read_bytes(self.path("faults", partition)))


@dataclass(frozen=True)
class PeerSpec:
    """What every task needs to know; small and picklable."""

    manifest: Manifest
    layout: ShardLayout
    model: str
    """As clip-retrieval names it."""
    config_file: str
    modalities: tuple[str, ...]
    image_key: str
    batch_size: int
    device: str
    threads: int

    @property
    def samples(self) -> int:
        """Samples of the whole output."""
        return self.manifest.samples


def prepare(shards: str, out: str, options: EmbedOptions) -> PeerSpec:
    """What the tasks of a call need. Raises `ConfigError` where clip-retrieval is missing or cannot do what is asked."""
    from diptych.datasets.manifest import open_manifest
    from diptych.trainers.model_name import parse_model

    if not importlib.util.find_spec("clip_retrieval"):
        raise ConfigError(
            "--engine", "clip-retrieval", "diptych, as clip-retrieval is not installed", "pip install 'diptych[clip-retrieval]'"
        )
    for key, given, reason in (
        ("--modality", "image" not in options.modalities and options.modality, "both or image: it writes keys only with images"),
        ("--keep", bool(options.keep) and ",".join(options.keep), "no keep-lists: it reads whole tars"),
    ):
        if given:
            raise ConfigError(key, given, f"{reason} (--engine clip-retrieval)", "Use --engine diptych.")
    model = parse_model(options.model)
    if model.kind == "sentence" or model.name.startswith(("local-dir:", "hf-hub:")):
        raise ConfigError("--model", options.model, "an open_clip NAME/TAG, a folder of architecture and weights, or a Hugging Face CLIP")
    name = f"open_clip:{model.name}/{model.weights}" if model.kind == "open_clip" else f"hf_clip:{model.name}"
    manifest = open_manifest(shards, options.manifest)
    count, most = len(manifest.shard_names), int(np.diff(manifest.shard_starts).max())
    size = options.partition_size or embed_layout.default_partition_size(manifest.samples)
    layout = ShardLayout(out, count, max(1, math.ceil(size / max(most, 1))))
    threads = options.cpus_per_actor or max(1, (os.cpu_count() or 1) // options.actor_count)
    return PeerSpec(
        manifest, layout, name, model.config_file, options.modalities, _image_key(manifest), options.batch_size, options.device, threads
    )


def _image_key(manifest: Manifest) -> str:
    """The extension of most pictures, as it takes one alone."""
    found = {ext: int((manifest.members(np.arange(manifest.samples), [ext])[2] >= 0).sum()) for ext in IMAGE_EXTENSIONS}
    return max(found, key=lambda ext: found[ext])


class PeerWorker:
    """Runs clip-retrieval on the tars of one partition and takes over what it wrote."""

    def __init__(self, spec: PeerSpec) -> None:
        self.spec = spec

    def compute(self, partition: int) -> int:
        """Make and take over one partition; returns its number."""
        tars = range(*self.spec.layout.span(partition))
        with tempfile.TemporaryDirectory(prefix="diptych-peer-") as scratch:
            self._infer(tars, Path(scratch))
            self._take_over(partition, tars, Path(scratch))
        return partition

    def _infer(self, tars: Sequence[int], scratch: Path) -> None:
        spec = self.spec
        arguments = {
            "tasks": [0], "output_partition_count": 1, "input_format": "webdataset", "output_folder": str(scratch),
            "input_dataset": [spec.manifest.shard_url(number) for number in tars], "batch_size": spec.batch_size,
            # It fails where there are more loaders than tars.
            "num_prepro_workers": min(spec.threads, len(tars)), "clip_model": spec.model, "use_jit": False,
            "enable_image": True, "enable_text": "text" in spec.modalities, "wds_image_key": spec.image_key,
        }  # fmt: skip
        call = scratch / "call.json"
        call.write_text(json.dumps({"config_file": spec.config_file, "arguments": arguments}))
        environment = os.environ | {"OMP_NUM_THREADS": str(spec.threads)} | ({"CUDA_VISIBLE_DEVICES": ""} if spec.device == "cpu" else {})
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(call)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(
                f"clip-retrieval ended with status {done.returncode} on {arguments['input_dataset']}:\n{done.stderr[-2000:]}"
            )

    def _take_over(self, partition: int, tars: Sequence[int], scratch: Path) -> None:
        import pyarrow.parquet as pq

        spec = self.spec
        starts = spec.manifest.shard_starts
        table = spec.manifest.rows(np.arange(starts[tars[0]], starts[tars[-1] + 1]), ["shard", "key"])
        expected = list(
            zip(table["key"].to_pylist(), [spec.manifest.shard_names[number] for number in table["shard"].to_pylist()], strict=True)
        )
        metadata = scratch / "metadata" / "metadata_0.parquet"
        made = pq.read_table(metadata, pre_buffer=False).to_pydict() if metadata.exists() else {"image_path": []}
        vectors = {name: _vectors(scratch, PREFIXES[name], len(made["image_path"])) for name in spec.modalities}
        counts, shard_of = Counter(key for key, _ in expected), dict(expected)
        faults = []
        for key, count in Counter(made["image_path"]).items():
            if count > counts[key]:
                faults.append(Fault(shard_of.get(key, ""), key, "extra_embedding", "clip-retrieval wrote a row of no sample of these tars"))
        # A key that stands in two of the tars cannot be told apart in what it wrote.
        rows = [row for row, key in enumerate(made["image_path"]) if counts[key] == 1]
        present = {made["image_path"][row] for row in rows}
        for key, shard in expected:
            if key not in present:
                reason = "its key stands in several tars" if counts[key] > 1 else "clip-retrieval left it out without a word"
                faults.append(Fault(shard, key, "missing_embedding", reason))
        columns: dict[str, list[str | None]] = {
            "image_path": [made["image_path"][row] for row in rows],
            "caption": [made["caption"][row] for row in rows] if "caption" in made else [None] * len(rows),
            "shard": [shard_of[made["image_path"][row]] for row in rows],
        }
        spec.layout.write(partition, {name: found[rows] for name, found in vectors.items()}, columns, faults)


def _vectors(scratch: Path, prefix: str, rows: int) -> np.ndarray:
    place = scratch / prefix / f"{prefix}_0.npy"
    found = np.load(place, allow_pickle=False) if place.exists() else np.zeros((0, 1), np.float16)
    if len(found) != rows:
        raise RuntimeError(f"clip-retrieval wrote {len(found)} rows to {prefix} and {rows} keys")
    return found
