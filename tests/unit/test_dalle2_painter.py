"""Pictures from prior and decoder: dalle2-pytorch's sampling for the same noise; dreams, variations, inpainting, guidance, refusals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import dalle2_pytorch.dalle2_pytorch as peer
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.trainers.clip_embedder import Embedder
from diptych.trainers.dalle2_painter import Dalle2Painter
from diptych.trainers.decoder_sampling import Inpaint, Sampling, sample_decoder
from diptych.trainers.model_name import parse_model
from diptych.trainers.pictures import PaintError, PictureRequest, PictureSettings
from diptych.trainers.prior_model import choose_nearest
from diptych.trainers.tasks import load_task_class
from diptych.trainers.tasks.dalle2_decoder import Dalle2DecoderTask
from diptych.trainers.tasks.dalle2_prior import Dalle2PriorTask

DIM, SIDE = 32, 16


def task_of(name: str, *overrides: str) -> Any:
    """The task of the recipe `smoke`, its last layers filled, so that conditions show in what it makes."""
    key = "image_embed_dim" if name == "dalle2_decoder" else "embed_dim"
    config = apply_overrides(load_recipe(name, "smoke"), [f"task.{key}={DIM}", *overrides]).task
    task = load_task_class(name)(config, seed=0).eval()
    torch.manual_seed(3)
    for module in task.modules():
        if isinstance(module, peer.Unet):
            torch.nn.init.normal_(module.to_out.weight, std=0.2)
    return task


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An exported CoCa of `DIM` dimensions with a tokenizer of its own, untrained."""
    from diptych.datasets.tokens import train_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    train_tokenizer(["a red circle above a blue square", "two green stars"], 64, folder / "tokenizer")
    config = apply_overrides(
        load_recipe("coca", "smoke"), [f"task.tokenizer={folder / 'tokenizer'}", f"task.architecture.width={DIM}"]
    ).task
    load_task_class("coca")(config, seed=0).export(folder / "coca")
    return str(folder / "coca")


@pytest.fixture(scope="module")
def embedder(clip: str) -> Embedder:
    return Embedder(parse_model(clip), precision="fp32")


@pytest.fixture(scope="module")
def painter(embedder: Embedder) -> Dalle2Painter:
    timesteps = "task.timesteps=25"
    return Dalle2Painter(task_of("dalle2_prior", timesteps), task_of("dalle2_decoder", timesteps), embedder)


VARIANTS = {
    "as in smoke": (),
    "velocity, reweighted": ("task.predict_v=true", "task.learned_variance=false"),
    "picture, dynamic threshold": ("task.predict_x_start=true", "task.learned_variance=false", "task.use_dynamic_thres=true"),
    "self-conditioned, both variances": ("task.base.self_cond=true", "task.learned_variance=true,true"),
}


CASES = [(variant, "ddim") for variant in VARIANTS]
CASES += [(variant, how) for variant in ("as in smoke", "self-conditioned, both variances") for how in ("ddpm", "inpaint")]


@pytest.mark.parametrize(("variant", "how"), CASES)
def test_samples_equal_the_peers_with_the_same_noise(variant, how):
    steps = 25 if how == "ddpm" else 4
    task = task_of("dalle2_decoder", "task.sample_timesteps=4", "task.timesteps=25", *VARIANTS[variant])
    batch = task.example_batch(2)
    image = batch["image"].permute(0, 3, 1, 2).float() / 255
    keep = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    keep[:, 4:10, 2:12] = True
    drawn: dict[int, list[torch.Tensor]] = defaultdict(list)

    def noise(purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        drawn[shape[-1]].append(torch.randn(2, *shape, generator=torch.Generator().manual_seed(len(drawn[shape[-1]]))))
        return drawn[shape[-1]][-1]

    inpaint = Inpaint(image, keep[:, None], resample=2) if how == "inpaint" else None
    with torch.no_grad():
        ours = sample_decoder(task.decoder, batch["image_embedding"], None, noise, Sampling([steps] * 2, [1.5, 2.0], 0.5), inpaint)
    replay = {side: iter(values) for side, values in drawn.items()}

    def again(like: Any, *args: Any, **options: Any) -> torch.Tensor:
        # Ancestral sampling of the peer draws noise at step 0 too and multiplies it by zero.
        shape = like if isinstance(like, tuple) else tuple(like.shape)
        return next(replay[shape[-1]], torch.zeros(shape))

    task.decoder.sample_timesteps = (steps, steps)
    task.decoder.ddim_sampling_eta = 0.5
    options = {"inpaint_image": image, "inpaint_mask": keep, "inpaint_resample_times": 2} if inpaint else {}
    with mock.patch.object(torch, "randn", again), mock.patch.object(torch, "randn_like", again):
        theirs = task.decoder.sample(image_embed=batch["image_embedding"], cond_scale=[1.5, 2.0], **options)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert all(next(values, None) is None for values in replay.values())
    assert ours.std() > 0.05


def requests_of(count: int, **fields: Any) -> list[PictureRequest]:
    return [PictureRequest(prompt="a red circle above a blue square", seed=seed, **fields) for seed in range(count)]


def picture(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)


def test_a_dream_is_a_function_of_prompt_and_seed_whatever_the_batch(painter):
    requests = requests_of(3)
    whole = painter.paint(requests, PictureSettings())
    assert whole.shape == (3, SIDE, SIDE, 3)
    assert whole.dtype == np.uint8
    assert np.abs(painter.paint(requests[1:2], PictureSettings())[0].astype(int) - whole[1]).max() <= 1
    assert not np.array_equal(whole[0], whole[1])
    other = [PictureRequest("two green stars", request.seed) for request in requests]
    assert not np.array_equal(painter.paint(other, PictureSettings()), whole)


def test_guidance_one_is_the_conditional_model_alone(painter):
    plain = painter.paint(requests_of(2), PictureSettings(guidance=(1.0,)))
    calls = []
    forward = peer.Unet.forward

    def count(unet: Any, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(options.get("image_cond_drop_prob", 0.0))
        return forward(unet, *args, **options)

    with mock.patch.object(peer.Unet, "forward", count):
        again = painter.paint(requests_of(2), PictureSettings(guidance=(1.0, 1.0, 1.0)))
    assert np.array_equal(plain, again)
    assert set(calls) == {0.0}
    for guidance in ((3.0, 1.0, 1.0), (1.0, 3.0, 1.0)):
        assert not np.array_equal(painter.paint(requests_of(2), PictureSettings(guidance=guidance)), plain)
    # The upsampler sees the smaller picture alone: there is nothing to guide to.
    assert np.array_equal(painter.paint(requests_of(2), PictureSettings(guidance=(1.0, 1.0, 3.0))), plain)


def test_variations_differ_by_seed_and_follow_the_picture_and_the_text(painter):
    def varied(image: np.ndarray, prompt: str = "", seeds: Sequence[int] = (0, 1)) -> np.ndarray:
        return painter.paint([PictureRequest(prompt, seed, image) for seed in seeds], PictureSettings())

    made = varied(picture())
    assert not np.array_equal(made[0], made[1])
    assert np.array_equal(varied(picture()), made)
    assert not np.array_equal(varied(picture(6)), made)
    assert not np.array_equal(varied(picture(), "two green stars"), made)


def test_inpainting_keeps_what_the_mask_keeps_exactly(painter):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, 5:] = True
    requests = [
        PictureRequest("two green stars", 0, picture(), mask),
        PictureRequest("", 1, picture(7), ~mask),
        PictureRequest("two green stars", 2),
    ]
    made = painter.paint(requests, PictureSettings())
    assert np.array_equal(made[0][mask], picture()[mask])
    assert np.array_equal(made[1][~mask], picture(7)[~mask])
    assert not np.array_equal(made[0][~mask], picture()[~mask])
    assert np.abs(painter.paint(requests[2:], PictureSettings())[0].astype(int) - made[2]).max() <= 1


def test_the_nearest_of_several_candidates_is_taken(embedder):
    candidates = torch.randn(3, 5, DIM)
    text = F.normalize(torch.randn(3, DIM), dim=-1)
    chosen = choose_nearest(candidates, text)
    cosine = F.cosine_similarity(candidates, text[:, None], dim=-1)
    assert torch.allclose(F.cosine_similarity(chosen, text, dim=-1), cosine.max(dim=1).values)
    prior: Dalle2PriorTask = task_of("dalle2_prior")
    with torch.no_grad():
        nearness = [F.cosine_similarity(prior.sample(text, torch.arange(3), best_of=best), text, dim=-1) for best in (1, 4)]
        assert bool((nearness[1] >= nearness[0] - 1e-6).all())
        assert bool((nearness[1] > nearness[0]).any())


def test_steps_samplers_and_eta(painter):
    requests = requests_of(1)
    assert painter.stages == ("prior", "base", "upsampler")
    made = [
        painter.paint(requests, settings) for settings in (PictureSettings(steps=3), PictureSettings(steps=4), PictureSettings(eta=1.0))
    ]
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[1], made[2])
    assert painter.paint(requests, PictureSettings(sampler="ddpm")).shape == (1, SIDE, SIDE, 3)


def test_token_states_reach_prior_and_decoder(clip, embedder):
    from diptych.datasets.tokens import load_tokenizer

    tokenizer = f"{Path(clip).parent / 'tokenizer'}"
    reads = [f"task.text_tower={clip}", f"task.tokenizer={tokenizer}", "task.text_length=12"]
    prior = task_of("dalle2_prior", "task.condition_on_text_encodings=true", "task.max_text_len=12", *reads)
    decoder = task_of("dalle2_decoder", "task.base.cond_on_text_encodings=true", "task.base.max_text_len=12", *reads)
    assert not [name for name, _ in decoder.named_parameters() if "tower" in name]

    def tokenize(name: str, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        return load_tokenizer(name).encode(texts, length)

    painter = Dalle2Painter(prior, decoder, embedder, tokenize)
    plain = painter.paint(requests_of(2), PictureSettings())
    assert not np.array_equal(painter.paint([PictureRequest("two green stars", seed) for seed in range(2)], PictureSettings()), plain)
    with pytest.raises(ConfigError, match="text_tower"):
        Dalle2Painter(prior, decoder, embedder).paint(requests_of(1), PictureSettings())


@pytest.mark.parametrize(
    ("fields", "settings", "key"),
    [
        ({"image": picture(), "mask": np.ones((8, 8), bool)}, {}, "--mask"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, {}, "--init-image"),
        ({"negative_prompt": "blurry"}, {}, "negative_prompt"),
        ({}, {"size": 64}, "size"),
        ({}, {"steps": 500}, "steps"),
        ({}, {"sampler": "euler"}, "sampler"),
        ({}, {"guidance": (1.0, 2.0)}, "guidance"),
    ],
)
def test_what_cannot_be_painted_is_refused(painter, fields, settings, key):
    with pytest.raises(ConfigError) as caught:
        painter.paint(requests_of(1, **fields), PictureSettings(**settings))
    assert caught.value.key == key


def test_other_embeddings_missing_parts_and_nan_are_refused(painter, embedder):
    other = apply_overrides(load_recipe("dalle2_decoder", "smoke"), ["task.image_embed_dim=24"]).task
    with pytest.raises(ConfigError, match="24"):
        Dalle2Painter(None, Dalle2DecoderTask(other, 0), embedder)
    alone = Dalle2Painter(None, task_of("dalle2_decoder"), embedder)
    for request in (PictureRequest("two green stars"), PictureRequest("two green stars", image=picture()), PictureRequest()):
        with pytest.raises(ConfigError):
            alone.paint([request], PictureSettings())
    broken = task_of("dalle2_decoder")
    with torch.no_grad():
        broken.decoder.unets[1].to_out.weight.fill_(float("nan"))
    with pytest.raises(PaintError, match="NaN"):
        Dalle2Painter(None, broken, embedder).paint([PictureRequest(image=picture())], PictureSettings())
    with pytest.raises(ConfigError, match="without U-Net 1"):
        Dalle2Painter(None, task_of("dalle2_decoder", "task.train_unets=2"), embedder).paint(
            [PictureRequest(image=picture())], PictureSettings()
        )
