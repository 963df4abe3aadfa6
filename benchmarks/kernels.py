"""Choices between torch's kernels on a CPU, each beside what it was chosen over: attention by length, AdamW fused or not.

    .venv/bin/python benchmarks/kernels.py --repeat 15

One thread. Attention: forward and backward of `scaled_dot_product_attention` in bf16, torch's fused kernel beside plain products, 4 heads of 24
for short sequences and 12 of 64 for others, about 2,048 tokens a call. AdamW: one step on the parameters of the demo's CoCa. Median milliseconds of
CPU time. Exit status 1 if a kernel that `fast_attention` or `make_optimizer` takes needs more than 1.15 times what the other one needs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _results import Results, Row, add_option
from torch.nn.attention import SDPBackend, sdpa_kernel

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines.console import show_table
from diptych.trainers.optim import make_optimizer
from diptych.trainers.precision import SHORT_ATTENTION
from diptych.trainers.tasks import load_task_class

LENGTHS = ((17, 4, 24), (50, 4, 24), (128, 12, 64), (256, 12, 64), (512, 12, 64), (1024, 12, 64))
"""(tokens, heads, width of a head)"""
TOLERANCE = 1.15


def milliseconds(call: Callable[[], object], repeat: int) -> list[float]:
    """Of `repeat` calls after two that do not count."""
    times = []
    for _ in range(repeat + 2):
        begin = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - begin))
    return times[2:]


def attention(tokens: int, heads: int, width: int, backend: SDPBackend, repeat: int) -> list[float]:
    """Forward and backward."""
    shape = (max(1, 2048 // tokens), heads, tokens, width)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def call() -> None:
        with sdpa_kernel([backend]):
            F.scaled_dot_product_attention(query, key, value).sum().backward()

    return milliseconds(call, repeat)


def optimizer_steps(repeat: int) -> dict[str, list[float]]:
    """A step of AdamW as `make_optimizer` makes it, and as torch does by default."""
    recipe = apply_overrides(load_recipe("coca", "demo"), ["optim.name=adamw"])
    task = load_task_class("coca")(recipe.task, 0)
    ours = make_optimizer(task, recipe.optim)
    default = torch.optim.AdamW(task.parameter_groups(recipe.optim.weight_decay), lr=recipe.optim.lr)
    for parameter in task.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    return {"fused": milliseconds(ours.step, repeat), "default": milliseconds(default.step, repeat)}


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15)
    add_option(parser)
    options = parser.parse_args()
    results = Results(__file__, options.results)
    torch.set_num_threads(1)
    rows, met, figures = [], True, {}
    for tokens, heads, width in LENGTHS:
        kinds = {"fused": SDPBackend.FLASH_ATTENTION, "products": SDPBackend.MATH}
        times = {name: attention(tokens, heads, width, backend, options.repeat) for name, backend in kinds.items()}
        fused, products = (statistics.median(found) for found in times.values())
        one, two = ("products", "fused") if tokens <= SHORT_ATTENTION else ("fused", "products")
        name = f"attention in bf16, {tokens} tokens: {one}"
        results.add(Row(name, "ms", times[one], two, times[two], less=True, at_least=1 / TOLERANCE))
        taken, other = (products, fused) if tokens <= SHORT_ATTENTION else (fused, products)
        met = met and taken <= TOLERANCE * other
        figures[f"attention {tokens}"] = {"fused": fused, "products": products}
        rows.append([f"{tokens} tokens", f"{fused:.2f}", f"{products:.2f}", "products" if taken is products else "fused"])
    show_table("Attention in bf16, ms", ["", "fused", "products", "taken"], rows)
    found = optimizer_steps(options.repeat)
    results.add(
        Row("AdamW on the demo's CoCa: fused", "ms", found["fused"], "torch's default", found["default"], less=True, at_least=1 / TOLERANCE)
    )
    steps = figures["adamw"] = {name: statistics.median(times) for name, times in found.items()}
    met = met and steps["fused"] <= TOLERANCE * steps["default"]
    show_table("AdamW on the demo's CoCa, ms", ["fused (taken)", "torch's default"], [[f"{value:.2f}" for value in steps.values()]])
    results.finish()
    print(json.dumps(figures))
    return met


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
