"""Stable Diffusion as diffusers' own library loads it: a pipeline's folder, adapters, or a VAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

from diptych.config import ConfigError
from diptych.recipes.stable_diffusion import StableDiffusionConfig
from diptych.trainers.sd_lora import export_adapters
from diptych.trainers.sd_painter import make_scheduler

if TYPE_CHECKING:
    from diptych.trainers.tasks.stable_diffusion import StableDiffusionTask


def export_parts(task: StableDiffusionTask, folder: Path) -> None:
    """Write what `task` learned; see `StableDiffusionTask.export`."""
    parts = task.parts
    folder.mkdir(parents=True, exist_ok=True)
    if task.config.train == "vae":
        parts.vae.save_pretrained(folder / "vae")
        return
    if task.config.train == "lora":
        export_adapters(parts, folder)
        return
    pipeline = diffusers.StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=tokenizer_of(task),
        unet=parts.unet,
        scheduler=make_scheduler(parts.scheduler, ""),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def tokenizer_of(task: StableDiffusionTask) -> Any:
    """The Hugging Face tokenizer of the pipeline, which pads every prompt to the text encoder's length as the data plane does."""
    assert task.vocabulary is not None
    tokenizer = task.vocabulary.tokenizer
    if tokenizer is None or not hasattr(tokenizer, "save_pretrained"):
        raise ConfigError(
            "task.tokenizer", task.config.tokenizer, "a tokenizer in Hugging Face's layout", "diffusers' pipelines load no other kind."
        )
    tokenizer.model_max_length = task.config.context_length
    backend = tokenizer.backend_tokenizer
    if backend.post_processor is None or not tokenizer("").input_ids:
        from tokenizers.processors import TemplateProcessing

        start, end = tokenizer.bos_token, tokenizer.eos_token
        ids = [(start, task.vocabulary.start), (end, task.vocabulary.end)]
        backend.post_processor = TemplateProcessing(single=f"{start} $A {end}", pair=None, special_tokens=ids)
    return tokenizer


def usage(config: StableDiffusionConfig) -> str:
    """See `Task.usage`."""
    if config.train == "vae":
        return 'from diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained("{folder}", subfolder="vae")'
    if config.train == "lora":
        return (
            "from diffusers import StableDiffusionPipeline\n\n"
            f'pipeline = StableDiffusionPipeline.from_pretrained("{config.pretrained}")\n'
            'pipeline.load_lora_weights("{folder}")\n'
            'picture = pipeline("a prompt").images[0]'
        )
    return (
        "from diffusers import StableDiffusionPipeline\n\n"
        'pipeline = StableDiffusionPipeline.from_pretrained("{folder}")\n'
        'picture = pipeline("a prompt").images[0]'
    )
