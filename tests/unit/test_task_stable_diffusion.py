"""Stable Diffusion: diffusers' training computation for the same draws, cached latents, what is saved, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from support_sd import LENGTH, tiny_pipeline

from diptych.config import ConfigError, RunConfig, TrainConfig, apply_overrides, load_recipe
from diptych.pipelines.samples import write_samples
from diptych.trainers.objective import accumulate
from diptych.trainers.state import saved_tensors
from diptych.trainers.strategies import make_strategy
from diptych.trainers.task import Batch
from diptych.trainers.tasks.stable_diffusion import StableDiffusionTask


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {version: tiny_pipeline(folder / f"sd{version}", version) for version in (1, 2)}


def make(source: Path | None, *overrides: str, seed: int = 3) -> StableDiffusionTask:
    """A task on a tiny pipeline, or the recipe `smoke`."""
    config = load_recipe("stable_diffusion", "lora_reports" if source else "smoke").task
    common = [f"pretrained={source}", "image_size=16", "flip=0", "show_count=2", "show_steps=2"] if source else []
    return StableDiffusionTask(apply_overrides(config, [*common, *overrides]), seed)


def drawn(task: StableDiffusionTask, size: int = 3, seed: int = 0) -> Batch:
    batch = task.example_batch(size, seed)
    batch["slot"] = batch["slot"] + size * seed
    return batch | task.draws(batch)


def peer_losses(source: Path, batches: list[Batch], *, lora: bool, options: dict[str, float], lr: float) -> list[float]:
    """diffusers' `train_text_to_image(_lora).py`, its lines between the batch and the optimizer, with our draws in the place of its own."""
    pipeline = StableDiffusionPipeline.from_pretrained(str(source), safety_checker=None)
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    noise_scheduler = DDPMScheduler.from_pretrained(str(source), subfolder="scheduler")
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False)
    if lora:
        torch.manual_seed(3)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    else:
        unet.requires_grad_(True)
    unet.train()
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
    losses = []
    for batch in batches:
        pixel_values = batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(pixel_values).latent_dist
        latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * vae.config.scaling_factor
        noise = batch["noise"]
        if options.get("noise_offset"):
            noise = noise + options["noise_offset"] * batch["offset_noise"]
        new_noise = noise + options["input_perturbation"] * batch["perturbation"] if options.get("input_perturbation") else noise
        timesteps = batch["timestep"].long()
        noisy_latents = noise_scheduler.add_noise(latents, new_noise, timesteps)
        encoder_hidden_states = text_encoder(batch["tokens"], return_dict=False)[0]
        velocity = noise_scheduler.config.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
        if not options.get("snr_gamma"):
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        else:
            snr = compute_snr(noise_scheduler, timesteps)
            weights = torch.stack([snr, options["snr_gamma"] * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
            weights = weights / (snr + 1) if velocity else weights / snr
            loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
            loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("version", "lora", "options"),
    [
        (1, False, {}),
        (1, True, {}),
        (2, False, {"snr_gamma": 5.0, "noise_offset": 0.1}),
        (2, True, {"snr_gamma": 5.0}),
        (1, False, {"snr_gamma": 5.0, "input_perturbation": 0.1}),
    ],
    ids=["full", "lora", "velocity, min-SNR, offset", "velocity, LoRA", "min-SNR, perturbation"],
)
def test_twenty_steps_are_diffusers_own(pipelines, version, lora, options):
    task = make(pipelines[version], f"train={'lora' if lora else 'unet'}", *(f"{key}={value}" for key, value in options.items()))
    batches = [drawn(task, 3, seed) for seed in range(20)]
    settings = ["optim.lr=1e-3", "optim.weight_decay=0", "optim.clip_norm=1", "train.precision=fp32"]
    config = apply_overrides(RunConfig(task=task.config, train=TrainConfig(steps=20, global_batch_size=3)), settings)
    strategy = make_strategy(config, task)
    losses = []
    for step, batch in enumerate(batches):
        terms, _ = accumulate(strategy, [batch], task.weights(batch), seed=0, step=step)
        strategy.step(step, 1e-3)
        losses.append(float(terms["diffusion"].sum / terms["diffusion"].weight))
    expected = peer_losses(pipelines[version], batches, lora=lora, options=options, lr=1e-3)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32: exactly", "fp16: to 2e-3"])
def test_cached_latents_and_states_give_the_loss_of_encoding_in_each_step(pipelines, dtype):
    online = make(pipelines[1], "train=unet", "caption_drop=0.3").eval()
    cached = make(pipelines[1], "train=unet", "caption_drop=0.3", 'cached=["latents","text-states"]').eval()
    batch = drawn(online, 6)
    posterior = online.parts.vae.encode(batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    kept = {key: value for key, value in batch.items() if key in ("slot", "row", "weight")}
    kept |= {"latent_mean": posterior.mean.to(dtype), "latent_logvar": posterior.logvar.to(dtype)}
    kept["text_states"] = online.encode_tokens(batch["tokens"]).to(dtype)
    with torch.no_grad():
        losses = [task(one).terms["diffusion"].sum for task, one in ((online, batch), (cached, kept | cached.draws(kept)))]
    if dtype == torch.float32:
        assert torch.equal(*losses)
    else:
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)


def test_a_cached_run_needs_neither_pictures_nor_captions_and_says_what_the_caches_must_be(pipelines):
    needs = make(pipelines[1], "train=unet", "cached=latents,text-states", "flip=0.5").needs
    assert needs.image is None
    assert needs.tokens is None
    assert needs.cached.keys == ("latent_mean", "latent_logvar", "text_states")
    assert needs.cached.flip == 0.5
    assert needs.cached.expected["latents"]["size"] == 16


@pytest.mark.parametrize(
    ("train", "learning"),
    [("lora", "lora_"), ("unet", "unet."), ("unet_text", ("unet.", "text_encoder.")), ("vae", "vae.")],
)
def test_only_what_learns_is_trained_and_saved(pipelines, train, learning):
    task = make(pipelines[1], f"train={train}")
    names = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert names
    assert all(name.startswith(learning) or (train == "lora" and "lora_" in name) for name in names)
    assert set(saved_tensors(task)) == names
    groups = task.parameter_groups(0.1)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_a_fresh_frozen_part_is_in_the_checkpoint_because_nothing_else_holds_it():
    task = make(None)
    assert any(name.startswith("vae.") for name in saved_tensors(task))


def test_a_checkpoint_without_the_frozen_weights_restores_a_run(pipelines):
    config = RunConfig(task=make(pipelines[1], "train=lora").config, train=TrainConfig(precision="fp32"))
    first = make_strategy(config, make(pipelines[1], "train=lora", seed=1))
    batch = drawn(first.task)
    accumulate(first, [batch], first.task.weights(batch), seed=0, step=0)
    first.step(0, 1e-2)
    state = first.state()
    assert sum(value.numel() for value in state.weights.values()) < 20_000
    other = make_strategy(config, make(pipelines[1], "train=lora", seed=2))
    other.load_state(state)
    batch = drawn(first.task, seed=1)
    with torch.no_grad():
        assert torch.equal(*(one.task.eval()(batch).terms["diffusion"].sum for one in (first, other)))


def test_other_weights_than_the_run_began_with_are_refused(pipelines, tmp_path):
    config = make(pipelines[1]).config.resolve({})
    assert config.pretrained_identity.startswith("sha256:")
    StableDiffusionTask(config, 0)
    with pytest.raises(ConfigError, match="began with"):
        StableDiffusionTask(config.model_copy(update={"pretrained": str(tiny_pipeline(tmp_path / "other", seed=5))}), 0)


def test_withheld_captions_are_the_empty_caption(pipelines):
    task = make(pipelines[1], "train=unet").eval()
    batch = drawn(task, 4) | {"keep_caption": torch.tensor([True, False, True, False])}
    states = task.states(batch)
    assert torch.allclose(states[[1, 3]], task.encode_texts(["", ""]))
    assert torch.allclose(states[0], task.encode_tokens(batch["tokens"])[0], atol=1e-6)


def test_tokens_are_those_of_the_pipelines_own_tokenizer(pipelines, caplog):
    for version in (1, 2):
        task = make(pipelines[version])
        tokenizer = StableDiffusionPipeline.from_pretrained(str(pipelines[version]), safety_checker=None).tokenizer
        texts = ["", "red", "a red thing, with: signs!", "very long " * 30]
        options: dict[str, Any] = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
        assert torch.equal(task._encode_ids(texts), tokenizer(texts, **options).input_ids)
    assert "was cut to 77" in caplog.text


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A pipeline with one NaN."""
    from safetensors.torch import load_file, save_file

    folder = tiny_pipeline(tmp_path / "broken")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, file)
    return folder


def test_nan_weights_are_refused_by_name(broken):
    with pytest.raises(ConfigError, match=r"unet\.conv_in\.weight"):
        make(broken)


def test_an_inpainting_checkpoint_is_refused(tmp_path):
    folder = tiny_pipeline(tmp_path, in_channels=9)
    with pytest.raises(ConfigError, match="text-to-image"):
        make(folder)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["pretrained=", "train=lora"], "task.train"),
        (["train=unet", "pretrained="], "task.tokenizer"),
        (["cached=pictures"], "task.cached"),
        (["train=unet_text", "cached=text-states"], "task.cached"),
        (["pretrained=/nowhere"], "task.pretrained"),
        (["image_size=18"], "task.image_size"),
        (["lora.targets=to_nothing"], "task.lora.targets"),
        (["lora.start=/nowhere"], "task.lora.start"),
        (["tokenizer=train:256"], "task.tokenizer"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(pipelines, overrides, key):
    with pytest.raises(ConfigError) as caught:
        make(pipelines[1], *overrides)
    assert caught.value.key == key


def test_validation_shows_grids_with_the_base_beside(pipelines, tmp_path):
    task = make(pipelines[1], "train=lora", "show_guidance=2").eval()
    batch = task.example_batch(4)
    with torch.no_grad():
        write_samples(tmp_path, 5, task, batch)
        table = task.show(batch)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000005.json", "step_00000005_prompts.jpg", "step_00000005_seeds.jpg"}
    prompts, _ = table.grids
    assert prompts.columns == 3
    assert prompts.images.shape == (6, 16, 16, 3)
    # Fresh adapters change nothing, so base and fine-tuned are the same picture.
    assert (prompts.images[1] == prompts.images[2]).all()


def test_a_vae_learns_and_serves_the_next_run(tmp_path):
    task = make(None, "train=vae", "tokenizer=")
    assert set(task.weights(task.example_batch(2))) == {"reconstruction", "kl", "variance"}
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    batch = drawn(task, 8)
    batch["image"] = batch["image"][:, :1, :1].expand(-1, 16, 16, -1).contiguous()
    for _ in range(40):
        terms = task(batch).terms
        loss = sum(task.coefficients.get(name, 1.0) * term.sum / term.weight for name, term in terms.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((terms["reconstruction"].sum / terms["reconstruction"].weight).item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert task.eval().show(task.example_batch(4)).grids[0].images.shape == (8, 16, 16, 3)
    task.export(tmp_path)
    again = make(None, f"vae={tmp_path}", "train=unet_text")
    assert torch.equal(again.parts.vae.decoder.conv_in.weight, task.parts.vae.decoder.conv_in.weight)
    assert not any(name.startswith("vae.") for name in saved_tensors(again))
