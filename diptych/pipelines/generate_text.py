"""Texts from prompts: a few in this process, files of them through a pool of Ray Data actors."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.config import ConfigError
from diptych.pipelines.console import progress

if TYPE_CHECKING:
    from diptych.trainers.completion import Completer
    from diptych.trainers.decoding import Decoding

_BLOCK = 64
"""Prompts that an actor computes together."""
COLUMNS = ("number", "prompt", "sample", "text", "tokens", "ended")
_FORMATS = (".txt", ".csv", ".jsonl")


def read_prompts(source: str, column: str = "") -> tuple[list[str], list[dict[str, Any]]]:
    """(prompts, faults) of a txt, csv, tsv, jsonl, json or parquet file; unreadable rows are faults and leave no prompt."""
    from diptych.datasets.pack_captions import CAPTION_COLUMNS, choose_column
    from diptych.datasets.pack_sources import open_source

    table = open_source(source)
    chosen = choose_column("prompt", column, table.columns, ("prompt", *CAPTION_COLUMNS))
    if not chosen:
        raise ConfigError(
            "--prompt-column", column, f"a column of {source}: {', '.join(table.columns)}", "None of them is called prompt or text."
        )
    prompts, faults = [], []
    for row in table.rows():
        if row.fault is not None:
            faults.append({"shard": source, "key": row.name, "kind": row.fault[0], "detail": row.fault[1]})
        else:
            prompts.append(str(row.fields.get(chosen) or ""))
    return prompts, faults


def load_completer(run_dir: str, checkpoint: str, averaged: bool, device: str) -> Completer:
    """The generation of a run's model, in the process that calls it."""
    import torch

    from diptych.pipelines.trained import load_trained
    from diptych.trainers.tasks.gpt2 import GPT2Task

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    task = load_trained(Path(run_dir), checkpoint, averaged, chosen).task
    assert isinstance(task, GPT2Task)
    return task.completer()


def complete(
    make: functools.partial[Completer], prompts: list[str], decoding: Decoding, workers: int = 0, gpus_per_worker: float = 0
) -> Iterator[dict[str, Any]]:
    """A row per text in the order of the prompts: `number, prompt, sample, text, tokens, ended, fault`.

    `workers` of 0 computes here; else that many Ray Data actors. The texts are the same: they depend on seed and number alone.
    """
    from diptych.trainers.completion import PromptWorker

    stored = decoding.model_dump_json()
    if not workers:
        worker = PromptWorker(make, stored)
        for start in range(0, len(prompts), _BLOCK):
            part = prompts[start : start + _BLOCK]
            yield from worker.rows(range(start, start + len(part)), part)
        return
    from diptych.pipelines.ray_context import ray_session

    with ray_session(workers + 1):
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        rows = [{"number": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
        dataset = ray.data.from_items(rows, override_num_blocks=max(1, -(-len(rows) // _BLOCK)))
        texts = dataset.map_batches(
            PromptWorker,
            fn_constructor_args=(make, stored),
            batch_size=_BLOCK,
            num_cpus=1,
            num_gpus=gpus_per_worker,
            compute=ActorPoolStrategy(size=workers),
        )
        yield from texts.iter_rows()


def write_texts(
    rows: Iterable[dict[str, Any]], out: str, total: int, columns: Sequence[str] = COLUMNS, names: Mapping[str, str] | None = None
) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
    """Write rows to `out` (.txt, .csv or .jsonl) as they come, or keep them if it is empty: (texts, kept, faulty rows).

    `columns` are written, under other `names` where given.
    """
    import csv

    kept: list[dict[str, Any]] = []
    faulty: list[dict[str, Any]] = []
    path = Path(out) if out else None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.part").open("w", encoding="utf-8", newline="") if path is not None else None
    table = csv.writer(file) if file is not None else None
    count, renamed = 0, names or {}
    with progress("generating", total) as advance:
        for row in rows:
            if row["sample"] == 0:
                advance(1)
            if row["fault"]:
                faulty.append(row)
                continue
            count += 1
            line = {renamed.get(column, column): row[column] for column in columns}
            if file is None or path is None:
                kept.append(line)
            elif path.suffix == ".txt":
                file.write(" ".join(row["text"].split()) + "\n")
            elif path.suffix == ".jsonl":
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            elif table is not None:
                if count == 1:
                    table.writerow(line)
                table.writerow(line.values())
    if file is not None and path is not None:
        file.close()
        Path(file.name).replace(path)
    return count, kept, faulty


def check_output(out: str) -> None:
    """Refuse an output of an unknown kind before anything is computed."""
    if out and Path(out).suffix not in _FORMATS:
        raise ConfigError("--out", out, f"a file that ends in {', '.join(_FORMATS)}")


def run(
    run_dir: Path, prompts: list[str], prompt_file: str, out: str, decoding: Decoding, *, prompt_column: str = "",
    workers: int = -1, gpus_per_worker: float = 0, checkpoint: str = "newest", averaged: bool = True, device: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Complete `prompts`, or those of `prompt_file`; returns `samples_in, samples_out, faults, seconds, texts, out`.

    `workers` of -1 takes the machine's cores for a file of many prompts, and this process for a few. With `dry_run` nothing is loaded
    or written, and what would be is returned.
    """
    import os

    from diptych.pipelines.trained import described

    started = time.monotonic()
    check_output(out)
    faults: list[dict[str, Any]] = []
    if prompt_file:
        prompts, faults = read_prompts(prompt_file, prompt_column)
    if workers < 0:
        workers = min(os.cpu_count() or 1, len(prompts) // (8 * _BLOCK)) if prompt_file else 0
    if dry_run:
        about = described(run_dir, checkpoint, averaged) | {
            "device": device,
            "workers": workers,
            "decoding": decoding.model_dump(mode="json"),
        }
        return about | {
            "samples_in": len(prompts),
            "faults": len(faults),
            "first prompt": next(iter(prompts), "none"),
            "writes": out or "the screen",
        }
    make = functools.partial(load_completer, str(run_dir), checkpoint, averaged, device)
    count, kept, faulty = write_texts(complete(make, prompts, decoding, workers, gpus_per_worker), out, len(prompts))
    if faulty and not prompt_file:
        raise ConfigError("--prompt", faulty[0]["prompt"], "a text that the model can continue", f"It {faulty[0]['fault']}.")
    source = prompt_file or "--prompt"
    faults += [{"shard": source, "key": str(row["number"]), "kind": "unusable_prompt", "detail": row["fault"]} for row in faulty]
    seconds = time.monotonic() - started
    return {"samples_in": len(prompts), "samples_out": count, "faults": faults, "seconds": seconds, "texts": kept, "out": out}
