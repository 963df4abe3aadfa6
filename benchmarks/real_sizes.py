"""The published sizes on this machine: one optimizer step each, with the memory it took.

    python benchmarks/real_sizes.py gpt2|clip|coca|sd|dalle2 OUT

gpt2: GPT-2 124M from scratch on 2 gloo workers, under DDP and under ZeRO-2. clip: a whole CLIP ViT-L/14 is saved as Hugging Face publishes it,
loaded by the recipe `image_to_prompt`, and its last blocks take a step. coca: CoCa ViT-L-14 is saved as open_clip publishes it, loaded, and takes
a step with its image tower frozen. sd: Stable Diffusion 1.5 is saved in its published layout, loaded by the recipe `lora_reports`, and its adapters take a
step at 256 pixels. dalle2: LAION's base decoder, of the recipe `published`, learns at 64 pixels from states of CLIP's width, with recomputed activations. Fresh weights stand in for the published ones, whose names and shapes they have.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _memory import peak_megabytes
from _results import Results, Row, add_option

from diptych.config import RunConfig, apply_overrides, load_recipe, set_path
from diptych.trainers.objective import accumulate, local_weights
from diptych.trainers.strategies import make_strategy
from diptych.trainers.tasks import load_task_class

_GB = 1e9


def step(config: RunConfig, batch_size: int) -> dict[str, Any]:
    """Build the task of `config`, take one optimizer step on its example batch, and say what it took."""
    started = time.monotonic()
    task = load_task_class(config.task.name)(config.task, config.seed)
    built = time.monotonic() - started
    strategy = make_strategy(config, task)
    world = strategy.world
    batch = task.example_batch(batch_size, seed=world.rank)
    batch |= task.draws(batch)
    totals = {name: world.sum_(weight).float() for name, weight in local_weights(task, [batch]).items()}
    learning = [(name, parameter) for name, parameter in task.named_parameters() if parameter.requires_grad]
    before = {name: parameter.detach().clone() for name, parameter in learning[-1:]}
    started = time.monotonic()
    terms, _ = accumulate(strategy, [batch], totals, seed=0, step=0)
    norm = float(strategy.step(0, config.optim.lr))
    seconds = time.monotonic() - started
    changed = any(not torch.equal(dict(task.named_parameters())[name], value) for name, value in before.items())
    parameters = list(task.parameters())
    return {
        "parameters_million": sum(parameter.numel() for parameter in parameters) / 1e6,
        "trained_million": sum(parameter.numel() for parameter in parameters if parameter.requires_grad) / 1e6,
        "loss": {name: float(term.sum / term.weight) for name, term in terms.items()},
        "gradient_norm": norm,
        "changed": changed,
        "build_seconds": round(built, 1),
        "step_seconds": round(seconds, 1),
        "optimizer_gb": strategy.optimizer_bytes() / _GB,
        "peak_gb": round(peak_megabytes() / 1000, 2),
    }


def gpt2_worker(rank: int, strategy: str, port: int, out: str) -> None:
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = apply_overrides(
        load_recipe("gpt2", "smoke"),
        ["task.tokenizer=train:50257", "task.architecture.layers=12", "task.architecture.width=768", "task.architecture.heads=12",
         "task.architecture.positions=1024", "task.length=64", f"train.strategy={strategy}", "train.global_batch_size=4", "workers=2"],
    )  # fmt: skip
    result = step(config, 2)
    (Path(out) / f"{strategy}_{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def gpt2(out: Path) -> dict[str, Any]:
    results = {}
    for strategy in ("ddp", "zero2"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(gpt2_worker, args=(strategy, port, str(out)), nprocs=2)
        for rank in range(2):
            results[f"{strategy}, worker {rank}"] = json.loads((out / f"{strategy}_{rank}.json").read_text())
    return results


def clip(out: Path) -> dict[str, Any]:
    from transformers import CLIPConfig, CLIPModel

    folder = out / "clip-vit-large-patch14"
    if not (folder / "model.safetensors").is_file():
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"projection_dim": 768}, projection_dim=768)).save_pretrained(folder)
    config = apply_overrides(load_recipe("clip_vit", "image_to_prompt"), [f"task.model={folder}", "train.precision=auto"])
    return {"CLIP ViT-L/14 from block 21": step(config, 4)}


def coca(out: Path) -> dict[str, Any]:
    import open_clip

    file = out / "open_clip_pytorch_model.safetensors"
    if not file.is_file():
        from safetensors.torch import save_file

        out.mkdir(parents=True, exist_ok=True)
        model = open_clip.create_model("coca_ViT-L-14")
        torch.nn.init.normal_(model.text_decoder.text_projection, std=model.text_decoder.text_projection.shape[0] ** -0.5)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
        del model
    config = set_path(load_recipe("coca", "image_to_prompt"), "task.pretrained", str(file))
    config = apply_overrides(config, ["task.freeze_image=true", "train.precision=auto", "train.gradient_checkpointing=false"])
    return {"CoCa ViT-L-14, image tower frozen": step(config, 2)}


def sd_folder(out: Path) -> Path:
    """Stable Diffusion 1.5 with fresh weights in its published layout; made once."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    from diptych.datasets.tokens import train_tokenizer

    folder = out / "stable-diffusion-v1-5"
    if not (folder / "model_index.json").is_file():
        train_tokenizer(["a thing above another"], 256, out / "words")
        text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768}
        StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
            ),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(str(out / "words"), model_max_length=77),
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
            scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def sd(out: Path) -> dict[str, Any]:
    overrides = [f"task.pretrained={sd_folder(out)}", "task.image_size=256", "train.precision=auto"]
    config = apply_overrides(load_recipe("stable_diffusion", "lora_reports"), overrides)
    return {"Stable Diffusion 1.5, LoRA of rank 4 at 256 pixels": step(config, 1)}


def dalle2(_: Path) -> dict[str, Any]:
    # States from a cache, so that the tower, which does not learn, takes no part of the memory.
    overrides = ["task.pretrained=", "task.text_tower=", "optim.ema_decay=0"]
    return {"LAION's base decoder at 64 pixels": step(apply_overrides(load_recipe("dalle2_decoder", "published"), overrides), 1)}


if __name__ == "__main__":
    kinds = {"gpt2": gpt2, "clip": clip, "coca": coca, "sd": sd, "dalle2": dalle2}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("out", type=Path)
    add_option(parser)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results, found = Results(__file__, given.results), kinds[given.kind](given.out)
    for name, figures in found.items():
        title = "GPT-2 124M, " + name if given.kind == "gpt2" else name
        results.check(f"{title}: one optimizer step changes the weights", figures["changed"])
        results.add(Row(f"{title}: that step", "s", [figures["step_seconds"]]))
        results.add(Row(f"{title}: peak memory", "GB", [figures["peak_gb"]]))
    results.finish()
    for name, figures in found.items():
        print(name, json.dumps(figures))
    sys.exit(0 if all(figures["changed"] for figures in found.values()) else 1)
