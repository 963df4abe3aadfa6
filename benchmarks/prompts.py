"""GPT-2 on real prompts: held-out perplexity beside n-gram baselines, the strategies table, and how often texts end by themselves.

    python benchmarks/prompts.py ../shared/data/prompts.txt OUT [KEY=VALUE …]

Trains the recipe `prompts_small` in this process, with one thread per core (about 12 minutes on 2 idle cores; a call that was stopped goes
on where its last checkpoint stands), and compares it with a unigram and two trigram models over the same tokens. Exit status 1 if the
perplexity is above 0.8 of the interpolated trigram's, sampling leads the strategies, or less than 90 % of greedy texts end within 128 tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from _results import Results, Row, run_script
from _runs import train
from ngrams import LinearTrigram, NgramModel

from diptych.batches import StepBatch
from diptych.config import RunConfig, apply_overrides, load_recipe
from diptych.datasets.stream import LocalStream, StreamSpec
from diptych.pipelines import pack
from diptych.pipelines.console import show_table
from diptych.pipelines.prepare import prepare
from diptych.pipelines.trained import load_trained
from diptych.trainers.decoding import Decoding
from diptych.trainers.micro_batches import to_device
from diptych.trainers.prompt_evaluation import beginning, evaluate_prompts
from diptych.trainers.tasks.gpt2 import GPT2Task


def whole(spec: StreamSpec) -> Iterator[StepBatch]:
    """One pass over all of a selection."""
    size = min(250, spec.selection.samples)
    return iter(LocalStream(replace(spec, finite=True, shuffle=False, global_batch_size=size, micro_batches=1), 0, 1, 0, None))


def tokens_of(spec: StreamSpec) -> list[list[int]]:
    texts = []
    for share in whole(spec):
        arrays = share.arrays
        for tokens, mask, weight in zip(arrays["tokens"], arrays["token_mask"], arrays["weight"], strict=True):
            if weight:
                texts.append(tokens[mask].tolist())
    return texts


@torch.no_grad()
def perplexity(task: GPT2Task, spec: StreamSpec) -> tuple[float, float]:
    """(perplexity, accuracy) over all held-out label tokens."""
    nll = right = count = 0.0
    for share in whole(spec):
        terms = task.validate(to_device(share.arrays, torch.device("cpu"))).terms
        nll, count = nll + float(terms["next_token"].sum), count + float(terms["next_token"].weight)
        right += float(terms["accuracy"].sum)
    return float(torch.tensor(nll / count).exp()), right / count


def trained(data: Path, out: Path, overrides: list[str]) -> tuple[RunConfig, GPT2Task, tuple[float, float]]:
    """Pack, train or go on training, and load; with the seconds that this call trained, by the clock and of all cores together."""
    if not (out / "shards").is_dir():
        pack.run(str(data), str(out / "shards"), jobs=1)
    config = apply_overrides(
        load_recipe("gpt2", "prompts_small"), [f"data.shards={out / 'shards'}", "checkpoint.every_steps=100", *overrides]
    )
    started = time.monotonic(), time.process_time()
    train(config, out / "run")
    seconds = time.monotonic() - started[0], time.process_time() - started[1]
    task = load_trained(out / "run").task
    assert isinstance(task, GPT2Task)
    return config, task, seconds


def main(data: Path, out: Path, overrides: list[str], recorded: Results) -> bool:
    config, task, seconds = trained(data, out, overrides)
    prepared = prepare(RunConfig.from_json((out / "run" / "config.json").read_text()), out / "run")
    assert prepared.validation is not None
    held_out = prepared.validation
    train_texts, texts = tokens_of(prepared.train), tokens_of(held_out)
    size = task.vocabulary.size
    ours, accuracy = perplexity(task, held_out)
    figures = {
        "gpt2": ours,
        "unigram": NgramModel(train_texts, 1, size).perplexity(texts),
        "trigram, linear": LinearTrigram(train_texts, size).perplexity(texts),
        "trigram, Kneser-Ney": NgramModel(train_texts, 3, size).perplexity(texts),
    }
    parameters = sum(parameter.numel() for parameter in task.parameters()) / 1e6
    about = (
        f"{len(train_texts):,} prompts, {sum(map(len, train_texts)):,} tokens, {parameters:.1f} M parameters, {config.train.steps} steps"
    )
    show_table(
        f"Held-out perplexity ({about}; this call trained {seconds[0]:.0f} s, {seconds[1]:.0f} s of CPU)",
        ["model", "perplexity"],
        [[k, f"{v:.2f}"] for k, v in figures.items()],
    )
    written = [task.tokenizer.decode(text, skip_special_tokens=True) for text in texts]
    evaluation = evaluate_prompts(task.completer(), written, samples=200)
    (table,) = evaluation.tables
    show_table(table.title, table.columns, [[row[0], *(f"{value:.2f}" for value in row[1:])] for row in table.rows])
    starts = [beginning(text, 1) if "," in text else text for text in written]
    first = task.completer().complete(starts, Decoding(max_new_tokens=128))
    ended = sum(texts_of[0].ended for texts_of in first) / len(first)
    rouge = {row[0]: row[1:3] for row in table.rows}
    leaders = {"greedy", "no-repeat-3", "no-repeat-3 + beam 3"}
    results = {
        "train_seconds": seconds[0],
        "train_cpu_seconds": seconds[1],
        "perplexity": figures,
        "ratio_linear": ours / figures["trigram, linear"],
        "ratio_kneser_ney": ours / figures["trigram, Kneser-Ney"],
        "accuracy": accuracy,
        "ended": ended,
        "rouge_l": rouge,
    }
    checks = {
        "perplexity at most 0.8 of the trigram's": results["ratio_linear"] <= 0.8,
        "greedy or no-repeat leads": all(max(rouge, key=lambda name: rouge[name][index]) in leaders for index in (0, 1)),
        "at least 90 % of greedy texts end": ended >= 0.9,
    }
    (out / "prompts.json").write_text(json.dumps(results | {"checks": checks}, indent=2))
    case = f"GPT-2 on {len(train_texts):,} prompts"
    peers = {name: value for name, value in figures.items() if name.startswith("trigram")}
    for name, value in peers.items():
        goal = 1.25 if name == "trigram, linear" else None
        recorded.add(
            Row(f"{case}: held-out perplexity beside {name}", "", [ours], name, [value], less=True, at_least=goal, headline=bool(goal))
        )
    recorded.add(Row(f"{case}: share of greedy texts that end by themselves", "", [ended], at_least=0.9))
    recorded.check(f"{case}: greedy or no-repeat leads the strategies on ROUGE-L", checks["greedy or no-repeat leads"])
    recorded.finish()
    print(json.dumps(results | {"checks": checks}))
    return all(checks.values())


if __name__ == "__main__":
    run_script(main, __file__, __doc__, ("data", "out"))
