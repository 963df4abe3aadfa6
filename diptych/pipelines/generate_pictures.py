"""Pictures from runs: files with their settings inside, or prompt–picture pairs as a new data set of shards.

Here for a few, through a pool of Ray Data actors for many. Shards are written whole, so a call that was killed and is repeated
makes only what is missing, and each prompt once. A picture depends on its prompt and seed alone, not on the pool.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.config import ConfigError, apply_overrides
from diptych.pipelines.console import note, progress
from diptych.pipelines.paint_worker import PaintSpec, Part, PictureJob

if TYPE_CHECKING:
    from diptych.pipelines.painters import PainterSpec
    from diptych.trainers.pictures import PictureSettings

_PROVENANCE = "generate.json"


@dataclass(frozen=True)
class PictureCall:
    """What is asked for, beside the models."""

    prompts: tuple[str, ...] = ()
    samples_per_prompt: int = 1
    seed: int = 0
    """Picture i of the call has seed `seed` + i."""
    settings: tuple[str, ...] = ()
    """`KEY=VALUE` of `PictureSettings`."""
    init_image: str = ""
    """File to vary, or to paint into."""
    mask: str = ""
    """File that says what of it to keep: white keeps, black is painted anew."""
    invert_mask: bool = False
    """The other way round, as in diffusers."""
    negative_prompt: str = ""
    score: str = ""
    """A CLIP that scores each picture."""
    out: str = ""
    shards: str = ""
    samples_per_shard: int = 256
    workers: int = -1
    gpus_per_worker: float = 0.0
    batch_size: int = 8

    def check(self) -> None:
        """`ConfigError` for what no painter could serve."""
        if not self.prompts and not self.init_image:
            raise ConfigError("--prompt", "nothing", "a prompt, a file of them, or --init-image", 'Example: --prompt "a red boat"')
        if self.samples_per_prompt < 1:
            raise ConfigError("--samples-per-prompt", self.samples_per_prompt, "1 or more")
        if self.out and self.shards:
            raise ConfigError("--out", self.out, "a folder for files, or --shards for a data set", "Give one of them.")
        for key, path in (("--init-image", self.init_image), ("--mask", self.mask)):
            if path and not Path(path).is_file():
                raise ConfigError(key, path, "a picture's file", "Check the path.")
        if self.mask and not self.init_image:
            raise ConfigError("--mask", self.mask, "a mask beside --init-image", "It says what of that picture to keep.")

    def jobs(self) -> list[PictureJob]:
        """A job per picture."""
        prompts, count = self.prompts or ("",), self.samples_per_prompt
        return [
            PictureJob(number, prompt, sample, self.seed + number * count + sample)
            for number, prompt in enumerate(prompts)
            for sample in range(count)
        ]


def run(spec: PainterSpec, call: PictureCall, dry_run: bool = False) -> dict[str, Any]:
    """Paint `call` with the runs of `spec`; returns `samples_in, samples_out, faults, seconds, texts, out`.

    `texts` has a row per picture that this call made: `file, prompt, seed, …`, and `clip_score` where a CLIP judged. Raises `ConfigError`
    for requests that the models cannot serve, and for a folder of shards that another call has filled. With `dry_run` nothing is loaded
    or written, and what would be is returned.
    """
    from diptych.pipelines.painters import checkpoint_names, open_painter
    from diptych.pipelines.trained import described

    # Models and checkpoint by name: a resumed call is the same call only on the same weights.
    about = {"model": spec.name, "checkpoint": checkpoint_names(spec), "averaged": spec.averaged}
    default = spec.run_of("dalle2_decoder") or Path(spec.runs[0])
    if dry_run:
        runs = [described(Path(run), spec.checkpoint, spec.averaged) for run in spec.runs]
        return {"runs": runs, "clip": spec.clip or "none", "device": spec.device} | plan(call, about, str(default / "generated"))
    return paint(functools.partial(open_painter, spec), call, about, str(default / "generated"))


def plan(call: PictureCall, about: dict[str, Any], default_out: str) -> dict[str, Any]:
    """What `paint` would do with these arguments; nothing is written. Raises `ConfigError` for a call that no painter could serve."""
    call.check()
    jobs, settings = call.jobs(), apply_overrides(_settings(), call.settings)
    if call.shards:
        _claim(call.shards, about | _facts(call, settings), call, jobs, dry_run=True)
    return {
        "settings": settings.model_dump(mode="json"),
        "samples_in": len(jobs),
        "first prompt": jobs[0].prompt,
        "first seed": jobs[0].seed,
        "init_image": call.init_image or "none",
        "mask": call.mask or "none",
        "score": call.score or "none",
        "workers": _actors(call),
        "writes": call.shards or call.out or default_out,
    }


def _settings() -> PictureSettings:
    from diptych.trainers.pictures import PictureSettings

    return PictureSettings()


def _facts(call: PictureCall, settings: PictureSettings) -> dict[str, Any]:
    """What the metadata says of the call: whatever is not as usual."""
    facts = {key: value for key, value in settings.model_dump().items() if value != type(settings).model_fields[key].default}
    facts |= {"negative_prompt": call.negative_prompt} if call.negative_prompt else {}
    return facts | ({"init_image": Path(call.init_image).name} if call.init_image else {})


def paint(make: Callable[[], Any], call: PictureCall, about: dict[str, Any], default_out: str = "pictures") -> dict[str, Any]:
    """The same with any painter, which `make` opens in the process that calls it; `about` goes into the metadata."""
    from diptych.pipelines.painters import open_embedder

    started = time.monotonic()
    call.check()
    settings = apply_overrides(_settings(), call.settings)
    jobs = call.jobs()
    facts = about | _facts(call, settings)
    spec = PaintSpec(
        make, settings, call.shards or call.out or default_out, call.samples_per_shard if call.shards else 0, call.batch_size,
        Path(call.init_image).read_bytes() if call.init_image else b"", Path(call.mask).read_bytes() if call.mask else b"",
        call.invert_mask, call.negative_prompt, functools.partial(open_embedder, call.score) if call.score else None, facts,
    )  # fmt: skip
    if call.shards:
        _claim(call.shards, facts, call, jobs)
    parts = _missing(spec, _parts(jobs, spec))
    rows: list[dict[str, Any]] = []
    with progress("painting", len(jobs)) as advance:
        advance(len(jobs) - sum(len(part.jobs) for part in parts))
        for found in _painted(spec, parts, call, advance):
            rows += found
    rows.sort(key=lambda row: (row["number"], row["sample"]))
    return _outcome(spec, jobs, rows) | {"seconds": time.monotonic() - started}


def _outcome(spec: PaintSpec, jobs: list[PictureJob], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The result; of shards that were there already, what stands in them."""
    made = [row for row in rows if not row["fault"]]
    faults = [{"shard": spec.out, "key": _key(row), "kind": "unpaintable", "detail": row["fault"]} for row in rows if row["fault"]]
    count = len(made)
    if spec.samples_per_shard:
        from diptych.datasets import storage
        from diptych.datasets.shards import shard_name

        parts = range(-(-len(jobs) // spec.samples_per_shard))
        stats = [json.loads(storage.read_bytes(storage.join(spec.out, f"{shard_name(part)}_stats.json"))) for part in parts]
        count = sum(each["successes"] for each in stats)
    texts = [{"text": row["prompt"]} | {key: value for key, value in row.items() if key not in ("prompt", "fault")} for row in made]
    return {"samples_in": len(jobs), "samples_out": count, "faults": faults, "texts": texts, "out": spec.out}


def _key(row: dict[str, Any]) -> str:
    return f"prompt {row['number']}, seed {row['seed']}"


def _parts(jobs: list[PictureJob], spec: PaintSpec) -> list[Part]:
    """A part per shard; of files, a part per batch."""
    size = spec.samples_per_shard or spec.batch_size
    return [Part(number, tuple(jobs[start : start + size])) for number, start in enumerate(range(0, len(jobs), size))]


def _missing(spec: PaintSpec, parts: list[Part]) -> list[Part]:
    if not spec.samples_per_shard:
        return parts
    from diptych.datasets.shards import ShardWriter

    writer = ShardWriter(spec.out, spec.samples_per_shard)
    missing = [part for part in parts if not writer.is_finished(part.number)]
    if len(missing) < len(parts):
        note(f"{len(parts) - len(missing)} of {len(parts)} shards were there already; painting the other {len(missing)}")
    return missing


def _painted(
    spec: PaintSpec, parts: Sequence[Part], call: PictureCall, advance: Callable[[int], None]
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """Rows of each part as it is done, in this process or by Ray Data actors."""
    from diptych.pipelines.paint_worker import PaintWorker, PooledPainter

    actors = min(_actors(call), len(parts))
    if not parts:
        return
    if not actors:
        worker = PaintWorker(spec)
        for part in parts:
            yield worker.write(part, advance)
        return
    from diptych.pipelines.ray_context import ray_session

    with ray_session(actors + 1) as ray:
        tasks = ray.data.from_items([part.row() for part in parts], override_num_blocks=len(parts))
        pool = ray.data.ActorPoolStrategy(size=actors)
        done = tasks.map(PooledPainter, fn_constructor_args=(spec,), compute=pool, num_cpus=1, num_gpus=call.gpus_per_worker or None)
        done.context.enable_progress_bars = done.context.print_on_execution_start = done.context.enable_auto_log_stats = False
        for row in done.iter_rows():
            if row["refused"]:
                raise ConfigError(*json.loads(row["refused"]))
            rows = json.loads(row["rows"])
            advance(len(rows))
            yield rows


def _actors(call: PictureCall) -> int:
    """Painting processes; 0 = this one. By default one for each GPU that `gpus_per_worker` names, and this one on a CPU."""
    if call.workers >= 0:
        return call.workers
    if not call.gpus_per_worker:
        return 0
    from diptych.pipelines.ray_context import local_gpus

    return max(1, int(local_gpus() / call.gpus_per_worker))


def _claim(out: str, facts: dict[str, Any], call: PictureCall, jobs: list[PictureJob], *, dry_run: bool = False) -> None:
    """Record what fills `out`, or with `dry_run` only look; `ConfigError` that names the difference if another call has begun it."""
    from diptych.datasets import storage

    inputs = hashlib.sha256(json.dumps([[job.prompt, job.seed] for job in jobs]).encode())
    for path in filter(None, (call.init_image, call.mask)):
        inputs.update(Path(path).read_bytes())
    mine = facts | {"samples_per_shard": call.samples_per_shard, "pictures": len(jobs), "inputs": inputs.hexdigest()}
    mine = json.loads(json.dumps(mine, default=str))
    place = storage.join(out, _PROVENANCE)
    if not storage.exists(place):
        if not dry_run:
            storage.write_bytes(place, json.dumps(mine, indent=2).encode())
        return
    former = json.loads(storage.read_bytes(place))
    changed = next((key for key in sorted(former.keys() | mine.keys()) if former.get(key) != mine.get(key)), None)
    if changed is not None:
        remedy = f"It was begun with {changed}={former.get(changed)!r}, not {mine.get(changed)!r}. Choose another folder."
        raise ConfigError("--shards", out, "a new folder, or one that the same call began", remedy)
