"""What the demo measures: each figure beside its target and its baseline, and pictures found by the prior's predictions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from diptych.batches import ImageNeed, Needs
from diptych.datasets.reader import read_rows
from diptych.datasets.scenes import parse_first_object
from diptych.pipelines import evaluate
from diptych.pipelines.demo import HELD_OUT
from diptych.pipelines.report import Figure
from diptych.pipelines.samples import write_grid
from diptych.pipelines.trained import load_trained

_SHOWN, _PIXELS = 24, 128


def measure(folder: Path) -> list[Figure]:
    """Evaluate the runs `coca` and `prior` of the demo in `folder`."""
    runs = [folder / "runs" / name for name in ("coca", "prior")]
    metrics = evaluate.run([str(run) for run in runs], samples=HELD_OUT, checkpoint="newest")["metrics"]
    coca, prior = metrics["coca"], metrics["prior"]
    chance = f"chance: {1 / HELD_OUT:.3f}"
    first, most_frequent = _first_objects(runs[0])
    related, unrelated = prior["cosine_image_predicted"], prior["cosine_unrelated"]
    ignoring_text = f"cos(image, text): {prior['cosine_text_image']:.3f}; cos(image, mean image): {_mean_cosine(folder):.3f}"
    targets = [
        ("image → caption R@1", coca["image_to_text_r1"], 0.7, chance),
        ("caption → image R@1", coca["text_to_image_r1"], 0.7, chance),
        ("captions right in the first object's colour and shape", first, 0.5, f"always the most frequent: {most_frequent:.3f}"),
        ("cos(image, predicted)", related, 0.75, ignoring_text),
        ("above cos(unrelated text, predicted)", related - unrelated, 0.3, f"cos(unrelated text, predicted): {unrelated:.3f}"),
    ]
    figures = [Figure(name, value, f"target: at least {target}", value >= target, baseline) for name, value, target, baseline in targets]
    return [*figures, Figure("caption → predicted embedding → image R@1", _found_pictures(runs[1]), baseline=chance)]


def _first_objects(run_dir: Path) -> tuple[float, float]:
    """(share of captions whose first object has the right colour and shape, share that the most frequent answer would get)."""
    import torch

    trained = load_trained(run_dir)
    task: Any = trained.task
    true, made = [], []
    with torch.no_grad():
        for batch in evaluate.held_out(trained, samples=HELD_OUT):
            rows = batch["weight"] > 0
            true += [parse_first_object(task.vocabulary.decode(tokens)) for tokens in batch["tokens"][rows].tolist()]
            made += [parse_first_object(texts[0]) for texts in task.captions(batch["image"][rows])]
    right = sum(one == other and one is not None for one, other in zip(true, made, strict=True))
    return right / len(true), Counter(true).most_common(1)[0][1] / len(true)


def _mean_cosine(folder: Path) -> float:
    """Mean cosine of an image embedding with the mean of all: what a prior that ignores its text could reach."""
    vectors = np.concatenate(
        [np.load(path, allow_pickle=False).astype(np.float32) for path in sorted((folder / "embeddings" / "img_emb").glob("*.npy"))]
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    mean = vectors.mean(axis=0)
    return float((vectors @ mean).mean() / np.linalg.norm(mean))


def _found_pictures(run_dir: Path) -> float:
    """R@1 of the image whose embedding is nearest to the one predicted from a caption; the report shows the first ones."""
    import torch
    import torch.nn.functional as F

    from diptych.trainers.retrieval import recall_at

    trained = load_trained(run_dir)
    task: Any = trained.task
    batches = evaluate.held_out(trained, samples=HELD_OUT)
    predicted, images, rows = [], [], []
    with torch.no_grad():
        for batch in batches:
            kept = batch["weight"] > 0
            predicted.append(task.sample(batch["text_embedding"][kept], batch["slot"][kept]))
            images.append(batch["image_embedding"][kept])
            rows.append(batch["row"][kept])
    queries, candidates, row = F.normalize(torch.cat(predicted), dim=-1), F.normalize(torch.cat(images), dim=-1), torch.cat(rows)
    recall = recall_at(queries, candidates, torch.arange(len(row)), (1,))[1]
    nearest = row[(queries[:_SHOWN] @ candidates.T).argmax(dim=1)].numpy()
    source = batches.spec.source
    captions = [source.opened().manifest.rows(chosen, ["caption"])["caption"].to_pylist() for chosen in (row[:_SHOWN].numpy(), nearest)]
    pictures = read_rows(source, nearest, np.arange(len(nearest)), Needs(image=ImageNeed(_PIXELS)), 0)
    table = [list(pair) for pair in zip(*captions, strict=True)]
    title = "Pictures found by the embedding that the prior predicts from a caption"
    about = {"title": title, "step": trained.state["step"], "columns": ["caption", "the picture found shows"], "rows": table}
    stem = run_dir / "evaluation" / f"step_{trained.state['step']:08d}"
    stem.with_suffix(".json").write_text(json.dumps(about))
    write_grid(stem.with_suffix(".jpg"), pictures.arrays["image"])
    return recall
