"""`diptych generate`: what a trained run makes. Texts from prompts with a gpt2 run, to the screen or a file."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from diptych.config import ConfigError, apply_overrides
from diptych.pipelines.console import finish, note, show_faults


def run(
    run_dir: str, prompts: list[str], prompt_file: str = "", out: str = "", decoding: list[str] | None = None, strategy: str = "greedy",
    *, prompt_column: str = "", workers: int = -1, gpus_per_worker: float = 0, checkpoint: str = "newest", averaged: bool = True,
    device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Generate with the run `run_dir`; returns `samples_in, samples_out, faults, seconds, texts, out`.

    `decoding` is a list of `KEY=VALUE` on top of `strategy`, a name of `decoding.STRATEGIES`. Raises `ConfigError` for a run whose task
    writes no texts, an unknown strategy or key, and prompts that cannot be continued.
    """
    from diptych.config import RunConfig
    from diptych.pipelines import generate_text
    from diptych.pipelines.runs_folder import find_run
    from diptych.trainers.decoding import STRATEGIES

    folder = find_run(run_dir)
    config = RunConfig.from_json((folder / "config.json").read_text())
    if config.task.name != "gpt2":
        raise ConfigError("RUN", run_dir, "a run of gpt2", f"It is one of {config.task.name}.")
    if strategy not in STRATEGIES:
        raise ConfigError("--strategy", strategy, ", ".join(STRATEGIES))
    chosen = apply_overrides(STRATEGIES[strategy], decoding or [])
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
    out: Annotated[str, typer.Option(help="file to write: .txt, .csv or .jsonl; default: the screen")] = "",
    strategy: Annotated[str, typer.Option(help="starting point: greedy, no-repeat-3, 'no-repeat-3 + beam 3', 'top-k 50', …")] = "greedy",
    workers: Annotated[int, typer.Option(help="Ray Data actors; 0 = none, this process; default: by the file's length")] = -1,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs of each actor")] = 0,
    checkpoint: Annotated[str, typer.Option(help="newest, best, or a checkpoint's name")] = "newest",
    averaged: Annotated[bool, typer.Option(help="take the averaged weights, where the run kept some")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
) -> None:
    """Continue prompts with RUN's model; status 1 if a file holds prompts that cannot be continued.

    Example: diptych generate runs/prompts --prompt "a castle on a hill," keywords=10 sample=true top_p=0.9
    """
    result = run(
        run_dir, prompt or [], prompts, out, decoding, strategy, prompt_column=prompt_column, workers=workers,
        gpus_per_worker=gpus_per_worker, checkpoint=checkpoint, averaged=averaged, device=device,
    )  # fmt: skip
    for row in result["texts"]:
        sys.stdout.write(row["text"] + "\n")
    show_faults(result["faults"])
    where = f" in {out}" if out else ""
    note(f"{result['samples_out']:,} texts from {result['samples_in']:,} prompts{where} in {result['seconds']:.1f} s")
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["generate", *sys.argv[1:]])
