"""Pictures of held-out captions, judged: each model's figures in one table across runs, the base beside the fine-tuned.

The pictures that are scored are those that are saved, in the run's `evaluation/`, with grids over prompts and over seeds. The table is a
model log (csv and HTML) that grows from call to call and keeps what people wrote into its column `assessment`.
"""

from __future__ import annotations

import base64
import csv
import functools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.config import ConfigError, RunConfig
from diptych.pipelines.console import note, progress
from diptych.pipelines.paint_worker import PaintSpec, PaintWorker, PictureJob

if TYPE_CHECKING:
    from diptych.pipelines.painters import PainterSpec
    from diptych.trainers.clip_embedder import Embedder
    from diptych.trainers.pictures import PictureSettings

_SIDE = 5
"""Prompts and seeds of the grids."""
LOG_COLUMNS = (
    "model", "task", "checkpoint", "step", "pictures", "guidance", "steps", "seed", "lr", "global_batch_size", "clip", "clip_score",
    "clip_score_std", "caption_match", "cmmd", "fid_clip", "fid", "kid", "inception_score", "lpips", "flagged_share", "nan_share",
    "seconds_per_picture", "assessment",
)  # fmt: skip
_KEY = ("model", "checkpoint", "pictures", "guidance", "steps", "seed", "clip")
"""What tells rows of the log apart; a row that is measured again replaces the former one."""


@dataclass(frozen=True)
class PictureEvaluation:
    """What is made and how it is judged."""

    clip: str
    """The CLIP that judges; for DALL-E 2 also the one whose embeddings prior and decoder know."""
    judge: str = ""
    """Another CLIP that judges; empty = `clip`."""
    pictures: int = 100
    settings: tuple[str, ...] = ()
    """`KEY=VALUE` of `PictureSettings`."""
    seed: int = 0
    inception: str = ""
    log: str = ""
    """csv of the model log; empty = beside the runs."""


@dataclass(frozen=True)
class Pairs:
    """Held-out captions, and their pictures in a shape."""

    captions: list[str]
    real: Callable[[int, int], tuple[np.ndarray, np.ndarray]]
    """(H, W) → uint8 [N, H, W, 3], and bool [N]: which of them could be read."""


def held_out_pairs(config: RunConfig, shards: str, count: int) -> Pairs:
    """At most `count` captioned samples of the run's held-out ones, spread over them, or of `shards`. `ConfigError` if there are none."""
    from diptych.datasets.keep import select
    from diptych.datasets.manifest import open_manifest
    from diptych.datasets.reader import SampleSource, read_rows
    from diptych.pipelines.prepare import open_shards

    manifest = open_manifest(shards) if shards else open_shards(config)
    keep, share = ((), 0.0) if shards else (config.data.keep, config.data.validation_share)
    every, held = select(manifest, keep, share, config.data.split_seed)
    selection = every if shards else held
    rows = selection[np.arange(selection.samples)]
    captions = manifest.rows(rows, ["caption"])["caption"].to_pylist()
    known = [index for index, caption in enumerate(captions) if caption]
    if not known:
        remedy = "Name captioned ones with --shards."
        raise ConfigError("RUN", shards or config.data.shards, "a run with held-out samples that have captions", remedy)
    taken = [known[index] for index in np.unique(np.linspace(0, len(known) - 1, min(count, len(known))).round().astype(int))]
    chosen = np.asarray(rows[taken], np.int64)
    source = SampleSource.of(manifest, None, config.data)

    def real(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        from diptych.batches import ImageNeed, Needs
        from diptych.trainers.micro_batches import in_shape

        need = ImageNeed.of_shape(height, width)
        assert need.buckets is not None
        found = read_rows(source, chosen, chosen, Needs(image=need), 0)
        readable = np.ones(len(chosen), bool)
        for index, fault in found.faults:
            readable[index] = False
            note(f"{fault.shard}, {fault.key}: {fault.detail}; not among the real pictures")
        return in_shape(found.arrays["image"], "image", 0, need.buckets), readable

    return Pairs([captions[index] for index in taken], real)


def run(specs: Sequence[PainterSpec], shards: str, wanted: PictureEvaluation) -> dict[str, Any]:
    """Paint and judge with each of `specs`, and with the base of those that have one; returns `models, log, left_out`.

    `models` has the log's row of each. Raises `ConfigError` for a CLIP that cannot be loaded and runs without captioned samples.
    """
    from diptych.pipelines.painters import open_embedder, open_painter, painter_config

    embedder = open_embedder(wanted.judge or wanted.clip, specs[0].device)
    models: list[dict[str, Any]] = []
    left_out: dict[str, None] = {}
    for spec in specs:
        config = painter_config(spec)
        pairs = held_out_pairs(config, shards, wanted.pictures)
        bases = [base for base in [spec.of_base()] if base is not None]
        for each in (*bases, spec):
            make = functools.partial(open_painter, each)
            facts = _facts(each, config)
            row, missing = assess(make, pairs, embedder, wanted, facts, _folder(each))
            models.append(row)
            left_out |= dict.fromkeys(missing)
    log = _log(specs, wanted)
    write_log(log, models)
    return {"models": models, "log": str(log.absolute()), "left_out": list(left_out)}


def plan(specs: Sequence[PainterSpec], shards: str, wanted: PictureEvaluation) -> dict[str, Any]:
    """What `run` would do with these arguments; no model is loaded and nothing is written. Raises `ConfigError` for captions and settings."""
    from diptych.config import apply_overrides
    from diptych.pipelines.painters import painter_config
    from diptych.trainers.pictures import PictureSettings

    apply_overrides(PictureSettings(), wanted.settings)
    captions = held_out_pairs(painter_config(specs[0]), shards, wanted.pictures).captions
    painters = [each for spec in specs for each in (spec.of_base(), spec) if each is not None]
    return {
        "models": [spec.name for spec in painters],
        "clip": wanted.judge or wanted.clip,
        "pictures": len(captions),
        "settings": list(wanted.settings),
        "seed": wanted.seed,
        "first caption": captions[0],
        "writes": [*(str(_folder(spec)) for spec in painters), str(_log(specs, wanted))],
    }


def _log(specs: Sequence[PainterSpec], wanted: PictureEvaluation) -> Path:
    return Path(wanted.log) if wanted.log else Path(specs[0].runs[0]).parent / "model_log.csv"


def assess(
    make: Callable[[], Any], pairs: Pairs, embedder: Embedder, wanted: PictureEvaluation, facts: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Paint the captions with the painter that `make` opens, save, judge: (the log's row, what could not be measured).

    `folder` is replaced: pictures with `metadata.jsonl`, `metrics.json`, and the grids.
    """
    from diptych.config import apply_overrides
    from diptych.trainers.picture_files import save_picture
    from diptych.trainers.picture_metrics import judge
    from diptych.trainers.pictures import PictureSettings

    settings = apply_overrides(PictureSettings(), wanted.settings)
    shutil.rmtree(folder, ignore_errors=True)
    worker = PaintWorker(PaintSpec(make, settings, str(folder), about={"model": facts["model"], "checkpoint": facts["checkpoint"]}))
    jobs = [PictureJob(number, caption, 0, wanted.seed + number) for number, caption in enumerate(pairs.captions)]
    started = time.monotonic()
    with progress(f"painting with {facts['model']}", len(jobs)) as advance:
        painted = list(worker.paint(jobs, advance))
    seconds = (time.monotonic() - started) / len(jobs)
    good = [index for index, one in enumerate(painted) if one.image is not None]
    row = facts | {"pictures": len(jobs), "seed": wanted.seed, "clip": Path(wanted.judge or wanted.clip).name}
    row |= {"nan_share": 1 - len(good) / len(jobs), "seconds_per_picture": seconds, **_settings(settings)}
    left_out: list[str] = []
    if good:
        images = np.stack([image for one in painted if (image := one.image) is not None])
        real, readable = pairs.real(*images.shape[1:3])
        shown = real[[index for index in good if readable[index]]]
        found = judge(embedder, images, [pairs.captions[index] for index in good], shown, wanted.inception)
        row |= found.figures
        left_out = found.left_out
        for index, image, score in zip(good, images, found.scores, strict=True):
            save_picture(folder, image, painted[index].about | {"clip_score": round(float(score), 3)})
        _grids(folder, worker, images, pairs.captions, wanted.seed)
    # Flagged is what a person would throw away at once: nothing in it, or nothing at all.
    row["flagged_share"] = row["nan_share"] + row.pop("blank_share", 0.0) * len(good) / len(jobs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(row, indent=2, default=str))
    return row | {"folder": str(folder)}, left_out


def _grids(folder: Path, worker: PaintWorker, images: np.ndarray, captions: Sequence[str], seed: int) -> None:
    """`prompts.jpg`: 25 prompts; `seeds.jpg`: a row for each of five prompts, five seeds across."""
    from diptych.pipelines.samples import write_grid

    write_grid(folder / "prompts.jpg", images[: _SIDE**2], _SIDE)
    jobs = [
        PictureJob(number, caption, sample, seed + sample) for number, caption in enumerate(captions[:_SIDE]) for sample in range(_SIDE)
    ]
    made = [one.image for one in worker.paint(jobs)]
    shape = images.shape[1:]
    write_grid(folder / "seeds.jpg", np.stack([np.zeros(shape, np.uint8) if image is None else image for image in made]), _SIDE)


def _folder(spec: PainterSpec) -> Path:
    run = spec.run_of("dalle2_decoder") or Path(spec.runs[0])
    return run / "evaluation" / ("pictures-base" if spec.base else "pictures")


def _settings(settings: PictureSettings) -> dict[str, Any]:
    guidance = ",".join(f"{value:g}" for value in settings.guidance)
    return {"guidance": guidance or "default", "steps": settings.steps or "default"}


def _facts(spec: PainterSpec, config: RunConfig) -> dict[str, Any]:
    from diptych.pipelines.painters import checkpoint_names
    from diptych.pipelines.runs_folder import latest_state

    step = "" if spec.base else latest_state(Path(spec.runs[-1])).get("step", "")
    facts = {"model": spec.name, "task": " + ".join(spec.tasks), "checkpoint": checkpoint_names(spec), "step": step}
    return facts | ({} if spec.base else {"lr": config.optim.lr, "global_batch_size": config.train.global_batch_size})


def write_log(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add `rows` to the model log `path` (csv) and write its page beside it; assessments that stand there are kept."""
    from diptych.pipelines.report import render_model_log

    former: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="") as file:
            former = list(csv.DictReader(file))
    entries = {_identity(row): row for row in former}
    for row in rows:
        entry = {column: _cell(row.get(column, "")) for column in LOG_COLUMNS} | {"folder": row.get("folder", "")}
        entry["assessment"] = entries.get(_identity(entry), {}).get("assessment", "")
        entries[_identity(entry)] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, [*LOG_COLUMNS, "folder"], extrasaction="ignore")
        table.writeheader()
        table.writerows(entries.values())
    temporary.replace(path)
    columns = [column for column in LOG_COLUMNS if column == "assessment" or any(entry.get(column) for entry in entries.values())]
    page = render_model_log(columns, [entry | _shown(entry) for entry in entries.values()])
    path.with_suffix(".html").write_text(page)


def _identity(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(key, "")) for key in _KEY)


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _shown(entry: dict[str, Any]) -> dict[str, Any]:
    """The grids of a row as data URIs, and the prompts of `prompts.jpg`."""
    from diptych.trainers.picture_files import read_metadata

    folder = Path(entry.get("folder") or "/nowhere")
    grids = [
        {"title": title, "data": "data:image/jpeg;base64," + base64.b64encode((folder / name).read_bytes()).decode()}
        for name, title in (("prompts.jpg", "25 prompts"), ("seeds.jpg", "5 prompts (down), 5 seeds (across)"))
        if (folder / name).is_file()
    ]
    prompts = [line["prompt"] for line in read_metadata(folder)[: _SIDE**2]] if grids else []
    return {"grids": grids, "prompts": prompts}
