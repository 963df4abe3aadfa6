"""Stable Diffusion from scratch on the demo's scenes: are its pictures what their captions say?

    python benchmarks/pictures_sd.py OUT [KEY=VALUE …]

Trains the recipes `scenes_vae` and `scenes` on 8,000 scenes in this process, makes pictures of 200 held-out captions, and has a CoCa of another
seed match each picture to one of 100 captions. KEY=VALUE changes `scenes`. Exit status 1 if fewer than 20 times chance are matched, or training
took more than 20 minutes of two cores. Interrupted training goes on in the next call; its time is the processor's, over all calls.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from _results import Results, run_script
from _runs import train
from scene_judge import judge, timed, write_scenes

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines.export import run as export
from diptych.pipelines.trained import load_trained
from diptych.trainers.pictures import PictureRequest, PictureSettings
from diptych.trainers.precision import resolve_precision
from diptych.trainers.sd_painter import SdPainter

_SCENES, _AT_ONCE = 8_000, 50
_SETTINGS = PictureSettings(steps=25, guidance=(3.0,), sampler="dpm++")


def paint(run: Path, captions: list[str], seed: int = 0) -> np.ndarray:
    """A picture of each caption by the run's averaged weights."""
    task = load_trained(run).task
    painter = SdPainter(task, autocast=resolve_precision("auto", next(task.parameters()).device).autocast())
    requests = [PictureRequest(caption, seed + number) for number, caption in enumerate(captions)]
    return np.concatenate([painter.paint(requests[start : start + _AT_ONCE], _SETTINGS) for start in range(0, len(requests), _AT_ONCE)])


def main(out: Path, overrides: list[str], results: Results) -> bool:
    out.mkdir(parents=True, exist_ok=True)
    shards = out / "shards"
    write_scenes(shards, _SCENES)
    common = [f"data.shards={shards}", "checkpoint.every_steps=250", "checkpoint.keep=1"]
    config = apply_overrides(load_recipe("stable_diffusion", "scenes_vae"), common)
    spent = timed(out, "vae", lambda: train(config, out / "vae"))
    export(str(out / "vae"), str(out / "exported_vae"), track=False)
    config = apply_overrides(load_recipe("stable_diffusion", "scenes"), [*common, f"task.vae={out / 'exported_vae'}", *overrides])
    spent += timed(out, "unet", lambda: train(config, out / "unet"))
    return judge(out, shards, config.data.validation_share, lambda captions: paint(out / "unet", captions), spent, results)


if __name__ == "__main__":
    run_script(main, __file__, __doc__)
