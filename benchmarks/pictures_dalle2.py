"""DALL-E 2 from scratch on the demo's scenes: are the pictures of prior and decoder what their captions say?

    python benchmarks/pictures_dalle2.py OUT [KEY=VALUE …]

A CoCa (recipe `demo`) embeds the scenes; the recipes `demo` of the prior and `scenes` of the decoder learn from its embeddings, in this process.
Pictures are made of 200 held-out captions, and a CoCa of another seed, which conditioned nothing, matches each picture to one of 100
captions. KEY=VALUE changes the decoder's run. Exit status 1 if fewer than 20 times chance are matched, or prior and decoder took more than 20
minutes of two cores. Interrupted training goes on in the next call; its time is the processor's, over all calls.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from _results import Results, run_script
from _runs import train
from scene_judge import judge, timed, write_scenes

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines import embed, export
from diptych.pipelines.trained import load_trained
from diptych.trainers.clip_embedder import Embedder
from diptych.trainers.dalle2_painter import Dalle2Painter
from diptych.trainers.model_name import parse_model
from diptych.trainers.pictures import PictureRequest, PictureSettings
from diptych.trainers.precision import resolve_precision

_SCENES, _AT_ONCE, _SHARE = 4_800, 50, 0.1


def paint(out: Path, captions: list[str], seed: int = 0) -> np.ndarray:
    """A picture of each caption by the averaged weights of prior and decoder."""
    prior, decoder = (load_trained(out / name).task for name in ("prior", "decoder"))
    embedder = Embedder(parse_model(str(out / "coca_model")), precision="fp32")
    autocast = resolve_precision("auto", embedder.device).autocast()
    painter = Dalle2Painter(prior, decoder, embedder, autocast=autocast)  # type: ignore[arg-type]
    requests = [PictureRequest(caption, seed + number) for number, caption in enumerate(captions)]
    parts = [painter.paint(requests[start : start + _AT_ONCE], PictureSettings()) for start in range(0, len(requests), _AT_ONCE)]
    return np.concatenate(parts)


def main(out: Path, overrides: list[str], results: Results) -> bool:
    shards, common = out / "shards", ["workers=1", f"data.validation_share={_SHARE}", "checkpoint.every_steps=100", "checkpoint.keep=1"]
    write_scenes(shards, _SCENES)
    common += [f"data.shards={shards}"]
    timed(out, "coca", lambda: train(apply_overrides(load_recipe("coca", "demo"), common), out / "coca"))
    if not (out / "coca_model" / "open_clip_config.json").is_file():
        export.run(str(out / "coca"), str(out / "coca_model"), track=False)
    embed.run(str(shards), str(out / "embeddings"), {"model": str(out / "coca_model"), "precision": "fp32"})
    common += [f"data.embeddings={out / 'embeddings'}"]
    spent = timed(out, "prior", lambda: train(apply_overrides(load_recipe("dalle2_prior", "demo"), common), out / "prior"))
    config = apply_overrides(load_recipe("dalle2_decoder", "scenes"), [*common, *overrides])
    spent += timed(out, "decoder", lambda: train(config, out / "decoder"))
    return judge(out, shards, _SHARE, lambda captions: paint(out, captions), spent, results)


if __name__ == "__main__":
    run_script(main, __file__, __doc__)
