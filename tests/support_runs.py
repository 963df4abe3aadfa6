"""Small shards and small runs for tests that start whole trainings, and the killing of their processes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

SAMPLES = 90


def make_shards(folder: Path, samples: int = SAMPLES) -> Path:
    """Captioned scenes of 32 pixels in three shards."""
    from diptych.datasets.scenes import render
    from diptych.datasets.shards import ShardWriter

    def members(index: int) -> dict[str, bytes | str]:
        picture, caption = render(0, index, size=32)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=92)
        return {"jpg": buffer.getvalue(), "txt": caption}

    ShardWriter(str(folder), samples_per_shard=samples // 3).write_all(members(index) for index in range(samples))
    return folder


def embed_shards(shards: Path, clip: str, folder: Path) -> Path:
    """Embeddings of `shards` by the model `clip` in clip-retrieval's layout, as `diptych embed` writes them."""
    import numpy as np
    import pandas as pd
    from PIL import Image

    from diptych.batches import ImageNeed, Needs
    from diptych.config import DataConfig
    from diptych.datasets.manifest import open_manifest
    from diptych.datasets.reader import SampleSource, read_rows
    from diptych.pipelines.painters import open_embedder
    from diptych.trainers.picture_metrics import embed_captions, embed_pictures

    embedder, manifest = open_embedder(clip), open_manifest(str(shards))
    rows = np.arange(manifest.samples)
    table = manifest.rows(rows, ["key", "caption"])
    size = embedder.pixels(Image.new("RGB", (32, 32))).shape[0]
    images = read_rows(SampleSource.of(manifest, None, DataConfig()), rows, rows, Needs(image=ImageNeed(size)), 0).arrays["image"]
    captions = table["caption"].to_pylist()
    for part in ("img_emb", "text_emb", "metadata"):
        (folder / part).mkdir(parents=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", embed_pictures(embedder, images).astype(np.float16))
    np.save(folder / "text_emb" / "text_emb_0.npy", embed_captions(embedder, captions).astype(np.float16))
    about = pd.DataFrame({"image_path": table["key"].to_pylist(), "caption": captions})
    about.to_parquet(folder / "metadata" / "metadata_0.parquet")
    return folder


def overrides(shards: Path, name: str, **changes: object) -> list[str]:
    """KEY=VALUE of a coca run of tiny size with a trace; `__` in a name of `changes` stands for a dot."""
    values: dict[str, object] = {
        "name": name,
        "data.shards": shards,
        "data.trace": "true",
        "data.block_megabytes": 0.05,
        "train.steps": 60,
        "train.global_batch_size": 8,
        "train.log_every": 5,
        "checkpoint.every_steps": 7,
        "optim.ema_decay": 0.9,
        "workers": 2,
        "tracking.system_metrics": "false",
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items()]


def start_driver(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    """`diptych train coca …` as a process and a session of its own, as a shell starts it, with its own Ray."""
    environment = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "diptych.pipelines.train", "coca", *arguments, "--json"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **streams)


def finish_driver(process: subprocess.Popen[str], timeout: float = 900) -> dict[str, object]:
    """Wait for a driver to end well; its JSON result."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-6000:]
    return json.loads(output.strip().splitlines()[-1])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None, seconds: float = 600) -> None:
    """Poll until `condition` holds; fails if the driver ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0][-6000:] if process and process.stdout else "ended early"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def logged_step(run_dir: Path) -> int:
    """Newest step in the metrics of a run."""
    from diptych.pipelines.runs_folder import last_line

    return int(last_line(run_dir).get("step", 0))


def writing_checkpoint(run_dir: Path) -> bool:
    """Whether a checkpoint is being written at this moment: its folder has not got its name yet."""
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(name.startswith(".step_") for name in os.listdir(folder))


def train_workers(parent: int | None = None) -> list[psutil.Process]:
    """Ray Train worker processes below `parent` (this process by default)."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def kill_tree(process: subprocess.Popen[str], with_driver: bool) -> None:
    """SIGKILL every process below the driver (its whole Ray), and the driver too if asked."""
    children = psutil.Process(process.pid).children(recursive=True)
    if with_driver:
        process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=30)


def trace_of(run_dir: Path) -> list[tuple[int, int, str, str]]:
    """(step, slot, shard, key) of the history that counts."""
    table = pq.read_table(run_dir / "trace.parquet")
    return list(zip(*(table[name].to_pylist() for name in ("step", "slot", "shard", "key")), strict=True))


def final_bytes(run_dir: Path) -> dict[str, bytes]:
    """Weights, averages and optimizer state of the newest checkpoint, as bytes."""
    newest = sorted(run_dir.glob("checkpoints/step_*"))[-1]
    return {file.name: file.read_bytes() for file in sorted(newest.glob("*.safetensors"))}
