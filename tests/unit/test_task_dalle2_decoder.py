"""The decoder: losses equal dalle2-pytorch's for the same draws, its exports load there, weights and sizes that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import dalle2_pytorch.dalle2_pytorch as peer
import pytest
import torch
from dalle2_pytorch.train_configs import DecoderConfig

from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.trainers.task import Batch
from diptych.trainers.tasks.dalle2_decoder import Dalle2DecoderTask

DIM = 10


def make(*overrides: str, seed: int = 0) -> Dalle2DecoderTask:
    """The task of the recipe `smoke`: a base at 8 pixels and an upsampler to 16."""
    config = apply_overrides(load_recipe("dalle2_decoder", "smoke"), [f"task.image_embed_dim={DIM}", *overrides])
    return Dalle2DecoderTask(config.task, seed=seed)


VARIANTS = {
    "as in smoke": (),
    "velocity": ("task.predict_v=true", "task.learned_variance=false"),
    "picture": ("task.predict_x_start=true", "task.learned_variance=false", "task.loss_type=l1"),
    "variance of both, reweighted": (
        "task.learned_variance=true,true",
        "task.learned_variance_constrain_frac=true",
        "task.p2_loss_weight_gamma=1.0",
        "task.vb_loss_weight=0.1",
    ),
    "self-conditioned": ("task.base.self_cond=true", "task.upsampler.self_cond=true"),
    "cropped": ("task.random_crop_sizes=0,8",),
    "blur alone": ("task.use_noise_for_lowres_cond=false", "task.blur_prob=1", "task.blur_kernel_size=5"),
    "one U-Net": ("task.image_sizes=16",),
    "captions too": ("task.base.cond_on_text_encodings=true", "task.text_embed_dim=6", "task.base.max_text_len=9"),
    "other parts": (
        "task.base.self_attn=true",
        "task.base.cosine_sim_cross_attn=true",
        "task.base.cross_embed_downsample=true",
        "task.base.combine_upsample_fmaps=true",
        "task.upsampler.sparse_attn=true",
        "task.upsampler.pixel_shuffle_upsample=false",
        "task.upsampler.resnet_weight_standardization=true",
        "task.base.add_image_embeds_to_time=false",
    ),
}


def drawn(task: Dalle2DecoderTask, batch: Batch) -> Batch:
    """The batch with its draws; what the peer draws once for a batch is made equal over the rows."""
    batch = batch | task.draws(batch)
    for key in ("blur2", "self_cond1", "self_cond2"):
        if key in batch:
            batch[key] = batch[key][:1].expand_as(batch[key])
    if "crop2" in batch:
        batch["crop2"] = batch["crop2"][:1].expand_as(batch["crop2"])
    return batch


def peers_loss(task: Dalle2DecoderTask, batch: Batch, number: int) -> torch.Tensor:
    """`Decoder.forward` of U-Net `number` with our draws in place of its own."""
    size = len(batch["slot"])
    draws = {key.removesuffix(str(number)): value for key, value in batch.items() if key.endswith(str(number))}
    noise = iter([draws[key] for key in ("lowres_noise", "noise") if key in draws])
    # Below 0.5 means yes, for the blur and then for self-conditioning.
    chances = iter([0.0 if bool(draws[key][0]) else 0.9 for key in ("blur", "self_cond") if key in draws])
    everything = torch.ones(size, dtype=torch.bool)

    def masks(shape: Any, prob: float, device: Any) -> torch.Tensor:
        if prob == 1:
            return everything
        return draws.get("keep_image" if prob == 1 - task.config.image_cond_drop_prob else "keep_text", everything)

    def crop(sizes: tuple[int, int], p: float) -> Any:
        y, x = (int(value) for value in draws["crop"][0])
        cut = mock.Mock(side_effect=lambda picture, params=None: picture[:, :, y : y + sizes[0], x : x + sizes[1]])
        cut._params = {}
        return cut

    with (
        mock.patch.object(peer, "prob_mask_like", masks),
        mock.patch.object(torch, "randint", lambda *args, **options: draws["timestep"]),
        mock.patch.object(torch, "randn_like", lambda like: next(noise)),
        mock.patch.object(peer.NoiseScheduler, "sample_random_times", lambda scheduler, batch: draws["lowres_level"]),
        mock.patch.object(peer.random, "random", lambda: next(chances)),
        mock.patch.object(peer.K, "RandomCrop", crop),
    ):
        image = batch["image"].permute(0, 3, 1, 2).float() / 255
        text = {"text_encodings": batch["text_states"].float()} if task.config.reads_text else {}
        loss = task.decoder(image, image_embed=batch["image_embedding"], unet_number=number, **text)
    assert next(noise, None) is None
    return loss


def our_loss(task: Dalle2DecoderTask, batch: Batch, number: int) -> torch.Tensor:
    """The terms of U-Net `number`, weighted."""
    terms = {key: term for key, term in task(batch).terms.items() if key.startswith(f"unet{number}")}
    return torch.stack([task.coefficients.get(key, 1.0) * term.sum / term.weight for key, term in terms.items()]).sum()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_losses_equal_the_peers_forward_with_the_same_draws(variant):
    task = make(*VARIANTS[variant])
    batch = drawn(task, task.example_batch(16))
    before = {key: value.clone() for key, value in batch.items()}
    for number in task.config.trained:
        ours, theirs = our_loss(task, batch, number), peers_loss(task, batch, number)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert all(torch.equal(batch[key], value) for key, value in before.items()), "the batch must not be changed"
    assert 0 < batch["keep_image1"].sum() < 16


def test_twenty_steps_equal_the_peers():
    """One optimizer over both U-Nets and the sum of their losses, on both sides."""
    losses: dict[str, list[float]] = {}
    for side, loss_of in (("ours", our_loss), ("theirs", peers_loss)):
        task = make()
        optimizer = torch.optim.AdamW(task.parameter_groups(0.01), lr=1e-3)
        losses[side] = []
        for step in range(20):
            batch = task.example_batch(8, seed=step)
            batch["slot"] = batch["slot"] + 8 * step
            batch = drawn(task, batch)
            loss = torch.stack([loss_of(task, batch, number) for number in (1, 2)]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[side].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-5)
    assert losses["ours"][-1] < losses["ours"][0]


def test_blur_crops_and_self_conditioning_are_drawn_for_each_sample():
    task = make("task.blur_sigma=0.4,0.9", "task.blur_kernel_size=3,7", "task.random_crop_sizes=0,8", "task.base.self_cond=true")
    batch = task.example_batch(32)
    batch |= task.draws(batch)
    assert 0 < batch["blur2"].sum() < 32
    assert set(batch["blur_kernel2"].tolist()) == {3, 5, 7}
    assert 0.4 <= batch["blur_sigma2"].min() < batch["blur_sigma2"].max() <= 0.9
    assert len({tuple(corner) for corner in batch["crop2"].tolist()}) > 16
    assert 0 < batch["self_cond1"].sum() < 32
    whole = our_loss(task, batch, 2)
    alone = [our_loss(task, {key: value[row : row + 1] for key, value in batch.items()}, 2) for row in range(32)]
    assert torch.stack(alone).mean().item() == pytest.approx(whole.item(), rel=1e-4)


def test_only_the_chosen_unets_learn():
    task = make("task.train_unets=2")
    batch = drawn(task, task.example_batch(4))
    assert set(task(batch).terms) == {"unet2"}
    assert isinstance(task.decoder.unets[0], torch.nn.Identity), "without weights it would only take memory"
    assert not [key for key in batch if key.endswith("1")]


def _load(folder: Path) -> peer.Decoder:
    """What a user of dalle2-pytorch does with an export."""
    decoder = DecoderConfig(**json.loads((folder / "decoder_config.json").read_text())["decoder"]).create()
    decoder.load_state_dict(torch.load(folder / "decoder.pth", weights_only=True)["model"])
    return decoder.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_loads_in_dalle2_pytorch_with_the_same_output(tmp_path, variant):
    task = make(*VARIANTS[variant]).eval()
    task.export(tmp_path)
    decoder = _load(tmp_path)
    embedding = task.example_batch(2)["image_embedding"]
    outputs = []
    for one in (task.decoder, decoder):
        torch.manual_seed(4)
        # Channels last in memory would be filled with noise in another order.
        text = {"text_encodings": torch.randn(2, 5, 6)} if task.config.reads_text else {}
        outputs.append(one.to(memory_format=torch.contiguous_format).sample(image_embed=embedding, **text))
    assert torch.equal(*outputs)
    scope: dict = {}
    exec(task.usage.format(folder=tmp_path), scope)
    assert torch.equal(scope["decoder"].unets[0].null_image_embed, task.decoder.unets[0].null_image_embed)


def test_the_peers_trainer_starts_from_an_export_and_its_checkpoints_from_here(tmp_path):
    from accelerate import Accelerator
    from dalle2_pytorch.trainer import DecoderTrainer

    task = make()
    task.export(tmp_path / "export")
    torch.manual_seed(1)
    decoder = DecoderConfig(**json.loads((tmp_path / "export" / "decoder_config.json").read_text())["decoder"]).create()
    trainer = DecoderTrainer(decoder, accelerator=Accelerator(cpu=True), use_ema=True, lr=1e-3, ema_update_after_step=0, ema_update_every=1)
    trainer.load(str(tmp_path / "export" / "decoder.pth"))
    for unet in (trainer.decoder.unets[0], trainer.ema_unets[0].ema_model):
        assert torch.equal(unet.null_image_embed, task.decoder.unets[0].null_image_embed)
    batch = task.example_batch(4)
    image = batch["image"].permute(0, 3, 1, 2).float() / 255
    trainer(image, image_embed=batch["image_embedding"], unet_number=1)
    trainer.update(1)
    trainer.save(tmp_path / "latest.pth")
    again = make(f"task.pretrained={tmp_path / 'latest.pth'}")
    averaged = trainer.ema_unets[0].ema_model.state_dict()
    assert all(torch.equal(value, averaged[key]) for key, value in again.decoder.unets[0].state_dict().items())


def test_an_export_is_a_start_for_the_next_run_whatever_the_run_says_of_sizes(tmp_path):
    task = make("task.base.dim=16", "task.predict_v=true", "task.learned_variance=false")
    task.export(tmp_path)
    for pretrained in (tmp_path, tmp_path / "decoder.pth"):
        again = make(f"task.pretrained={pretrained}", "task.image_cond_drop_prob=0.3", seed=1)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in task.state_dict().items())
        assert again.decoder.predict_v == (True, True)
        assert again.decoder.image_cond_drop_prob == 0.3


def test_unets_of_two_checkpoints_make_one_decoder(tmp_path):
    base, upsampler = make("task.train_unets=1"), make("task.train_unets=2", seed=1)
    base.export(tmp_path / "base")
    upsampler.export(tmp_path / "upsampler")
    both = make(f"task.pretrained={tmp_path / 'base'},{tmp_path / 'upsampler'}")
    assert torch.equal(both.decoder.unets[0].null_image_embed, base.decoder.unets[0].null_image_embed)
    assert torch.equal(both.decoder.unets[1].to_out.weight, upsampler.decoder.unets[1].to_out.weight)
    one = make(f"task.pretrained={tmp_path / 'base'}", "task.train_unets=2")
    assert not any(parameter.requires_grad for parameter in one.decoder.unets[0].parameters())


@pytest.mark.parametrize(
    "damage", ["other sizes", "no weights", "not a checkpoint", "no config", "other dimension", "other pictures", "nan"]
)
def test_weights_that_do_not_fit_are_refused(tmp_path, damage):
    folder = tmp_path / "export"
    make("task.base.dim=16").export(folder)
    overrides, key = [f"task.pretrained={folder}"], "task.pretrained"
    if damage == "other sizes":
        (folder / "decoder_config.json").unlink()
    elif damage == "no weights":
        torch.save({"model": {"noise": torch.zeros(1)}}, folder / "decoder.pth")
    elif damage == "not a checkpoint":
        (folder / "decoder.pth").write_bytes(b"cut off")
    elif damage == "no config":
        (folder / "decoder_config.json").write_text("{}")
    elif damage == "other dimension":
        overrides, key = [*overrides, "task.image_embed_dim=32"], "task.image_embed_dim"
    elif damage == "other pictures":
        overrides, key = [*overrides, "task.image_sizes=8,32"], "task.image_sizes"
    else:
        state = torch.load(folder / "decoder.pth", weights_only=True)
        state["ema"]["1.ema_model.to_out.weight"].fill_(float("nan"))
        torch.save(state, folder / "decoder.pth")
    with pytest.raises(ConfigError) as caught:
        make(*overrides)
    assert caught.value.key == key
    assert damage != "nan" or "NaN" in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "overrides", "message"),
    [
        ({"images": 3, "image_dim": 64}, ["task.image_embed_dim=96"], "64"),
        ({"images": 3, "image_dim": None}, [], "image embeddings"),
        ({"images": 0, "image_dim": 64}, [], "without images"),
    ],
)
def test_data_that_does_not_fit_is_refused(facts, overrides, message):
    config = apply_overrides(load_recipe("dalle2_decoder", "smoke"), overrides).task
    with pytest.raises(ConfigError, match=message):
        config.check_data(facts)


def test_the_dimension_comes_from_the_data_and_the_peers_defect_is_refused():
    config = load_recipe("dalle2_decoder", "smoke").task
    assert config.resolve({"image_dim": 64}).image_embed_dim == 64
    with pytest.raises(ConfigError) as caught:
        config.resolve({"image_dim": config.base.cond_dim})
    assert caught.value.key == "task.base.cond_dim"
    with pytest.raises(ConfigError) as caught:
        Dalle2DecoderTask(config, 0)
    assert caught.value.key == "task.image_embed_dim"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("task.image_sizes=16,8", "task.image_sizes"),
        ("task.image_sizes=9,18", "task.image_sizes"),
        ("task.train_unets=3", "task.train_unets"),
        ("task.beta_schedule=cosine,cosinus", "task.beta_schedule"),
        ("task.beta_schedule=cosine", "task.beta_schedule"),
        ("task.sample_timesteps=200", "task.sample_timesteps"),
        ("task.random_crop_sizes=4,8", "task.random_crop_sizes"),
        ("task.blur_kernel_size=4", "task.blur_kernel_size"),
        ("task.timesteps=10", "task.timesteps"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(override, key):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(load_recipe("dalle2_decoder", "smoke"), [override])
    assert caught.value.key == key
    if key == "task.sample_timesteps":
        assert "100" in str(caught.value)
