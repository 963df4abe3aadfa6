"""`diptych generate`: what a trained run makes, to the screen or a file.

gpt2 continues prompts; coca captions pictures; clip_vit predicts the prompt embedding of pictures and names the nearest prompts;
stable_diffusion, and dalle2_prior with dalle2_decoder, paint: pictures of prompts, variations, and parts of a picture anew.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diptych.config import ConfigError, apply_overrides
from diptych.pipelines.console import finish, note, show_faults, would
from diptych.pipelines.options import AsJson, Averaged, Checkpoint, Device, DryRun

if TYPE_CHECKING:
    from diptych.trainers.decoding import Decoding

_FROM_IMAGES = ("coca", "clip_vit")


def run(
    runs: str | list[str], prompts: list[str], prompt_file: str = "", out: str = "", decoding: list[str] | None = None, strategy: str = "greedy",
    *, prompt_column: str = "", images: str = "", neighbours: int = 3, workers: int = -1, gpus_per_worker: float = 0,
    checkpoint: str = "newest", averaged: bool = True, device: str = "auto", pictures: dict[str, Any] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Generate with `runs`; returns `samples_in, samples_out, faults, seconds, texts, out`.

    `decoding` is a list of `KEY=VALUE`: of text on top of `strategy`, a name of `decoding.STRATEGIES`; of pictures, `PictureSettings`.
    `pictures` are further fields of `generate_pictures.PictureCall`, and `clip`, and `prompts_from`: a gpt2 run that writes the prompts.
    With `dry_run` nothing is loaded or written, and what would be is returned. Raises `ConfigError` for runs whose tasks generate nothing from what is given, an unknown strategy or key, and prompts that cannot be
    continued.
    """
    from diptych.config import RunConfig
    from diptych.pipelines import generate_from_images, generate_text
    from diptych.pipelines.painters import PICTURE_TASKS
    from diptych.pipelines.runs_folder import find_run

    names = [runs] if isinstance(runs, str) else runs
    folders = [find_run(name) for name in names]
    config = RunConfig.from_json((folders[0] / "config.json").read_text())
    if config.task.name in PICTURE_TASKS:
        return _pictures(
            names, prompts, prompt_file, out, decoding or [], strategy, prompt_column=prompt_column, workers=workers,
            gpus_per_worker=gpus_per_worker, checkpoint=checkpoint, averaged=averaged, device=device, options=dict(pictures or {}),
            dry_run=dry_run,
        )  # fmt: skip
    if config.task.name not in ("gpt2", *_FROM_IMAGES):
        raise ConfigError(
            "RUN", names[0], f"a run of gpt2, {', '.join((*_FROM_IMAGES, *PICTURE_TASKS))}", f"It is one of {config.task.name}."
        )
    if len(folders) > 1:
        raise ConfigError("RUN", " ".join(names), "one run", "Only dalle2_prior and dalle2_decoder go together.")
    chosen = _decoding(strategy, decoding or [])
    if config.task.name in _FROM_IMAGES:
        if not images or prompts or prompt_file:
            raise ConfigError(
                "--images", images, "a picture or a folder of them", f"A run of {config.task.name} takes pictures, not prompts."
            )
        return generate_from_images.run(
            folders[0], images, out, chosen, neighbours=neighbours, checkpoint=checkpoint, averaged=averaged, device=device, dry_run=dry_run
        )
    if images:
        raise ConfigError("--images", images, "no pictures", "A run of gpt2 takes prompts: --prompt or --prompts.")
    if not prompts and not prompt_file:
        prompts = [getattr(config.task, "prefix", "")]
    return generate_text.run(
        folders[0], prompts, prompt_file, out, chosen, prompt_column=prompt_column, workers=workers, gpus_per_worker=gpus_per_worker,
        checkpoint=checkpoint, averaged=averaged, device=device, dry_run=dry_run,
    )  # fmt: skip


def _decoding(strategy: str, overrides: list[str]) -> Decoding:
    from diptych.trainers.decoding import STRATEGIES

    if strategy not in STRATEGIES:
        raise ConfigError("--strategy", strategy, ", ".join(STRATEGIES))
    return apply_overrides(STRATEGIES[strategy], overrides)


def _pictures(
    names: list[str], prompts: list[str], prompt_file: str, out: str, settings: list[str], strategy: str, *, prompt_column: str,
    workers: int, gpus_per_worker: float, checkpoint: str, averaged: bool, device: str, options: dict[str, Any],
    dry_run: bool,
) -> dict[str, Any]:  # fmt: skip
    """Paint: prompts as they are, from a file, or written by a gpt2 run whose decoding shares `settings` with the painter."""
    from diptych.pipelines import generate_pictures, generate_text
    from diptych.pipelines.painters import painter_spec
    from diptych.trainers.decoding import Decoding

    planned: dict[str, Any] = {}
    clip, writer = options.pop("clip", ""), options.pop("prompts_from", "")
    spec = painter_spec(names, clip=clip, checkpoint=checkpoint, averaged=averaged, device=device)
    faults: list[dict[str, Any]] = []
    if prompt_file:
        found, faults = generate_text.read_prompts(prompt_file, prompt_column)
        prompts = [*prompts, *found]
    if writer:
        of_text = [text for text in settings if text.partition("=")[0] in Decoding.model_fields]
        settings = [text for text in settings if text not in of_text]
        written = run(
            writer, prompts, decoding=of_text, strategy=strategy, workers=0, checkpoint=checkpoint, averaged=averaged, device=device,
            dry_run=dry_run,
        )  # fmt: skip
        if dry_run:
            planned = {"prompts_from": written}
            prompts = [f"what {writer} makes of {prompt!r}" for prompt in prompts or [""]]
        else:
            prompts, faults = [" ".join(row["text"].split()) for row in written["texts"]], faults + written["faults"]
    empty = [number for number, prompt in enumerate(prompts) if not prompt.strip()]
    faults += [{"shard": prompt_file or "--prompt", "key": str(number), "kind": "empty_prompt", "detail": "no text"} for number in empty]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    call = generate_pictures.PictureCall(
        tuple(prompts), settings=tuple(settings), score=clip, out=out, workers=workers, gpus_per_worker=gpus_per_worker, **options
    )
    if dry_run:
        return planned | generate_pictures.run(spec, call, dry_run=True) | {"faults": len(faults)}
    result = generate_pictures.run(spec, call)
    return result | {"faults": [*faults, *result["faults"]]}


def command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN... [KEY=VALUE]...", help="runs (folders, or names under runs/), then top_k=50, steps=30, …")
    ],
    *,
    prompt: Annotated[list[str] | None, typer.Option(help="a beginning to continue, or what to paint; may be repeated")] = None,
    prompts: Annotated[str, typer.Option(help="file of them: txt (one a line), csv, jsonl or parquet")] = "",
    prompt_column: Annotated[str, typer.Option(help="its column; default: the first that looks like one")] = "",
    images: Annotated[str, typer.Option(help="a picture or a folder of them, to caption (coca) or embed (clip_vit)")] = "",
    neighbours: Annotated[int, typer.Option(help="clip_vit: nearest prompts to name for each picture; 0 = none")] = 3,
    out: Annotated[str, typer.Option(help="texts: .txt, .csv or .jsonl; pictures: a folder; default: screen, RUN/generated")] = "",
    shards: Annotated[str, typer.Option(help="pictures: write prompt-picture pairs as a data set here; resumable")] = "",
    prompts_from: Annotated[str, typer.Option(metavar="RUN", help="pictures: a gpt2 run that continues --prompt(s) first")] = "",
    samples_per_prompt: Annotated[int, typer.Option(help="pictures of each prompt")] = 1,
    seed: Annotated[int, typer.Option(help="pictures: seed of the first; the next has the next")] = 0,
    negative_prompt: Annotated[str, typer.Option(help="pictures: what guidance leads away from")] = "",
    init_image: Annotated[str, typer.Option(help="pictures: a picture to vary, or to paint into with --mask")] = "",
    mask: Annotated[str, typer.Option(help="pictures: white keeps --init-image, black is painted anew")] = "",
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="white is painted anew, as in diffusers")] = False,
    clip: Annotated[str, typer.Option(help="CLIP (name, folder, exported run): the prior's, and scores each picture")] = "",
    batch_size: Annotated[int, typer.Option(help="pictures painted together")] = 8,
    samples_per_shard: Annotated[int, typer.Option(help="pictures of a shard")] = 256,
    strategy: Annotated[str, typer.Option(help="text: greedy, no-repeat-3, 'no-repeat-3 + beam 3', 'top-k 50', …")] = "greedy",
    workers: Annotated[int, typer.Option(help="Ray Data actors; 0 = none, this process; default: by the work")] = -1,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs of each actor")] = 0,
    checkpoint: Checkpoint = "newest",
    averaged: Averaged = True,
    device: Device = "auto",
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Continue prompts, caption pictures, predict their prompts, or paint, with RUN's model; status 1 if some input was unusable.

    Example: diptych generate runs/painter --prompt "a red boat" --samples-per-prompt 4 steps=30 guidance=7.5
    """
    runs = [text for text in arguments if "=" not in text]
    if not runs:
        raise ConfigError("RUN", " ".join(arguments), "a run before KEY=VALUE", "`diptych runs` lists them.")
    pictures = {
        "clip": clip, "prompts_from": prompts_from, "samples_per_prompt": samples_per_prompt, "seed": seed, "negative_prompt": negative_prompt,
        "init_image": init_image, "mask": mask, "invert_mask": invert_mask, "shards": shards, "batch_size": batch_size,
        "samples_per_shard": samples_per_shard,
    }  # fmt: skip
    call = functools.partial(
        run, runs, prompt or [], prompts, out, [text for text in arguments if "=" in text], strategy, prompt_column=prompt_column, images=images,
        neighbours=neighbours, workers=workers, gpus_per_worker=gpus_per_worker, checkpoint=checkpoint, averaged=averaged, device=device,
        pictures=pictures, dry_run=dry_run,
    )  # fmt: skip
    if dry_run:
        would("generate", call, json)
    result = call()
    for row in result["texts"]:
        where = [row[key] for key in ("image", "file") if key in row]
        where += [f"{row[key]:.3f}" for key in ("cosine", "clip_score") if key in row]
        sys.stdout.write("\t".join([*where, row["text"]]) + "\n")
    show_faults(result["faults"])
    place = f" in {result['out']}" if result["out"] else ""
    note(f"{result['samples_out']:,} results from {result['samples_in']:,} inputs{place} in {result['seconds']:.1f} s")
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["generate", *sys.argv[1:]])
