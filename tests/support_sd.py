"""Tiny pipelines in the published layouts of Stable Diffusion 1.x and 2.x, with fresh weights and CLIP's own tokenizer format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH, LENGTH = 16, 77


def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's layout (`vocab.json`, `merges.txt`) with letters for words; `pad` tells SD 1.x (the end token) from 2.x (`!`)."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=LENGTH)


def tiny_pipeline(folder: Path, version: int = 1, seed: int = 0, **unet: Any) -> Path:
    """A pipeline's folder of a few thousand weights: epsilon and PNDM for 1.x, velocity, linear projections and DDIM for 2.x."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(folder / "raw", "<|endoftext|>" if version == 1 else "!")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=WIDTH
    )
    sizes: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=16, **sizes
    )
    model = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2 if version == 1 else (2, 4),
        use_linear_projection=version == 2,
        **sizes | unet,
    )
    schedule: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = (
        PNDMScheduler(skip_prk_steps=True, **schedule)
        if version == 1
        else DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **schedule)
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=model,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder
