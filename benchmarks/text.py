"""GPT-2 beside transformers: tokens per second of training (its own Trainer) and of generation (`model.generate`).

    python benchmarks/text.py ../shared/data/prompts.txt OUT [--steps N] [--layers L] [--width W]

Both train the same model on the same prompts, batch size and threads, in rounds that alternate; medians over the rounds. Ours reads shards through the stream, with logging; tokens are those of prompts, not padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _results import Results, Row, add_option
from _runs import train

from diptych.config import RunConfig, apply_overrides, load_recipe
from diptych.datasets.tokens import load_tokenizer
from diptych.pipelines import pack
from diptych.pipelines.console import show_table
from diptych.pipelines.prepare import prepare
from diptych.trainers.decoding import Decoding
from diptych.trainers.gpt2_steps import GPT2Steps
from diptych.trainers.journal import read_metrics
from diptych.trainers.tasks.gpt2 import GPT2Task
from diptych.trainers.text_generation import Prompts, generate

_WARM = 5
"""Steps before a rate is taken."""


def ours(config: RunConfig, out: Path, batching: str, number: int) -> tuple[float, float]:
    """(tokens per second, share of padding) of our loop."""
    config = apply_overrides(config, [f"task.batching={batching}"])
    run_dir = out / f"{batching}{number}"
    train(config, run_dir)
    lines = [line["metrics"] for line in read_metrics(str(run_dir)) if line["step"] > _WARM]
    seconds = [config.train.global_batch_size * config.train.log_every / line["train/samples_per_second"] for line in lines]
    tokens = sum(line["train/tokens_per_second"] * part for line, part in zip(lines, seconds, strict=True))
    return tokens / sum(seconds), sum(line["train/padding"] for line in lines) / len(lines)


def trainer(config: RunConfig, texts: list[list[int]], out: Path) -> tuple[float, float]:
    """(tokens per second, share of padding) of transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    task = GPT2Task(config.task, seed=0)  # type: ignore[arg-type]
    pad, batch_size, seen = task.vocabulary.pad, config.train.global_batch_size, {"tokens": 0, "cells": 0}

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)
        ids = torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in rows])
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.times.append(time.perf_counter())

    class Counting(Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            if len(clock.times) >= _WARM:
                seen["tokens"] += int(inputs["attention_mask"].sum())
                seen["cells"] += inputs["attention_mask"].numel()
            return super().training_step(model, inputs, *rest)

    clock = Clock()
    Clock.times = clock.times = []
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"), max_steps=config.train.steps, per_device_train_batch_size=batch_size, learning_rate=config.optim.lr,
        use_cpu=True, report_to=[], save_strategy="no", logging_steps=config.train.log_every, disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    Counting(
        model=task.gpt2, args=arguments, train_dataset=[{"input_ids": text} for text in texts], data_collator=collate, callbacks=[clock]
    ).train()
    seconds = clock.times[-1] - clock.times[_WARM - 1]
    return seen["tokens"] / seconds, 1 - seen["tokens"] / seen["cells"]


def generation(task: GPT2Task, texts: list[list[int]], rounds: int, results: Results) -> list[list[Any]]:
    """New tokens per second for each strategy, ours beside transformers', on the same left-padded prompts."""
    model = task.gpt2.eval()
    starts = [text[: 4 + index % 5] for index, text in enumerate(texts[:64])]
    width = max(map(len, starts))
    tokens = torch.tensor([[task.vocabulary.pad] * (width - len(start)) + start for start in starts])
    mask = torch.arange(width) >= width - torch.tensor([len(start) for start in starts])[:, None]
    prompts = Prompts(tokens, mask, torch.arange(len(starts)))
    rows = []
    cases = {"greedy": {}, "no-repeat-3": {"no_repeat_ngram": 3}, "beam 3": {"num_beams": 3}, "top-k 50": {"sample": True, "top_k": 50}}
    for name, case in cases.items():
        decoding = Decoding(max_new_tokens=48, **case)

        def run_ours(decoding: Decoding = decoding) -> None:
            generate(GPT2Steps(model), prompts, task.vocabulary.end, decoding)

        def run_theirs(decoding: Decoding = decoding) -> None:
            sampling = {"do_sample": True, "top_k": decoding.top_k} if decoding.sample else {"do_sample": False}
            with torch.no_grad():
                model.generate(
                    tokens, attention_mask=mask.long(), max_new_tokens=48, num_beams=decoding.num_beams, pad_token_id=task.vocabulary.pad,
                    no_repeat_ngram_size=decoding.no_repeat_ngram, **sampling,
                )  # fmt: skip

        seconds: tuple[list[float], list[float]] = [], []
        for number in range(rounds + 1):
            for index, call in enumerate((run_ours, run_theirs)):
                started = time.perf_counter()
                call()
                if number:  # the first one warms up
                    seconds[index].append(time.perf_counter() - started)
        what = f"GPT-2 writes, {name}: {len(starts)} prompts, at most 48 tokens"
        row = Row(what, "s", seconds[0], "transformers' generate", seconds[1], less=True, at_least=1.0, headline=True)
        assert results.add(row).ratio
        ours, theirs = row.median["ours"], row.median["peer"]
        rows.append([name, f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}"])
    return rows


def record(results: Results, rates: dict[str, list[tuple[float, float]]], case: str) -> None:
    """Every way of batching beside the Trainer: tokens of prompts per second, and the share of the computed ones that is padding."""
    peer = "transformers Trainer"
    for name, found in rates.items():
        if name != peer:
            goal = 1.0 if name == "ours, trim" else 1.3
            what, sides = f"{case}, batching by {name.removeprefix('ours, ')}", (found, rates[peer])
            speeds, padding = ([[pair[part] for pair in side] for side in sides] for part in (0, 1))
            results.add(Row(what, "tokens/s", speeds[0], peer, speeds[1], at_least=goal, headline=True))
            results.add(Row(f"{what}: padding", "", padding[0], peer, padding[1], less=True))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("out", type=Path)
    for name, default in (("steps", 30), ("rounds", 3), ("layers", 4), ("width", 256), ("batch", 32)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    add_option(arguments)
    given = arguments.parse_args()
    results = Results(__file__, given.results)
    if not (given.out / "shards").is_dir():
        pack.run(str(given.data), str(given.out / "shards"), jobs=1)
    overrides = [
        f"data.shards={given.out / 'shards'}",
        f"task.architecture.layers={given.layers}",
        f"task.architecture.width={given.width}",
    ]
    overrides += [
        f"train.steps={given.steps}",
        f"train.global_batch_size={given.batch}",
        f"train.log_every={_WARM}",
        "train.precision=fp32",
    ]
    config = apply_overrides(
        load_recipe("gpt2", "prompts_small"),
        [*overrides, "validation.samples=0", "optim.name=adamw", "optim.warmup_steps=0", "task.batching=trim"],
    )
    prepared = prepare(config, given.out / "prepared")
    config = prepared.config
    lines = [line.strip() for line in given.data.read_text().splitlines() if line.strip()]
    ids, mask = load_tokenizer(config.task.tokenizer).encode(lines, config.task.length)  # type: ignore[attr-defined]
    texts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    stamp = time.time_ns()
    rates: dict[str, list[tuple[float, float]]] = {}
    for number in range(given.rounds):
        for batching in ("trim", "bucket", "pack"):
            rates.setdefault(f"ours, {batching}", []).append(ours(config, given.out / f"runs{stamp}", batching, number))
        rates.setdefault("transformers Trainer", []).append(trainer(config, texts, given.out))
    record(results, rates, f"GPT-2 trains, {given.layers} layers × {given.width}, batch {given.batch}, fp32")
    best = {name: (statistics.median(rate for rate, _ in found), found[0][1]) for name, found in rates.items()}
    peer = best["transformers Trainer"][0]
    rows = [[name, f"{rate:,.0f}", f"{rate / peer:.2f}", f"{100 * padding:.1f} %"] for name, (rate, padding) in best.items()]
    title = f"Training: {given.layers} layers × {given.width}, batch {given.batch}, {torch.get_num_threads()} threads, fp32"
    show_table(title, ["loop", "tokens/s", "× Trainer", "padding"], rows)
    made = generation(GPT2Task(config.task, seed=0), texts, given.rounds, results)  # type: ignore[arg-type]
    show_table("Generation: 64 prompts, at most 48 tokens, seconds", ["strategy", "ours", "transformers", "×"], made)
    results.finish()
    print(json.dumps({"training": {name: rate for name, (rate, _) in best.items()}, "generation": made}))
    return 0 if best["ours, trim"][0] >= peer and all(float(row[3]) >= 1 for row in made) else 1


if __name__ == "__main__":
    sys.exit(main())
