"""`diptych generate`: what a trained run makes, to the screen or a file.

gpt2 continues prompts; coca captions pictures; clip_vit predicts the prompt embedding of pictures and names the nearest prompts.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from diptych.config import ConfigError, apply_overrides
from diptych.pipelines.console import finish, note, show_faults

_FROM_IMAGES = ("coca", "clip_vit")


def run(
    run_dir: str, prompts: list[str], prompt_file: str = "", out: str = "", decoding: list[str] | None = None, strategy: str = "greedy",
    *, prompt_column: str = "", images: str = "", neighbours: int = 3, workers: int = -1, gpus_per_worker: float = 0,
    checkpoint: str = "newest", averaged: bool = True, device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Generate with the run `run_dir`; returns `samples_in, samples_out, faults, seconds, texts, out`.

    `decoding` is a list of `KEY=VALUE` on top of `strategy`, a name of `decoding.STRATEGIES`. Raises `ConfigError` for a run whose task
    generates nothing from what is given, an unknown strategy or key, and prompts that cannot be continued.
    """
    from diptych.config import RunConfig
    from diptych.pipelines import generate_from_images, generate_text
    from diptych.pipelines.runs_folder import find_run
    from diptych.trainers.decoding import STRATEGIES

    folder = find_run(run_dir)
    config = RunConfig.from_json((folder / "config.json").read_text())
    if config.task.name not in ("gpt2", *_FROM_IMAGES):
        raise ConfigError("RUN", run_dir, f"a run of gpt2, {', '.join(_FROM_IMAGES)}", f"It is one of {config.task.name}.")
    if strategy not in STRATEGIES:
        raise ConfigError("--strategy", strategy, ", ".join(STRATEGIES))
    chosen = apply_overrides(STRATEGIES[strategy], decoding or [])
    if config.task.name in _FROM_IMAGES:
        if not images or prompts or prompt_file:
            raise ConfigError(
                "--images", images, "a picture or a folder of them", f"A run of {config.task.name} takes pictures, not prompts."
            )
        return generate_from_images.run(
            folder, images, out, chosen, neighbours=neighbours, checkpoint=checkpoint, averaged=averaged, device=device
        )
    if images:
        raise ConfigError("--images", images, "no pictures", "A run of gpt2 takes prompts: --prompt or --prompts.")
    if not prompts and not prompt_file:
        prompts = [getattr(config.task, "prefix", "")]
    return generate_text.run(
        folder, prompts, prompt_file, out, chosen, prompt_column=prompt_column, workers=workers, gpus_per_worker=gpus_per_worker,
        checkpoint=checkpoint, averaged=averaged, device=device,
    )  # fmt: skip


def command(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or a name under runs/")],
    decoding: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="top_k=50, keywords=10, max_new_tokens=64, …")
    ] = None,
    *,
    prompt: Annotated[list[str] | None, typer.Option(help="a beginning to continue; may be repeated")] = None,
    prompts: Annotated[str, typer.Option(help="file of beginnings: txt (one a line), csv, jsonl or parquet")] = "",
    prompt_column: Annotated[str, typer.Option(help="its column; default: the first that looks like one")] = "",
    images: Annotated[str, typer.Option(help="a picture or a folder of them, to caption (coca) or embed (clip_vit)")] = "",
    neighbours: Annotated[int, typer.Option(help="clip_vit: nearest prompts of the run's data to name for each picture; 0 = none")] = 3,
    out: Annotated[str, typer.Option(help="file to write: .txt, .csv or .jsonl; default: the screen")] = "",
    strategy: Annotated[str, typer.Option(help="starting point: greedy, no-repeat-3, 'no-repeat-3 + beam 3', 'top-k 50', …")] = "greedy",
    workers: Annotated[int, typer.Option(help="Ray Data actors; 0 = none, this process; default: by the file's length")] = -1,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs of each actor")] = 0,
    checkpoint: Annotated[str, typer.Option(help="newest, best, or a checkpoint's name")] = "newest",
    averaged: Annotated[bool, typer.Option(help="take the averaged weights, where the run kept some")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
) -> None:
    """Continue prompts, caption pictures or predict their prompts with RUN's model; status 1 if some of the input was unusable.

    Example: diptych generate runs/prompts --prompt "a castle on a hill," keywords=10 sample=true top_p=0.9
    """
    result = run(
        run_dir, prompt or [], prompts, out, decoding, strategy, prompt_column=prompt_column, images=images,
        neighbours=neighbours, workers=workers, gpus_per_worker=gpus_per_worker, checkpoint=checkpoint, averaged=averaged, device=device,
    )  # fmt: skip
    for row in result["texts"]:
        where = [row["image"]] if "image" in row else []
        where += [f"{row['cosine']:.3f}"] if "cosine" in row else []
        sys.stdout.write("\t".join([*where, row["text"]]) + "\n")
    show_faults(result["faults"])
    place = f" in {out}" if out else ""
    note(f"{result['samples_out']:,} results from {result['samples_in']:,} inputs{place} in {result['seconds']:.1f} s")
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["generate", *sys.argv[1:]])
