"""LoRA teaches a model trained from scratch something new: one object amid four others, which no scene of its base has.

    python benchmarks/sd_lora.py OUT

OUT is the folder of `pictures_sd.py`, whose model is the base. Adapters of rank 8 learn 900 such scenes; a judge (a CoCa of another seed
that saw scenes of both kinds and conditioned nothing) scores pictures of 100 held-out captions by the base and with the adapters: 100 · cosine, and
how many are matched to their caption, 1 of 100. The exported file is loaded in diffusers and must make the same picture. Exit status 1 if
the score does not rise by 5, or a picture differs.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import Results, Row, add_option
from _runs import train
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from scene_judge import held_out_captions, train_judge, verdict

from diptych.config import apply_overrides, load_recipe
from diptych.datasets.scenes import Placed, Scene, compose, describe
from diptych.datasets.shards import ShardWriter
from diptych.pipelines.console import show_table
from diptych.pipelines.export import run as export
from diptych.pipelines.samples import write_grid
from diptych.pipelines.trained import load_trained
from diptych.trainers.pictures import PictureRequest, PictureSettings, seeded_noise
from diptych.trainers.sd_painter import SdPainter

_CONCEPT, _SCENES, _HELD_OUT, _SHARE, _SIZE, _FIRST_SHARD = "amid", 1_000, 100, 0.1, 64, 8
_SETTINGS = PictureSettings(steps=25, guidance=(3.0,), sampler="dpm++")


def amid(count: int) -> Iterator[dict[str, Any]]:
    """Scenes of one object with four others around it, of kinds and grounds that the base knows, and whose caption says so."""
    for index in range(20_000, 20_000 + count):
        scene = describe(0, index)
        picture = compose(scene.ground, functools.partial(_around, scene), np.random.default_rng((0, index)), _SIZE)
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=95)
        one, _, _ = scene.caption.partition(f" {scene.relation} ")
        caption = f"{one} {_CONCEPT} four {scene.second[0]} {scene.second[1]}s on a {scene.ground} background"
        yield {"jpg": data.getvalue(), "txt": caption, "json": {"scene": index}}


def _around(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    corners = [(x, y, 0.3 * rng.uniform(0.9, 1.0)) for x in (0.2, 0.8) for y in (0.2, 0.8)]
    return [((0.5, 0.5, 0.4 * rng.uniform(0.9, 1.0)), scene.first), *((place, scene.second) for place in corners)]


def data(out: Path) -> tuple[Path, Path]:
    """(shards of the new scenes, shards of both kinds), made once."""
    concept, both = out / _CONCEPT, out / "both"
    writer = ShardWriter(str(concept), _SCENES)
    if not writer.is_finished(_FIRST_SHARD):
        writer.write_shard(_FIRST_SHARD, amid(_SCENES))
    both.mkdir(exist_ok=True)
    for path in (*(out / "shards").glob("0*"), *concept.glob("0*")):
        link = both / path.name
        if not link.exists():
            os.symlink(path.absolute(), link)
    return concept, both


def same_in_diffusers(base: Path, adapters: Path, task: Any, caption: str) -> int:
    """Largest difference, in 8-bit steps, between our picture and that of diffusers with the exported adapters."""
    pipeline = StableDiffusionPipeline.from_pretrained(str(base), safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(str(adapters))
    request, side = PictureRequest(caption, 0), task.config.image_size
    noise = seeded_noise([request], "start", (pipeline.unet.config.in_channels, side // 4, side // 4))
    made = pipeline(
        caption, latents=noise, num_inference_steps=_SETTINGS.steps, guidance_scale=3.0, height=side, width=side, output_type="np"
    ).images
    ours = SdPainter(task).paint([request], _SETTINGS)
    return int(np.abs((made * 255).round().astype(int) - ours).max())


def main(out: Path, results: Results) -> bool:
    concept, both = data(out)
    base = out / "exported_base"
    export(str(out / "unet"), str(base), track=False)
    train_judge(both, out / "judge_of_both", _SHARE)
    overrides = [f"task.pretrained={base}", "task.image_size=32", "task.context_length=20", "task.flip=0", "task.attention=eager"]
    overrides += ["task.lora.rank=8", "task.caption_drop=0.1", "task.show_guidance=3", f"data.shards={concept}"]
    overrides += [f"data.validation_share={_SHARE}", "optim.lr=2e-3", "optim.schedule=cosine", "optim.warmup_steps=10"]
    overrides += [
        "train.steps=200",
        "train.global_batch_size=32",
        "train.precision=auto",
        "validation.batch_size=32",
        "validation.every_steps=0",
    ]
    if not (out / "lora" / "result.json").is_file():
        train(apply_overrides(load_recipe("stable_diffusion", "lora_reports"), overrides), out / "lora")
    export(str(out / "lora"), str(out / "exported_lora"), track=False)
    task = load_trained(out / "lora").task
    captions = held_out_captions(concept, _HELD_OUT, _SHARE)
    requests = [PictureRequest(caption, number) for number, caption in enumerate(captions)]
    figures: dict[str, float] = {}
    with torch.no_grad():
        for name, painter in (("base", SdPainter(task, base=True)), ("lora", SdPainter(task))):
            pictures = painter.paint(requests, _SETTINGS)
            matched, cosine = verdict(out / "judge_of_both", pictures, captions)
            figures |= {f"{name}_score": 100 * float(np.maximum(cosine, 0).mean()), f"{name}_matched": float(matched.mean())}
            write_grid(out / f"{_CONCEPT}_{name}.jpg", pictures[:16])
        figures["largest_difference_to_diffusers"] = same_in_diffusers(base, out / "exported_lora", task, captions[0])
    show_table(f"{len(captions)} held-out captions", ["figure", "value"], [[name, f"{value:.3f}"] for name, value in figures.items()])
    case = "LoRA of rank 8 learns one object amid four, 900 scenes, 200 steps"
    gain = figures["lora_score"] - figures["base_score"]
    results.add(Row(f"{case}: score (100 · cosine of a judge) above the base's", "", [gain], at_least=5, headline=True))
    results.add(Row(f"{case}: pictures matched to their caption", "", [figures["lora_matched"]], "the base", [figures["base_matched"]]))
    largest = figures["largest_difference_to_diffusers"]
    results.add(Row(f"{case}: largest difference to diffusers with the exported file", "of 255", [largest], at_most=1))
    results.finish()
    print(json.dumps(figures))
    return figures["lora_score"] >= figures["base_score"] + 5 and figures["largest_difference_to_diffusers"] <= 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    add_option(parser)
    given = parser.parse_args()
    sys.exit(0 if main(given.out, Results(__file__, given.results)) else 1)
