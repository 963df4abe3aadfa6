"""What a run says of pictures: captions of a coca run, or a clip_vit run's embeddings with the nearest known prompts."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.config import ConfigError
from diptych.pipelines.console import progress

if TYPE_CHECKING:
    import numpy as np

    from diptych.batches import ImageNeed
    from diptych.pipelines.trained import Trained
    from diptych.trainers.decoding import Decoding
    from diptych.trainers.nearest_prompts import PromptIndex

_BATCH = 32


def pictures(source: str) -> list[tuple[str, Path]]:
    """(id, path) of a picture, or of every picture in a folder, sorted; the id is the path inside the folder without suffix."""
    from diptych.datasets.pack_sources import IMAGE_SUFFIXES

    path = Path(source)
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        return [(path.stem, path)]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else []
    if not found:
        raise ConfigError("--images", source, "a picture, or a folder with pictures", "Check the path.")
    return [(file.relative_to(path).with_suffix("").as_posix(), file) for file in found]


def decode_alone(data: bytes, need: ImageNeed) -> np.ndarray:
    """uint8 [S, S, 3] of a picture's file as the task sees it, without augmentation. Raises `BadImageError`."""
    import numpy as np

    from diptych.datasets.images import DRAWS, choose_decoder, decode_image

    plain = replace(need, flip=0.0, resize="center_crop" if need.resize == "random_crop" else need.resize)
    return decode_image(data, plain, np.full(DRAWS, 0.5), choose_decoder("auto"))


def batches(found: list[tuple[str, Path]], need: ImageNeed, faults: list[dict[str, Any]]) -> Iterator[tuple[list[int], np.ndarray]]:
    """(places in `found`, uint8 [B, H, W, 3]) without augmentation; what cannot be decoded goes to `faults`."""
    import numpy as np

    from diptych.datasets.images import BadImageError

    for start in range(0, len(found), _BATCH):
        places, arrays = [], []
        for place in range(start, min(start + _BATCH, len(found))):
            name, path = found[place]
            try:
                arrays.append(decode_alone(path.read_bytes(), need))
                places.append(place)
            except (BadImageError, OSError) as error:
                faults.append({"shard": str(path), "key": name, "kind": "undecodable_image", "detail": str(error)})
        if places:
            yield places, np.stack(arrays)


def run(
    run_dir: Path, images: str, out: str, decoding: Decoding, *, neighbours: int = 3, checkpoint: str = "newest", averaged: bool = True,
    device: str = "auto", dry_run: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Caption or embed `images`; returns `samples_in, samples_out, faults, seconds, texts, out`.

    coca: `out` is .txt, .csv or .jsonl with a row per caption. clip_vit: `out` is the competition's .csv (`imgId_eId, val`), and `texts`
    are the `neighbours` nearest prompts of the run's data, also written beside it as `<out>.prompts.csv`. With `dry_run` nothing is
    loaded or written, and what would be is returned.
    """
    from diptych.pipelines.trained import described, load_trained

    started = time.monotonic()
    found = pictures(images)
    if dry_run:
        about = described(run_dir, checkpoint, averaged) | {"device": device, "decoding": decoding.model_dump(mode="json")}
        return about | {
            "samples_in": len(found),
            "first picture": str(found[0][1]),
            "neighbours": neighbours,
            "writes": out or "the screen",
        }
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    trained = load_trained(run_dir, checkpoint, averaged, chosen)
    make = _captions if trained.config.task.name == "coca" else _embeddings
    faults: list[dict[str, Any]] = []
    texts, count = make(trained, found, out, decoding, neighbours, faults)
    seconds = time.monotonic() - started
    return {"samples_in": len(found), "samples_out": count, "faults": faults, "seconds": seconds, "texts": texts, "out": out}


def _captions(
    trained: Trained, found: list[tuple[str, Path]], out: str, decoding: Decoding, _: int, faults: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    import torch

    from diptych.pipelines.generate_text import check_output, write_texts
    from diptych.trainers.tasks.coca import CocaTask

    check_output(out)
    task = trained.task
    assert isinstance(task, CocaTask)
    need = task.needs.image
    assert need is not None

    def rows() -> Iterator[dict[str, Any]]:
        device = next(task.parameters()).device
        for places, arrays in batches(found, need, faults):
            captions = task.captions(torch.from_numpy(arrays).to(device), decoding, torch.tensor(places, device=device))
            for place, several in zip(places, captions, strict=True):
                for sample, text in enumerate(several):
                    yield {
                        "number": place,
                        "prompt": found[place][0],
                        "sample": sample,
                        "text": text,
                        "tokens": 0,
                        "ended": True,
                        "fault": "",
                    }

    count, kept, _faulty = write_texts(rows(), out, len(found), ("prompt", "sample", "text"), {"prompt": "image"})
    return kept, count


def _embeddings(
    trained: Trained, found: list[tuple[str, Path]], out: str, _: Decoding, neighbours: int, faults: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], int]:
    import numpy as np
    import torch

    from diptych.trainers.tasks.clip_vit import ClipVitTask

    if out and Path(out).suffix != ".csv":
        raise ConfigError("--out", out, "a file that ends in .csv", "It holds the competition's rows: imgId_eId, val.")
    task = trained.task
    assert isinstance(task, ClipVitTask)
    need = task.needs.image
    assert need is not None
    device = next(task.parameters()).device
    names: list[str] = []
    parts: list[np.ndarray] = []
    with progress("embedding", len(found)) as advance, torch.no_grad():
        for places, arrays in batches(found, need, faults):
            parts.append(task.predict(torch.from_numpy(arrays).to(device)).cpu().numpy())
            names += [found[place][0] for place in places]
            advance(len(places))
    predictions = np.concatenate(parts) if parts else np.zeros((0, task.dim), np.float32)
    texts = _nearest(trained, names, predictions, neighbours) if neighbours and names else []
    if out:
        from diptych.trainers.nearest_prompts import submission_rows

        _write(Path(out), ("imgId_eId", "val"), submission_rows(names, predictions))
        if texts:
            columns = ("image", "rank", "cosine", "text")
            _write(Path(out).with_suffix(".prompts.csv"), columns, ([row[column] for column in columns] for row in texts))
    return texts, len(names)


def _nearest(trained: Trained, names: list[str], predictions: np.ndarray, neighbours: int) -> list[dict[str, Any]]:
    return [
        {"image": name, "rank": rank, "cosine": cosine, "text": text}
        for name, found in zip(names, known_prompts(trained).nearest(predictions, neighbours), strict=True)
        for rank, (text, cosine) in enumerate(found, 1)
    ]


def known_prompts(trained: Trained) -> PromptIndex:
    """The prompts of the run's own data, whose embeddings are joined by key again."""
    import numpy as np

    from diptych.datasets.embeddings import join
    from diptych.pipelines.prepare import open_shards
    from diptych.trainers.nearest_prompts import PromptIndex

    manifest = open_shards(trained.config)
    joined = join(manifest, trained.config.data.embeddings, ("text",))
    vectors, missing = joined.read(np.arange(manifest.samples), "text")
    absent = {row for row, _, _ in missing}
    captions = manifest.rows(np.arange(manifest.samples), ["caption"])["caption"].to_pylist()
    known = [row for row, caption in enumerate(captions) if caption and row not in absent]
    return PromptIndex([captions[row] for row in known], vectors[known])


def _write(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(rows)
    temporary.replace(path)
