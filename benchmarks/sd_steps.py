"""Steps per second of Stable Diffusion: encoding in each step, from caches, and by the logic of diffusers' training script.

    python benchmarks/sd_steps.py OUT --starts 2 --repeat 4 --seconds 6

A pipeline whose VAE costs as much beside its U-Net as SD 1.5's at 512 pixels (floating-point operations are counted and printed) learns 96 scenes at 128
pixels, batch 8, fp32: our loop encoding online, our loop on `diptych cache`'s latents and text states, and the lines of diffusers'
`train_text_to_image.py` or `train_text_to_image_lora.py` between its DataLoader and its optimizer. The three train without end and are let run in turns,
each stopped while another one runs (`_alternate.py`), `--repeat` turns of `--seconds` in each of `--starts` starts; first with the whole U-Net to learn, then with
adapters of rank 16 in its attention. Exit status 1 if the caches are less than 1.3 times as
fast as the script, or if everything but forward, backward and optimizer takes more than 3 % of a step.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _alternate import Ends, Program, StepLog, alternate_starts, logged_steps, read_steps
from _fresh import environment, fresh
from _results import Results, Row, add_option
from _runs import timed_run
from _runs import train as train_ours
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from scene_judge import write_scenes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from diptych.config import RunConfig, apply_overrides, load_recipe
from diptych.datasets.tokens import train_tokenizer
from diptych.pipelines import cache

_SIDE, _BATCH, _SCENES, _LENGTH, _WIDTH = 128, 8, 96, 77, 96
_OWN_STEPS, _WARM_UP, _ENDLESS = 15, 3, 100_000_000
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


def script(folder: Path, shards: Path, train: str, log: StepLog) -> None:
    """Diffusers' `SCRIPTS[train]` with its own defaults, without accelerate's wrappers, without end."""
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
    while True:
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
            log.ended()


def config_of(train: str, kind: str, out: Path, steps: int) -> RunConfig:
    """Our run with `task.train=train`, `online` or `cached`."""
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
    common += [f"train.steps={steps}", "train.log_every=1", f"train.global_batch_size={_BATCH}", "train.precision=fp32"]
    common += ["data.validation_share=0", "validation.samples=0", "checkpoint.every_steps=0"]
    if kind == "cached":
        common += ["task.cached=latents,text-states", f"data.caches={out / 'latents'},{out / 'text-states'}"]
    return apply_overrides(load_recipe("stable_diffusion", "lora_reports"), common)


def program(train: str, kind: str, out: Path) -> Program:
    """`script` or one of our runs, in a process of its own."""
    where = out / f"{train}-{kind}-{time.time_ns()}"

    def ends() -> Ends:
        return read_steps(where) if kind == "script" else logged_steps(where)

    command = [sys.executable, __file__, str(out), "--train", f"{train}/{kind}", "--where", str(where)]
    return Program(command, ends, out / f"{kind}.log", environment(threads=torch.get_num_threads()))


def own_share(train: str, kind: str, out: Path) -> float:
    """Median share of a step, in percent, that is neither model nor optimizer."""
    seconds, inside = timed_run(config_of(train, kind, out, _OWN_STEPS), out / f"own-{time.time_ns()}", _WARM_UP)
    return 100 * statistics.median(1 - part / whole for part, whole in zip(inside, seconds, strict=True))


def compare(train: str, options: argparse.Namespace, results: Results) -> None:
    """The three in turns, with `task.train=train`."""
    kinds = ("script", "online", "cached")
    found = alternate_starts(
        lambda: {kind: program(train, kind, options.out) for kind in kinds}, options.starts, options.repeat, options.seconds
    )
    rates = {kind: [turn.rate for turn in turns] for kind, turns in found.items()}
    name = {"unet": "Stable Diffusion", "lora": "Stable Diffusion's adapters"}[train]
    for kind, goal in (("online", 1.0), ("cached", 1.3)):
        what = f"{name}, a small U-Net at SD 1.5's ratio of costs, {kind}"
        results.add(Row(what, "steps/s", rates[kind], f"diffusers' {SCRIPTS[train]}", rates["script"], at_least=goal, headline=True))
        shares = [float(fresh(__file__, [str(options.out), "--own", f"{train}/{kind}"], threads=torch.get_num_threads())["share"])]
        results.add(Row(f"{what}: share of a step that is neither model nor optimizer", "%", shares, at_most=3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=6, help="of a turn")
    parser.add_argument("--repeat", type=int, default=4, help="turns of a start")
    parser.add_argument("--starts", type=int, default=2, help="of all three, one after the other")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--where", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--own", help=argparse.SUPPRESS)
    add_option(parser)
    options = parser.parse_args()
    out = options.out = options.out.resolve()
    if options.train:
        train, kind = options.train.split("/")
        if kind == "script":
            script(out / "pipeline", out / "shards", train, StepLog(options.where))
        else:
            train_ours(config_of(train, kind, out, _ENDLESS), options.where)
        return
    if options.own:
        print(json.dumps({"share": own_share(*options.own.split("/"), out)}))
        return
    prepare_data(out)
    results = Results(__file__, options.results)
    for train in SCRIPTS:
        compare(train, options, results)
    ratios = [cost_ratio(_SMALL_UNET, _SMALL_VAE, _SIDE)]
    ratios.append(cost_ratio({"cross_attention_dim": 768, "attention_head_dim": 8}, _VAE | _PUBLISHED, 512))
    print("encoding a picture costs {:.3f} of a U-Net's forward and backward pass here, {:.3f} in SD 1.5 at 512 pixels".format(*ratios))
    sys.exit(0 if results.finish() else 1)


def prepare_data(out: Path) -> None:
    """Scenes, a pipeline and our caches; made once."""
    folder, shards = out / "pipeline", out / "shards"
    write_scenes(shards, _SCENES, _SIDE)
    captions = [sample["txt"].decode() for sample in Pictures(shards, None).samples]  # type: ignore[arg-type]
    if not folder.is_dir():
        make_pipeline(folder, captions)
    for kind, options in (("latents", {"size": _SIDE}), ("text-states", {})):
        cache.run(kind, str(shards), str(out / kind), {"model": str(folder)} | options)


if __name__ == "__main__":
    main()
