"""Tiny models with random weights, saved in the layouts that diffusers and transformers publish."""

from __future__ import annotations

from pathlib import Path

import torch

from diptych.datasets import scenes
from diptych.datasets.tokens import train_tokenizer


def save_vae(folder: Path, size: int = 32) -> str:
    """An AutoencoderKL that halves each side."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        latent_channels=4, norm_num_groups=4, sample_size=size,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def save_text_encoder(folder: Path) -> str:
    """`text_encoder/` and `tokenizer/` of a pipeline."""
    from transformers import CLIPTextConfig, CLIPTextModel

    train_tokenizer([scenes.describe(0, index).caption for index in range(200)], 256, folder / "tokenizer")
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return str(folder)


def save_image_encoder(folder: Path) -> str:
    """A CLIP image tower of three blocks with its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)
