"""Images per second of `embed`, beside clip-retrieval on the same tars and cores, and beside the bare forward pass.

    .venv/bin/python benchmarks/embed.py ../shared/data/pomological

Two comparisons, sides in turn, medians of `--repeat`:

* peer: `diptych embed` and clip-retrieval 2.45, each as a process of its own from start to end, both modalities, the same
  open_clip model (FOLDER/tiny_clip), tars (FOLDER/shards), batch size and cores. clip-retrieval runs in fp32 with two loader workers, the most that
  helped; `embed` as it ships. What both wrote is compared by key. The tars are embedded `--times` over, under keys of their own,
  because starting up takes longer than these 7,501 pictures.
* forward: one actor's work on a ViT with random weights (reading, decoding, resizing, forward) against the same model on ready pixels,
  in the same process, precision and threads.

On a GPU, where the peer takes the card by itself, both comparisons are of the ViT, with one loader worker of the peer's per thread:

    .venv/bin/python benchmarks/embed.py ../shared/data/pomological --gpus 1 --vit ViT-L-14 --threads 16
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _results import Results, Row, Size, add_option

_PEER = """import json, sys, open_clip
call = json.load(open(sys.argv[1]))
open_clip.add_model_config(call.pop("config_file"))
from clip_retrieval.clip_inference.main import main
main(**call)
"""


@dataclass(frozen=True)
class Setting:
    """What both sides embed with."""

    model: Path
    """Folder with weights and their configuration, as open_clip publishes them."""
    name: str
    batch: int
    threads: int
    gpus: float

    @property
    def where(self) -> str:
        """For the names of rows."""
        return ", one GPU" if self.gpus else ""


def embed_ours(source: Path, out: Path, setting: Setting) -> None:
    """`diptych embed` from the command line."""
    command = [sys.executable, "-m", "diptych.pipelines.embed", str(source / "shards"), str(out), "--model", str(setting.model)]
    command += ["--batch-size", str(setting.batch)]
    if setting.gpus:
        command += ["--gpus-per-actor", str(setting.gpus), "--cpus-per-actor", str(setting.threads)]
    subprocess.run(command, check=True, capture_output=True)


def embed_peer(source: Path, out: Path, setting: Setting) -> None:
    """clip-retrieval's own `main`, on the same tars."""
    out.mkdir(parents=True)
    weights = next(setting.model.glob("*.safetensors"))
    tars = sorted((source / "shards").glob("*.tar"))
    call = {
        "config_file": str(weights.with_suffix(".json")), "clip_model": f"open_clip:{weights.stem}/{weights}", "input_format": "webdataset",
        "input_dataset": f"{source / 'shards'}/{{{tars[0].stem}..{tars[-1].stem}}}.tar", "output_folder": str(out), "batch_size": setting.batch,
        "num_prepro_workers": setting.threads, "enable_metadata": False, "wds_number_file_per_input_file": 1000,
    }  # fmt: skip
    (out / "call.json").write_text(json.dumps(call))
    subprocess.run([sys.executable, "-c", _PEER, str(out / "call.json")], check=True, capture_output=True)


def repeated(source: Path, folder: Path, times: int) -> Path:
    """A folder like `source` whose tars stand there `times` times, under shard numbers and keys of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "shards").mkdir(parents=True)
    tars = sorted((source / "shards").glob("*.tar"))
    for number in range(times * len(tars)):
        with tarfile.open(tars[number % len(tars)]) as read, tarfile.open(folder / "shards" / f"{number:05d}.tar", "w") as written:
            for member in read:
                member.name = f"{number:05d}{member.name[5:]}"
                written.addfile(member, read.extractfile(member))
    return folder


def compare(source: Path, work: Path, setting: Setting, repeat: int) -> dict[str, Any]:
    """Seconds of each side, their ratio, and how far their embeddings are apart."""
    from diptych.datasets.embeddings import join
    from diptych.datasets.manifest import open_manifest

    manifest = open_manifest(str(source / "shards"), str(work / "manifest"))
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(repeat):
        for side, run in (("ours", embed_ours), ("peer", embed_peer)):
            out = work / side
            shutil.rmtree(out, ignore_errors=True)
            started = time.perf_counter()
            run(source, out, setting)
            seconds[side].append(time.perf_counter() - started)
            print(f"{side:>5} turn {turn}: {seconds[side][-1]:.1f} s, {manifest.samples / seconds[side][-1]:.1f} images/s", flush=True)
    ours, peer = (join(manifest, str(work / side)) for side in ("ours", "peer"))
    rows = np.arange(manifest.samples)
    cosines = [float((ours.read(rows, name)[0] * peer.read(rows, name)[0]).sum(axis=1).min()) for name in ("image", "text")]
    median = {side: statistics.median(found) for side, found in seconds.items()}
    return {
        "samples": manifest.samples, "seconds": median, "images_per_second": {side: manifest.samples / value for side, value in median.items()},
        "seconds_of_turns": seconds, "ratio": median["peer"] / median["ours"], "joined": [ours.matched, peer.matched], "lowest_cosine": dict(zip(("image", "text"), cosines, strict=True)),
    }  # fmt: skip


def save_vit(folder: Path, name: str) -> Path:
    """A ViT of open_clip's with random weights, as a folder that `embed` takes."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stem = f"fresh-{name}"
    if not (folder / f"{stem}.json").exists():
        torch.manual_seed(0)
        model = open_clip.create_model(name)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / f"{stem}.safetensors")
        (folder / f"{stem}.json").write_text(json.dumps(open_clip.get_model_config(name)))
    return folder


def forward(source: Path, work: Path, setting: Setting, count: int, repeat: int) -> dict[str, Any]:
    """Images per second of an actor on `count` pictures and of the bare model on as many ready ones."""
    from diptych.pipelines import embed
    from diptych.pipelines.embed_worker import EmbedWork, EmbedWorker

    batch = setting.batch
    options = embed.EmbedOptions(
        model=str(setting.model),
        modality="image",
        batch_size=batch,
        cpus_per_actor=setting.threads,
        gpus_per_actor=setting.gpus,
        manifest=str(work / "manifest"),
    )
    worker = EmbedWorker(embed.prepare(str(source / "shards"), str(work / "vit-out"), options))
    assert isinstance(worker.work, EmbedWork)
    rows = np.arange(count)
    pieces = [rows[first : first + batch] for first in range(0, count, batch)]
    ready = [stack.pixels for found in worker._ahead(pieces) for stack in found.stacks or ()]
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    for turn in range(repeat + 1):
        started = time.perf_counter()
        for pixels in ready:
            worker.work.embedder.images(pixels)
        between = time.perf_counter()
        done = sum(len(found.rows) for found, _ in worker.embed(rows))
        assert done == count, f"{count - done} pictures could not be read"
        if turn:  # the first one warms up
            seconds["bare"].append(between - started)
            seconds["ours"].append(time.perf_counter() - between)
    rates = {side: count / statistics.median(found) for side, found in seconds.items()}
    precision = worker.work.embedder.precision.name
    return {
        "seconds_of_turns": seconds,
        "count": count,
        "images_per_second": rates,
        "ratio": rates["ours"] / rates["bare"],
        "precision": precision,
        "threads": setting.threads,
        "batch": batch,
    }


def record(recorded: Results, found: dict[str, Any], setting: Setting) -> None:
    """One comparison with the peer."""
    rates = {side: [found["samples"] / value for value in values] for side, values in found["seconds_of_turns"].items()}
    name = f"embed, {found['samples']:,} pictures and captions, {setting.name}{setting.where}, start to end"
    size = Size(f"embed, {setting.name}{setting.where}", "samples", found["samples"], 1.1)
    recorded.add(Row(name, "images/s", rates["ours"], "clip-retrieval 2.45", rates["peer"], at_least=2.0, headline=True, size=size))


def record_forward(recorded: Results, found: dict[str, Any], setting: Setting) -> None:
    """The comparison with the bare model."""
    rates = {side: [found["count"] / value for value in values] for side, values in found["seconds_of_turns"].items()}
    name = f"embed, {setting.name} on {found['count']:,} pictures, {found['precision']}, {found['threads']} threads{setting.where}, decoding included"
    recorded.add(Row(name, "images/s", rates["ours"], "the forward pass on ready pixels", rates["bare"], at_least=0.85, headline=True))


def main() -> None:
    """Measure both, print a line each and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with shards/ and tiny_clip/")
    parser.add_argument("--only", choices=["peer", "forward"], nargs="+", default=["peer", "forward"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--times", type=int, nargs="+", default=[2, 4, 8], help="how often the tars are embedded, against clip-retrieval")
    parser.add_argument("--count", type=int, default=1024, help="pictures of the forward comparison")
    parser.add_argument("--vit", default="ViT-B-32", help="open_clip's name of the model of the forward comparison, and on a GPU of both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of our one actor; 0 = a CPU")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-embed"))
    add_option(parser)
    arguments = parser.parse_args()
    recorded = Results(__file__, arguments.results)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source = arguments.source.resolve()

    def setting(model: Path, name: str, batch: int) -> Setting:
        return Setting(model, name, batch, arguments.threads, arguments.gpus)

    def vit(batch: int) -> Setting:
        return setting(save_vit(work / arguments.vit, arguments.vit), "/".join(arguments.vit.rsplit("-", 1)), batch)

    results: dict[str, Any] = {}
    if "peer" in arguments.only:
        chosen = vit(arguments.batch) if arguments.gpus else setting(source / "tiny_clip", "tiny CLIP", arguments.batch)
        results["peer"] = []
        for times in arguments.times:
            results["peer"].append(compare(repeated(source, work / "source", times), work, chosen, arguments.repeat))
            record(recorded, results["peer"][-1], chosen)
            print(f"{times} ×: ours / peer: {results['peer'][-1]['ratio']:.2f}", flush=True)
        lowest = [min(found["lowest_cosine"].values()) for found in results["peer"]]
        recorded.add(Row("embed: lowest cosine between its embeddings and clip-retrieval's", "", lowest, at_least=0.99))
    if "forward" in arguments.only:
        chosen = vit(arguments.batch if arguments.gpus else min(arguments.batch, 64))
        results["forward"] = forward(source, work, chosen, arguments.count, arguments.repeat)
        record_forward(recorded, results["forward"], chosen)
        print(f"ours / bare forward: {results['forward']['ratio']:.2f}", flush=True)
    print(json.dumps({"benchmark": "embed", **results}))
    sys.exit(0 if recorded.finish() else 1)


if __name__ == "__main__":
    main()
