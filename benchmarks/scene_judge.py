"""A judge of made scenes: a CoCa of its own seed, which conditioned nothing, says which of 100 captions a picture belongs to.

For `pictures_sd.py` and others that make pictures of `diptych.datasets.scenes`: scenes as shards, the judge, and its verdict.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _results import Results, Row
from _runs import train
from PIL import Image

from diptych.config import apply_overrides, load_recipe
from diptych.datasets.keep import select
from diptych.datasets.manifest import open_manifest
from diptych.datasets.scenes import samples
from diptych.datasets.shards import ShardWriter
from diptych.datasets.tokens import load_tokenizer
from diptych.pipelines.console import show_table
from diptych.pipelines.samples import write_grid
from diptych.pipelines.trained import load_trained

_PER_SHARD, _SEED = 1000, 77
CANDIDATES = 100
"""Captions that a picture is matched among; chance is one of them."""
HELD_OUT = 200
"""Captions that pictures are made of."""


def write_scenes(folder: Path, count: int, size: int = 64) -> None:
    """Shards of `count` scenes of `size` pixels; what is there already is kept."""
    writer = ShardWriter(str(folder), _PER_SHARD)
    for shard in range(-(-count // _PER_SHARD)):
        if not writer.is_finished(shard):
            writer.write_shard(shard, samples(0, shard * _PER_SHARD, min((shard + 1) * _PER_SHARD, count), size))


def held_out_captions(shards: Path, count: int, share: float) -> list[str]:
    """The first `count` captions of the validation split that runs with `data.validation_share=share` hold out."""
    manifest = open_manifest(str(shards), "")
    _, held_out = select(manifest, (), share, 0)
    rows = held_out[np.arange(min(count, held_out.samples))]
    return manifest.rows(rows, ["caption"])["caption"].to_pylist()


def train_judge(shards: Path, folder: Path, share: float) -> None:
    """The demo's CoCa with another seed, on the same split, so that it never saw what it judges."""
    if not (folder / "result.json").is_file():
        config = load_recipe("coca", "demo")
        train(
            apply_overrides(config, [f"data.shards={shards}", f"data.validation_share={share}", f"seed={_SEED}", "workers=1"]),
            folder,
        )


@torch.no_grad()
def verdict(judge: Path, pictures: np.ndarray, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """For uint8 [N, H, W, 3] and their captions: (bool [N]: matched to its own caption among its hundred, [N]: cosine with it)."""
    trained = load_trained(judge)
    task, side = trained.task, trained.config.task.needs().image.size
    small = np.stack([np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)) for picture in pictures])
    tokens, mask = load_tokenizer(trained.config.task.needs().tokens.tokenizer).encode(captions, trained.config.task.needs().tokens.length)
    batch = {"image": torch.from_numpy(small), "tokens": torch.from_numpy(tokens), "token_mask": torch.from_numpy(mask)}
    features = task.features(batch | {"weight": torch.ones(len(captions))})
    matched = []
    for start in range(0, len(captions), CANDIDATES):
        group = slice(start, start + CANDIDATES)
        similarity = features["image"][group] @ features["text"][group].T
        matched.append((similarity.argmax(dim=1) == torch.arange(similarity.shape[0])).numpy())
    return np.concatenate(matched), (features["image"] * features["text"]).sum(dim=1).numpy()


def timed(out: Path, name: str, work: Callable[[], object]) -> float:
    """Do `work` unless it was done; returns the processor seconds that it took over all calls, and keeps them in a file."""
    file = out / f"{name}.json"
    spent = json.loads(file.read_text()) if file.is_file() else {"cpu_seconds": 0.0, "seconds": 0.0, "done": False}
    if not spent["done"]:
        cpu, wall = sum(os.times()[:4]), time.monotonic()
        try:
            work()
            spent["done"] = True
        finally:
            spent["cpu_seconds"] += sum(os.times()[:4]) - cpu
            spent["seconds"] += time.monotonic() - wall
            file.write_text(json.dumps(spent))
    return float(spent["cpu_seconds"])


def judge(out: Path, shards: Path, share: float, paint: Callable[[list[str]], np.ndarray], cpu_seconds: float, results: Results) -> bool:
    """Have pictures of `HELD_OUT` captions by `paint` judged: prints the figures, keeps a grid in `out`; whether both targets are met.

    `share` is `data.validation_share` of the runs, `cpu_seconds` what their training took.
    """
    train_judge(shards, out / "judge", share)
    captions = held_out_captions(shards, HELD_OUT, share)
    pictures = paint(captions)
    matched, cosine = verdict(out / "judge", pictures, captions)
    shuffled, _ = verdict(out / "judge", np.roll(pictures, 1, axis=0), captions)
    write_grid(out / "grid.jpg", pictures[:32])
    figures = {
        "matched": float(matched.mean()),
        "times_chance": float(matched.mean()) * CANDIDATES,
        "matched_to_the_next_caption": float(shuffled.mean()),
        "cosine": float(cosine.mean()),
        "training_minutes_of_two_cores": cpu_seconds / 120,
    }
    show_table(f"{len(captions)} held-out captions, 1 of {CANDIDATES}", ["figure", "value"], [[k, f"{v:.3f}"] for k, v in figures.items()])
    case = {"pictures_sd": "Stable Diffusion", "pictures_dalle2": "DALL-E 2 prior and decoder"}[results.script]
    what = f"{case} from scratch on scenes: pictures matched to their caption, 1 of {CANDIDATES}, over chance"
    results.add(Row(what, "×", [figures["times_chance"]], at_least=20, headline=True))
    results.add(
        Row(
            f"{case} from scratch on scenes: training, processor time of two cores",
            "min",
            [figures["training_minutes_of_two_cores"]],
            at_most=20,
        )
    )
    results.finish()
    print(json.dumps(figures))
    return figures["times_chance"] >= 20 and figures["training_minutes_of_two_cores"] <= 20
