"""Pictures by Stable Diffusion: those of diffusers' pipelines, exports that load there, variation, inpainting, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from support_sd import tiny_pipeline

from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.trainers.pictures import PaintError, PictureRequest, PictureSettings, seeded_noise
from diptych.trainers.sd_painter import SAMPLERS, SdPainter
from diptych.trainers.tasks.stable_diffusion import StableDiffusionTask

SETTINGS = PictureSettings(steps=4, guidance=(3.0,))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def make(source: Path, *overrides: str) -> StableDiffusionTask:
    config = apply_overrides(load_recipe("stable_diffusion", "lora_reports").task, [f"pretrained={source}", "image_size=16", *overrides])
    return StableDiffusionTask(config, 3).eval()


def disturb(task: StableDiffusionTask) -> None:
    """As if it had learned: every trainable weight moves."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def by_diffusers(pipeline: StableDiffusionPipeline, requests: list[PictureRequest], guidance: float = 3.0) -> np.ndarray:
    """uint8 pictures of diffusers' own pipeline, from our starting noise."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt=[request.prompt for request in requests],
        negative_prompt=[request.negative_prompt for request in requests],
        latents=seeded_noise(requests, "start", (4, 8, 8)),
        num_inference_steps=4,
        guidance_scale=guidance,
        height=16,
        width=16,
        output_type="np",
    ).images
    return (made * 255).round().astype(np.uint8)


REQUESTS = [PictureRequest("a red thing", 1), PictureRequest("another, blue", 2, negative_prompt="red")]


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_pictures_are_those_of_the_pipeline(source, guidance):
    ours = SdPainter(make(source), base=True).paint(REQUESTS, PictureSettings(steps=4, guidance=(guidance,)))
    peer = by_diffusers(StableDiffusionPipeline.from_pretrained(str(source), safety_checker=None), REQUESTS, guidance)
    assert np.abs(ours.astype(int) - peer).max() <= 1
    assert ours.std() > 5


@pytest.mark.parametrize("train", ["unet", "unet_text"])
def test_an_exported_pipeline_makes_the_same_pictures(source, tmp_path, train):
    task = make(source, f"train={train}")
    disturb(task)
    task.export(tmp_path)
    scope: dict = {}
    exec(task.usage.format(folder=tmp_path).rpartition("\n")[0], scope)
    ours = SdPainter(task).paint(REQUESTS, SETTINGS)
    assert np.abs(ours.astype(int) - by_diffusers(scope["pipeline"], REQUESTS)).max() <= 1
    assert not np.array_equal(ours, SdPainter(make(source), base=True).paint(REQUESTS, SETTINGS))


@pytest.mark.parametrize(
    "lora", [[], ["lora.rank=2", "lora.alpha=6", 'lora.text_targets=["q_proj","v_proj"]']], ids=["plain", "text, alpha"]
)
def test_exported_adapters_make_the_same_pictures_in_diffusers_and_start_the_next_run(source, tmp_path, lora):
    task = make(source, *lora)
    disturb(task)
    task.export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    scope: dict = {}
    exec(task.usage.format(folder=tmp_path).rpartition("\n")[0], scope)
    ours = SdPainter(task).paint(REQUESTS, SETTINGS)
    assert np.abs(ours.astype(int) - by_diffusers(scope["pipeline"], REQUESTS)).max() <= 1
    base = SdPainter(task, base=True).paint(REQUESTS, SETTINGS)
    assert not np.array_equal(ours, base)
    assert np.array_equal(base, SdPainter(make(source)).paint(REQUESTS, SETTINGS))
    again = make(source, *lora, f"lora.start={tmp_path}")
    assert np.array_equal(SdPainter(again).paint(REQUESTS, SETTINGS), ours)


@pytest.mark.parametrize("damage", ["rank", "base", "stranger"])
def test_adapters_of_another_base_are_refused(source, tmp_path, damage):
    if damage == "base":
        other = make(tiny_pipeline(tmp_path / "other", block_out_channels=(16, 64)))
    else:
        other = make(source, "lora.rank=2" if damage == "rank" else "lora.rank=4")
    other.export(tmp_path / "lora")
    if damage == "stranger":
        file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
        tensors = load_file(file)
        name = next(iter(tensors))
        save_file({name.replace("attn1", "attn9") if key == name else key: value for key, value in tensors.items()}, file)
    with pytest.raises(ConfigError, match="another base, rank") as caught:
        make(source, f"lora.start={tmp_path / 'lora'}")
    assert caught.value.key == "task.lora.start"


def test_a_fresh_model_exports_a_pipeline_with_the_trained_tokenizer(tmp_path):
    from diptych.datasets.tokens import train_tokenizer

    train_tokenizer(["a red thing", "another, blue"], 64, tmp_path / "tokenizer")
    config = apply_overrides(load_recipe("stable_diffusion", "smoke").task, [f"tokenizer={tmp_path / 'tokenizer'}"])
    task = StableDiffusionTask(config, 3).eval()
    task.export(tmp_path / "export")
    pipeline = StableDiffusionPipeline.from_pretrained(str(tmp_path / "export"), safety_checker=None)
    ours = SdPainter(task).paint(REQUESTS, SETTINGS)
    assert np.abs(ours.astype(int) - by_diffusers(pipeline, REQUESTS)).max() <= 1


@pytest.fixture(scope="module")
def painter(source: Path) -> SdPainter:
    return SdPainter(make(source))


IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
MASK = np.zeros((16, 16), bool)
MASK[:, :8] = True


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_makes_every_kind_of_picture_whatever_the_batch(painter, sampler):
    requests = [PictureRequest("red", 4), PictureRequest("red", 5, IMAGE), PictureRequest("red", 6, IMAGE, MASK)]
    settings = PictureSettings(steps=4, guidance=(2.0,), sampler=sampler, eta=0.5)
    made = painter.paint(requests, settings)
    assert made.shape == (3, 16, 16, 3)
    for request, picture in zip(requests, made, strict=True):
        alone = painter.paint([request, PictureRequest("other", 9, request.image, request.mask)], settings)[0]
        assert np.abs(alone.astype(int) - picture).max() <= 2


def test_inpainting_keeps_what_is_to_be_kept_and_paints_the_rest(painter):
    made = painter.paint([PictureRequest("red", seed, IMAGE, MASK) for seed in (1, 2)], SETTINGS)
    assert (made[:, MASK] == IMAGE[MASK]).all()
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0][~MASK], IMAGE[~MASK])


def test_variations_differ_by_seed_and_leave_the_picture_with_strength(painter):
    made = painter.paint([PictureRequest("red", seed, IMAGE) for seed in (1, 2)], SETTINGS)
    assert not np.array_equal(made[0], made[1])
    near, far = (
        painter.paint([PictureRequest("red", 1, IMAGE)], PictureSettings(steps=8, guidance=(1.0,), sampler="ddim", strength=strength))
        for strength in (0.2, 1.0)
    )
    reconstructed = painter.parts.vae
    with torch.no_grad():
        pixels = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].float() / 127.5 - 1
        plain = reconstructed.decode(reconstructed.encode(pixels).latent_dist.mean).sample
    target = ((plain / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(near - target).mean() < np.abs(far - target).mean()


def test_an_unknown_sampler_is_refused_with_those_that_there_are(painter):
    with pytest.raises(ConfigError, match=r"dpm\+\+"):
        painter.paint(REQUESTS, PictureSettings(sampler="karras"))
    with pytest.raises(ConfigError, match="multiple"):
        painter.paint(REQUESTS, PictureSettings(size=18))


def test_a_long_prompt_is_cut_aloud(painter, caplog):
    painter.paint([PictureRequest("red " * 200, 1)], PictureSettings(steps=1))
    assert "was cut to 77" in caplog.text


def test_nan_is_an_error_and_no_black_picture(source):
    task = make(source)
    with torch.no_grad():
        task.parts.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(PaintError, match="NaN"):
        SdPainter(task).paint(REQUESTS, SETTINGS)
