"""CoCa on generated scenes: exact match of greedy captions, retrieval, and the same captions without the cache.

    python benchmarks/coca.py OUT [KEY=VALUE …]

Draws 12,000 scenes and trains the recipe `scenes` in this process with one thread per core (a call that was stopped goes on where its last
checkpoint stands). Exit status 1 if the exact match is below 0.6, or a greedy caption changes where the whole prefix is computed anew for
every token.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from _results import Results, Row, run_script
from _runs import train
from scene_shards import write_scenes

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines.console import show_table
from diptych.pipelines.evaluate import held_out
from diptych.pipelines.evaluate import run as evaluate
from diptych.pipelines.trained import load_trained
from diptych.trainers.captioning import generate_captions
from diptych.trainers.decoding import Decoding
from diptych.trainers.tasks.coca import CocaTask


@torch.no_grad()
def uncached(task: CocaTask, pixels: torch.Tensor) -> list[list[int]]:
    """Greedy captions by open_clip's own forward pass over the whole prefix, with no cache."""
    vocabulary, model = task.vocabulary, task.model
    image_tokens = model._encode_image(pixels)[1]
    tokens = torch.full((len(pixels), 1), vocabulary.start)
    for _ in range(model.context_length - 1):
        states = model._encode_text(tokens)[1]
        logits = model.text_decoder(image_tokens, states)[:, -1]
        logits[:, [vocabulary.pad, vocabulary.start]] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    rows = tokens[:, 1:].tolist()
    return [row[: row.index(vocabulary.end)] if vocabulary.end in row else row for row in rows]


def equal_captions(run: Path) -> tuple[int, int]:
    """(captions that are the same with the cache and without, all captions) of the held-out scenes."""
    trained = load_trained(run)
    task = trained.task
    assert isinstance(task, CocaTask)
    task.eval()
    same = count = 0
    for batch in held_out(trained):
        pixels = task.pixels(batch["image"][batch["weight"] > 0])
        cached = [captions[0] for captions in generate_captions(task.model, pixels, task.vocabulary, Decoding())]
        same += sum(one == other for one, other in zip(cached, uncached(task, pixels), strict=True))
        count += len(pixels)
    return same, count


def main(out: Path, overrides: list[str], results: Results) -> bool:
    write_scenes(out / "shards", 12_000, 64)
    config = apply_overrides(load_recipe("coca", "scenes"), [f"data.shards={out / 'shards'}", "checkpoint.every_steps=250", *overrides])
    started = time.monotonic(), time.process_time()
    train(config, out / "run")
    seconds = time.monotonic() - started[0], time.process_time() - started[1]
    metrics = evaluate([str(out / "run")], checkpoint="newest", track=False)["metrics"]
    same, count = equal_captions(out / "run")
    metrics |= {"same_without_cache": same / count, "train_seconds": seconds[0], "train_cpu_seconds": seconds[1]}
    show_table(f"{count} held-out scenes", ["figure", "value"], [[key, f"{value:.4f}"] for key, value in metrics.items()])
    case = f"CoCa, 12,000 scenes, {config.train.steps} steps"
    results.add(
        Row(f"{case}: exact match of greedy captions, {count} held-out scenes", "", [metrics["exact_match"]], at_least=0.6, headline=True)
    )
    results.add(Row(f"{case}: captions that are the same without the cache", "", [metrics["same_without_cache"]], at_least=1.0))
    # A call that goes on with an earlier one's run trained only a part of it.
    if metrics["train_seconds"] > 1:
        results.add(Row(f"{case}: processor time of this call's training", "s", [metrics["train_cpu_seconds"]]))
    for key in sorted(metrics):
        if key.endswith(("_r1", "_r5")):
            results.add(Row(f"{case}: {key}", "", [metrics[key]]))
    results.finish()
    print(json.dumps(metrics))
    return metrics["exact_match"] >= 0.6 and same == count


if __name__ == "__main__":
    run_script(main, __file__, __doc__)
