"""Steps per second of Stable Diffusion: encoding in each step, from caches, and by the logic of diffusers' training script.

    python benchmarks/sd_steps.py OUT [STEPS]

A pipeline whose VAE costs as much beside its U-Net as SD 1.5's at 512 pixels (floating-point operations are counted and printed) learns 96 scenes at 128
pixels, batch 8, fp32, in this process: our loop encoding online, our loop on `diptych cache`'s latents and text states, and the lines of
diffusers' `train_text_to_image.py` or `train_text_to_image_lora.py` between its DataLoader and its optimizer. The three take turns, three rounds;
medians; first with the whole U-Net to learn, then with adapters of rank 16 in its attention. Exit status 1 if the caches are less than 1.3 times as
fast as the script, or if everything but forward, backward and optimizer takes more than 3 % of a step.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _results import Results, Row, add_option
from _runs import timed_run
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from scene_judge import write_scenes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from diptych.config import apply_overrides, load_recipe
from diptych.datasets.tokens import train_tokenizer
from diptych.pipelines import cache
from diptych.pipelines.console import show_table

_SIDE, _BATCH, _SCENES, _ROUNDS, _WARM_UP, _LENGTH, _WIDTH = 128, 8, 96, 3, 3, 77, 96
_RANK, _TARGETS = 16, ("to_k", "to_q", "to_v", "to_out.0")
SCRIPTS = {"unet": "train_text_to_image.py", "lora": "train_text_to_image_lora.py"}
_PUBLISHED = {"block_out_channels": (128, 256, 512, 512)}
_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SMALL_VAE = _VAE | {"block_out_channels": (24, 48, 96, 96), "norm_num_groups": 8, "sample_size": _SIDE}
_SMALL_UNET: dict[str, Any] = {
    "cross_attention_dim": _WIDTH,
    "attention_head_dim": 8,
    "block_out_channels": (64, 128, 256, 256),
    "norm_num_groups": 8,
    "sample_size": _SIDE // 8,
}


def cost_ratio(unet: dict[str, Any], vae: dict[str, Any], side: int) -> float:
    """Operations of encoding a picture over those of forward and backward of the U-Net, counted without computing."""
    with torch.device("meta"):
        model, encoder = UNet2DConditionModel(**unet), AutoencoderKL(**vae)
        latents, states = torch.empty(1, 4, side // 8, side // 8), torch.empty(1, _LENGTH, unet["cross_attention_dim"])
        picture, times = torch.empty(1, 3, side, side), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as learning:
        model(latents, times, states).sample.sum().backward()
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        encoder.encode(picture)
    return encoding.get_total_flops() / learning.get_total_flops()


def make_pipeline(folder: Path, captions: list[str]) -> None:
    """SD 1.5's topology, a fifth as wide, with fresh weights."""
    torch.manual_seed(0)
    train_tokenizer(captions, 256, folder / "words")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder / "words"), model_max_length=_LENGTH)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=_WIDTH, intermediate_size=4 * _WIDTH, num_hidden_layers=12, num_attention_heads=4
    )
    StableDiffusionPipeline(
        vae=AutoencoderKL(**_SMALL_VAE),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**_SMALL_UNET),
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


class Pictures(Dataset[dict[str, Tensor]]):
    """The script's data set: pictures decoded, transformed and tokenized as they are asked for."""

    def __init__(self, shards: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        members: dict[str, dict[str, bytes]] = {}
        for path in sorted(shards.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    members.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
        self.samples, self.tokenizer = list(members.values()), tokenizer
        steps = [transforms.Resize(_SIDE), transforms.CenterCrop(_SIDE), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        tokens = self.tokenizer(sample["txt"].decode(), max_length=_LENGTH, padding="max_length", truncation=True, return_tensors="pt")
        return {
            "pixel_values": self.transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")),
            "input_ids": tokens.input_ids[0],
        }


def script(folder: Path, shards: Path, steps: int, train: str) -> list[float]:
    """Seconds of each step after the warm-up: diffusers' `SCRIPTS[train]` with its own defaults, without accelerate's wrappers."""
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    noise_scheduler = DDPMScheduler.from_pretrained(str(folder), subfolder="scheduler")
    vae.requires_grad_(False)
    text_encoder.requires_grad_(False)
    if train == "lora":
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=_RANK, lora_alpha=_RANK, init_lora_weights="gaussian", target_modules=list(_TARGETS)))
    unet.train()
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5, weight_decay=1e-2)
    loader = DataLoader(Pictures(shards, pipeline.tokenizer), batch_size=_BATCH, shuffle=True, drop_last=True)
    ended: list[float] = []
    while len(ended) <= steps:
        for batch in loader:
            latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (latents.shape[0],)).long()
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            encoder_hidden_states = text_encoder(batch["input_ids"], return_dict=False)[0]
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
            F.mse_loss(model_pred.float(), noise.float(), reduction="mean").backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ended.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(ended)][_WARM_UP:steps]


def compare(train: str, out: Path, steps: int, results: Results) -> dict[str, float]:
    """The three in turn, with `task.train=train`; figures by name."""
    folder, shards = out / "pipeline", out / "shards"
    common = [
        f"data.shards={shards}",
        f"task.pretrained={folder}",
        f"task.image_size={_SIDE}",
        f"task.train={train}",
        f"task.lora.rank={_RANK}",
        f"task.lora.targets={','.join(_TARGETS)}",
        "task.flip=0",
        "optim.lr=1e-5",
    ]
    common += [f"train.steps={steps + 1}", f"train.global_batch_size={_BATCH}", "train.precision=fp32", "data.validation_share=0"]
    online = apply_overrides(load_recipe("stable_diffusion", "lora_reports"), [*common, "validation.samples=0"])
    cached = apply_overrides(online, ["task.cached=latents,text-states", f"data.caches={out / 'latents'},{out / 'text-states'}"])
    times: dict[str, list[float]] = {"script": [], "online": [], "cached": []}
    shares: dict[str, list[float]] = {"online": [], "cached": []}
    rounds: dict[str, list[float]] = {name: [] for name in times}
    for number in range(_ROUNDS):
        times["script"] += script(folder, shards, steps, train)
        rounds["script"].append(1 / statistics.median(times["script"][-(steps - _WARM_UP) :]))
        for name, config in (("online", online), ("cached", cached)):
            seconds, inside = timed_run(config, out / f"{train}-{name}-{os.getpid()}-{number}", _WARM_UP)
            times[name] += seconds
            rounds[name].append(1 / statistics.median(seconds))
            shares[name] += [1 - part / whole for part, whole in zip(inside, seconds, strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    figures: dict[str, float] = {f"{name}_steps_per_second": 1 / value for name, value in medians.items()}
    figures |= {f"{name}_over_script": medians["script"] / medians[name] for name in ("online", "cached")}
    figures |= {f"{name}_own_share": statistics.median(values) for name, values in shares.items()}
    kind = {"unet": "Stable Diffusion", "lora": "Stable Diffusion's adapters"}[train]
    for name, goal in (("online", 1.0), ("cached", 1.3)):
        what = f"{kind}, a small U-Net at SD 1.5's ratio of costs, {name}"
        results.add(Row(what, "steps/s", rounds[name], f"diffusers' {SCRIPTS[train]}", rounds["script"], at_least=goal, headline=True))
        own = [100 * value for value in shares[name]]
        results.add(Row(f"{what}: share of a step that is neither model nor optimizer", "%", [statistics.median(own)], at_most=3))
    return figures


def main(out: Path, steps: int, results: Results) -> bool:
    folder, shards = out / "pipeline", out / "shards"
    write_scenes(shards, _SCENES, _SIDE)
    dataset_captions = [sample["txt"].decode() for sample in Pictures(shards, None).samples]  # type: ignore[arg-type]
    if not folder.is_dir():
        make_pipeline(folder, dataset_captions)
    for kind, options in (("latents", {"size": _SIDE}), ("text-states", {})):
        cache.run(kind, str(shards), str(out / kind), {"model": str(folder)} | options)
    found = {train: compare(train, out, steps, results) for train in SCRIPTS}
    figures = {f"{train}_{name}": value for train, one in found.items() for name, value in one.items()}
    figures["cost_ratio"] = cost_ratio(_SMALL_UNET, _SMALL_VAE, _SIDE)
    figures["cost_ratio_sd15_512"] = cost_ratio({"cross_attention_dim": 768, "attention_head_dim": 8}, _VAE | _PUBLISHED, 512)
    title = f"Medians of {_ROUNDS} rounds of {steps} steps, {torch.get_num_threads()} threads"
    show_table(title, ["figure", "value"], [[name, f"{value:.4f}"] for name, value in figures.items()])
    results.finish()
    print(json.dumps(figures))
    own = max(value for name, value in figures.items() if name.endswith("own_share"))
    return min(one["cached_over_script"] for one in found.values()) >= 1.3 and own <= 0.03


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int, nargs="?", default=15)
    add_option(parser)
    given = parser.parse_args()
    sys.exit(0 if main(given.out, given.steps, Results(__file__, given.results)) else 1)
