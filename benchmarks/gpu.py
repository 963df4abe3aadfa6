"""Each task's training step at its published size on one GPU, beside the peer's: samples/s, model FLOPs utilisation, memory.

    .venv/bin/python benchmarks/gpu.py OUT --compile --repeat 3

GPT-2 124M at 1,024 tokens, CLIP ViT-L/14 (all of it learns), CoCa ViT-L-14, Stable Diffusion 1.5's U-Net at 512 pixels from cached latents and text states, LAION's
prior without token states, the base decoder of the recipe `base`. Fresh weights, batches that are on the card, bf16, AdamW, no averages on either side.
Ours is the strategy and the objective of a training worker; the peer's step is the library's own model and loss (transformers, open_clip, diffusers, DALLE2-pytorch) under
autocast with fused AdamW and clipping, as its trainer does it; it has what our tasks change of that model (a fused GELU, channels last), so only the step differs. `--compile` compiles both. Sides take turns, each in a fresh process, a step's seconds being
the median of `--steps` after a warm-up. FLOPs are counted by torch in the peer's forward and backward pass, for both. Exit status 1 if ours is slower, or below
50 % of the card's peak for GPT-2 and CLIP, 40 % for Stable Diffusion and CoCa. `--small` takes the recipes `smoke`, `--device cpu` any machine: to see that it runs,
not to compare, as there Stable Diffusion encodes its pictures on our side alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _fresh import fresh
from _memory import peak_megabytes
from _results import Results, Row, add_option
from torch.nn import functional

from diptych.config import RunConfig, apply_overrides, load_recipe
from diptych.trainers.objective import accumulate, local_weights
from diptych.trainers.strategies import make_strategy
from diptych.trainers.task import Task
from diptych.trainers.tasks import load_task_class
from diptych.trainers.throughput import peak_flops

WARM_UP = 5


@dataclass(frozen=True)
class Case:
    """A task at its published size."""

    recipe: str
    overrides: tuple[str, ...]
    small: tuple[str, ...]
    """What the recipe `smoke` needs."""
    batch: int
    peer: str
    mfu: float | None
    """Goal."""


class Side(NamedTuple):
    """What is measured."""

    step: Callable[[], None]
    samples: int
    """Of a step."""
    model: torch.nn.Module


CASES = {
    "gpt2": Case(
        "smoke",
        ("task.tokenizer=train:50257", "task.architecture.layers=12", "task.architecture.width=768", "task.architecture.heads=12",
         "task.architecture.positions=1024", "task.length=1024"),
        (), 16, "transformers' GPT2LMHeadModel", 0.5,
    ),
    "clip_vit": Case(
        "smoke",
        ("task.architecture.layers=24", "task.architecture.width=1024", "task.architecture.heads=16", "task.architecture.patch_size=14",
         "task.image_size=224", "task.embed_dim=768"),
        ("task.embed_dim=32",), 64, "transformers' CLIPVisionModel", 0.5,
    ),
    "coca": Case(
        "image_to_prompt", ("task.pretrained=", "task.contrastive_weight=1"), (), 64, "open_clip's CoCa and CoCaLoss", 0.4,
    ),
    "stable_diffusion": Case(
        "lora_reports", ("task.train=unet", "task.image_size=512", "task.cached=latents,text-states"), (), 8, "diffusers' U-Net", 0.4,
    ),
    "dalle2_prior": Case("published", ("task.pretrained=",), ("task.embed_dim=32",), 512, "DALLE2-pytorch's DiffusionPrior", None),
    "dalle2_decoder": Case("base", ("task.image_embed_dim=768",), ("task.image_embed_dim=32",), 32, "DALLE2-pytorch's Decoder", None),
}  # fmt: skip


def config_of(name: str, options: argparse.Namespace) -> RunConfig:
    """The run of both sides."""
    case = CASES[name]
    common = ["optim.name=adamw", "optim.ema_decay=0", "train.gradient_checkpointing=false"]
    common += ["train.precision=bf16", f"train.compile={str(options.compile).lower()}"]
    if options.small:
        return apply_overrides(load_recipe(name, "smoke"), [*case.small, *common])
    if name == "stable_diffusion":
        from real_sizes import sd_folder

        common.append(f"task.pretrained={sd_folder(options.out)}")
    return apply_overrides(load_recipe(name, case.recipe), [*case.overrides, *common])


def made(name: str, config: RunConfig, options: argparse.Namespace) -> tuple[Task, dict[str, torch.Tensor]]:
    """The task, and a batch of it on the device with its random inputs."""
    task = load_task_class(name)(config.task, config.seed)
    size = options.batch or (4 if options.small else CASES[name].batch)
    batch = task.example_batch(size)
    if name == "gpt2":
        batch["token_mask"] = torch.ones_like(batch["token_mask"])
    batch |= task.draws(batch)
    return task, {key: value.to(options.device) for key, value in batch.items()}


def ours(name: str, options: argparse.Namespace) -> Side:
    """The step of a training worker."""
    config = config_of(name, options)
    task, batch = made(name, config, options)
    strategy = make_strategy(config, task, options.device)
    totals = {key: strategy.world.sum_(weight).float() for key, weight in local_weights(task, [batch]).items()}

    def step() -> None:
        accumulate(strategy, [batch], totals, seed=0, step=0)
        strategy.step(0, 1e-5)

    return Side(step, len(batch["slot"]), task)


def peer_loss(name: str, task: Any, batch: dict[str, torch.Tensor], compiled: bool) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """The library's own model and its loss."""
    wrap: Callable[[Any], Any] = torch.compile if compiled else lambda module: module
    if name == "gpt2":
        model = wrap(task.gpt2)
        return task.gpt2, lambda: model(input_ids=batch["tokens"], labels=batch["tokens"]).loss
    if name == "clip_vit":
        tower = wrap(task.tower)
        return task.tower, lambda: -functional.cosine_similarity(tower(task.pixels(batch["image"])).float(), batch["text_embedding"]).mean()
    if name == "coca":
        from open_clip import CoCaLoss

        model = wrap(task.model)
        loss = CoCaLoss(task.config.caption_weight, task.config.contrastive_weight, pad_id=task.vocabulary.pad)
        return task.model, lambda: sum(loss(**model(task.pixels(batch["image"]), batch["tokens"]), output_dict=True).values())
    if name == "stable_diffusion":
        unet = wrap(task.parts.unet)
        size = unet.config.sample_size if "latent_mean" not in batch else batch["latent_mean"].shape[-1]
        rows, device = len(batch["slot"]), batch["slot"].device
        latents = torch.randn(rows, unet.config.in_channels, size, size, device=device).to(memory_format=torch.channels_last)
        states = torch.randn(rows, 77, unet.config.cross_attention_dim, device=device)
        noise, times = torch.randn_like(latents), torch.randint(0, 1000, (rows,), device=device)
        return task.parts.unet, lambda: functional.mse_loss(unet(latents, times, states).sample.float(), noise)
    if name == "dalle2_prior":
        prior = wrap(task.prior)
        return task.prior, lambda: prior(text_embed=batch["text_embedding"], image_embed=batch["image_embedding"])
    decoder = wrap(task.decoder)
    pixels = batch["image"].permute(0, 3, 1, 2).float() / 255
    return task.decoder, lambda: decoder(pixels, image_embed=batch["image_embedding"], unet_number=1)


def peer(name: str, options: argparse.Namespace) -> Side:
    """The step of the peer's trainer."""
    config = config_of(name, options)
    task, batch = made(name, config, options)
    task.to(options.device).train()
    model, loss = peer_loss(name, task, batch, options.compile)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)

    def step() -> None:
        backward(loss, options.device)
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(learning, config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Side(step, len(batch["slot"]), model)


def backward(loss: Callable[[], torch.Tensor], device: str) -> None:
    """Forward under autocast, and backward."""
    with torch.autocast(device, torch.bfloat16):
        value = loss()
    value.backward()


def flops(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Of the peer's forward and backward pass, for one sample; not compiled, because compiled kernels are not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    task, batch = made(name, config_of(name, options), options)
    task.to(options.device).train()
    _, loss = peer_loss(name, task, batch, False)
    with FlopCounterMode(display=False) as counter:
        backward(loss, options.device)
    return {"flops": counter.get_total_flops() / len(batch["slot"])}


def measure(name: str, side: str, options: argparse.Namespace) -> dict[str, float]:
    """One side in this process."""
    step, samples, _ = (ours if side == "ours" else peer)(name, options)
    cuda = options.device == "cuda"
    seconds = []
    for number in range(WARM_UP + options.steps):
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else peak_megabytes() / 1000
    return {"rate": samples / statistics.median(seconds), "peak_gb": peak}


def compare(name: str, options: argparse.Namespace, results: Results) -> None:
    """Both sides in turns, each in a process of its own."""
    case = CASES[name]
    words = [str(options.out), "--device", options.device, "--steps", str(options.steps)]
    words += ["--compile"] * options.compile + ["--small"] * options.small + (["--batch", str(options.batch)] if options.batch else [])
    counted = fresh(__file__, [*words, "--tasks", name, "--side", "flops"])["flops"]
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(options.repeat):
        for side, found in runs.items():
            found.append(fresh(__file__, [*words, "--tasks", name, "--side", side]))
    what = f"{name}, {'smoke' if options.small else 'published'} size, bf16{', compiled' if options.compile else ''}, one {options.device}"
    rates, peaks = ([[run[key] for run in runs[side]] for side in ("ours", "peer")] for key in ("rate", "peak_gb"))
    results.add(Row(what, "samples/s", rates[0], case.peer, rates[1], at_least=None if options.small else 1.0, headline=not options.small))
    results.add(Row(f"{what}: peak memory", "GB", peaks[0], case.peer, peaks[1], less=True))
    results.add(Row(f"{what}: a sample's forward and backward pass", "GFLOP", [counted / 1e9]))
    peak = peak_flops(torch.device(options.device), "bf16")
    if peak:
        used = [[100 * rate * counted / peak for rate in side] for side in rates]
        results.add(Row(f"{what}: model FLOPs utilisation", "%", used[0], case.peer, used[1]))
        if case.mfu and not options.small:
            results.check(f"{what}: at least {case.mfu:.0%} of the card's peak", statistics.median(used[0]) >= 100 * case.mfu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch", type=int, help="samples of a step; otherwise that of the task")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a turn")
    parser.add_argument("--repeat", type=int, default=3, help="turns")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--small", action="store_true", help="the recipes `smoke`, without goals")
    parser.add_argument("--side", choices=["ours", "peer", "flops"], help=argparse.SUPPRESS)
    add_option(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; --device cpu --small shows that the script runs")
    if options.side:
        name = options.tasks[0]
        print(json.dumps(flops(name, options) if options.side == "flops" else measure(name, options.side, options)))
        return
    results = Results(__file__, options.results)
    for name in options.tasks:
        compare(name, options, results)
    sys.exit(0 if results.finish() else 1)


if __name__ == "__main__":
    main()
