"""What people look at while Stable Diffusion learns: grids over prompts and over seeds, the base model's pictures beside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

from diptych.trainers.micro_batches import in_shape
from diptych.trainers.pictures import PictureRequest, PictureSettings, to_uint8
from diptych.trainers.sd_model import pixels
from diptych.trainers.sd_painter import SdPainter
from diptych.trainers.task import Batch, Grid, Table

if TYPE_CHECKING:
    from diptych.trainers.tasks.stable_diffusion import StableDiffusionTask

_AT_ONCE = 8
"""Pictures that are made together."""


def show_pictures(task: StableDiffusionTask, batch: Batch) -> Table | None:
    """A table of prompts, a grid of one seed over them (true picture where known, base, now) and a grid of seeds for each.

    The base is what the run started from, the model without adapters or `task.pretrained` again; its pictures are made once.
    None without prompts: captions that are cached as states cannot be read back.
    """
    config = task.config
    prompts = list(config.show_prompts) or _captions(task, batch)
    prompts = prompts[: config.show_count]
    if not prompts:
        return None
    settings = PictureSettings(steps=config.show_steps, guidance=(config.show_guidance,))
    requests = [PictureRequest(prompt, seed) for prompt in prompts for seed in range(config.show_count)]
    now = _paint(SdPainter(task), requests, settings)
    first = now[:: config.show_count]
    columns = {"fine-tuned" if config.pretrained else "made": first}
    base = _base_pictures(task, requests[:: config.show_count], settings)
    if base is not None:
        columns = {"base": base} | columns
    if not config.show_prompts and "image" in batch:
        columns = {"true": _true_pictures(task, batch, len(prompts))} | columns
    beside = np.stack(list(columns.values()), axis=1).reshape(-1, *first.shape[1:])
    grids = (Grid("prompts", beside, len(columns)), Grid("seeds", now, config.show_count))
    title = f"Pictures of prompts ({', '.join(columns)}); seeds 0 to {config.show_count - 1}"
    return Table(title, ["prompt"], [[prompt] for prompt in prompts], grids)


def show_reconstructions(task: StableDiffusionTask, batch: Batch) -> Table:
    """Pictures beside what the VAE makes of them."""
    image = batch["image"][: 2 * _AT_ONCE]
    made = task.parts.vae.decode(task.parts.vae.encode(pixels(image)).latent_dist.mean).sample.float()
    made_bytes = to_uint8(made / 2 + 0.5, [PictureRequest()] * len(image))
    true = image.cpu().numpy()
    error = ((made_bytes.astype(np.float32) - true) ** 2).mean(axis=(1, 2, 3))
    rows = [[f"{10 * np.log10(255**2 / max(value, 1e-9)):.1f} dB"] for value in error]
    beside = np.stack([true, made_bytes], axis=1).reshape(-1, *true.shape[1:])
    return Table("Reconstructions beside the pictures", ["signal to noise"], rows, (Grid("reconstructions", beside, 2 * 4),))


def _true_pictures(task: StableDiffusionTask, batch: Batch, count: int) -> np.ndarray:
    """uint8 `[count, S, S, 3]`, whole pictures on white where they have buckets."""
    images, buckets = batch["image"][:count].cpu().numpy(), task.config.shape_buckets
    if buckets is None:
        return images
    shaped = [in_shape(image[None], "image", bucket, buckets)[0] for image, bucket in zip(images, batch["bucket"].tolist(), strict=False)]
    return np.stack([np.asarray(ImageOps.pad(Image.fromarray(image), (buckets.size, buckets.size), color="white")) for image in shaped])


def _captions(task: StableDiffusionTask, batch: Batch) -> list[str]:
    assert task.vocabulary is not None
    if "tokens" not in batch:
        return []
    return [task.vocabulary.decode(tokens) for tokens in batch["tokens"].tolist()]


def _paint(painter: SdPainter, requests: list[PictureRequest], settings: PictureSettings) -> np.ndarray:
    parts = [painter.paint(requests[start : start + _AT_ONCE], settings) for start in range(0, len(requests), _AT_ONCE)]
    return np.concatenate(parts) if parts else np.zeros((0, painter.size, painter.size, 3), np.uint8)


def _base_pictures(task: StableDiffusionTask, requests: list[PictureRequest], settings: PictureSettings) -> np.ndarray | None:
    """Of the model that the run started from, made once; None for a fresh one."""
    if not task.config.pretrained:
        return None
    if task.shown_base is None:
        base = task if task.config.train == "lora" else _started_from(task)
        task.shown_base = _paint(SdPainter(base, base=True), requests, settings)
    return task.shown_base


def _started_from(task: StableDiffusionTask) -> StableDiffusionTask:
    device = next(task.parameters()).device
    with torch.device("cpu"):
        return type(task)(task.config, task.seed).to(device).eval()
