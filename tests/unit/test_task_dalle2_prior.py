"""The prior: losses and samples equal dalle2-pytorch's for the same draws, its exports load there, cosines mean what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import dalle2_pytorch.dalle2_pytorch as peer
import pytest
import torch
import torch.nn.functional as F
from dalle2_pytorch.train_configs import DiffusionPriorConfig

from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.recipes.dalle2_prior import Dalle2PriorConfig
from diptych.trainers.tasks.dalle2_prior import Dalle2PriorTask

DIM = 24


def make(*overrides: str) -> Dalle2PriorTask:
    """The task of the recipe `smoke`."""
    return Dalle2PriorTask(apply_overrides(load_recipe("dalle2_prior", "smoke"), [f"task.embed_dim={DIM}", *overrides]).task, seed=0)


VARIANTS = {
    "as in smoke": (),
    "noise": ("task.predict_x_start=false",),
    "velocity": ("task.predict_v=true",),
    "clamped": ("task.training_clamp_l2norm=true", "task.sampling_clamp_l2norm=true", "task.sampling_final_clamp_l2norm=true"),
    "l1, linear, own scale": ("task.loss_type=l1", "task.beta_schedule=linear", "task.image_embed_scale=3.0"),
    "several tokens": (
        "task.num_text_embeds=2",
        "task.num_image_embeds=2",
        "task.num_time_embeds=2",
        "task.learned_timesteps=true",
        "task.max_text_len=3",
        "task.init_image_embed_l2norm=true",
    ),
    "captions too": ("task.condition_on_text_encodings=true", "task.max_text_len=9", "task.text_cond_drop_prob=0.4"),
    "dropped often": ("task.text_cond_drop_prob=0.5", "task.image_cond_drop_prob=0.5"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_equals_the_peers_forward_with_the_same_draws(variant):
    task = make(*VARIANTS[variant])
    batch = task.example_batch(32)
    batch |= task.draws(batch)
    before = {key: value.clone() for key, value in batch.items()}
    ours = task(batch).terms["diffusion"]
    assert all(torch.equal(batch[key], value) for key, value in before.items()), "the batch must not be changed"
    # The peer draws a mask for texts, then one for images.
    masks = iter([batch["keep_text"], batch["keep_image"]])
    with (
        mock.patch.object(peer, "prob_mask_like", lambda shape, prob, device: next(masks)),
        mock.patch.object(task.prior.noise_scheduler, "sample_random_times", lambda count: batch["timestep"]),
    ):
        states = {"text_encodings": batch["text_states"].float()} if task.config.condition_on_text_encodings else {}
        theirs = task.prior(
            text_embed=batch["text_embedding"], image_embed=batch["image_embedding"].clone(), noise=batch["noise"], **states
        )
    assert (ours.sum / ours.weight).item() == pytest.approx(theirs.item(), rel=1e-6)
    assert next(masks, None) is None
    assert variant != "dropped often" or 0 < batch["keep_text"].sum() < 32


@pytest.mark.parametrize("steps", [6, 25], ids=["ddim", "ancestral"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_equal_the_peers_loop_with_the_same_noise(variant, steps):
    task = make("task.sample_timesteps=4", "task.timesteps=25", *VARIANTS[variant]).eval()
    text = task.example_batch(3)["text_embedding"]
    given: list[torch.Tensor] = []

    def record(seed, purpose, slots, shape):
        given.append(torch.randn(len(slots), *shape, generator=torch.Generator().manual_seed(len(given))))
        return given[-1]

    with torch.no_grad(), mock.patch("diptych.trainers.randomness.normal", record):
        ours = task.sample(text, torch.arange(3), steps=steps, cond_scale=1.5)
    replay: Iterator[torch.Tensor] = iter(given)

    def next_noise(*args, **options):
        # Ancestral sampling of the peer draws noise at step 0 too and multiplies it by zero.
        return next(replay, torch.zeros(3, DIM))

    with mock.patch.object(torch, "randn", next_noise), mock.patch.object(torch, "randn_like", next_noise):
        theirs = task.prior.p_sample_loop((3, DIM), text_cond={"text_embed": text}, cond_scale=1.5, timesteps=steps)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_samples_belong_to_slots_seed_and_purpose():
    task = make().eval()
    text = task.example_batch(5)["text_embedding"]
    with torch.no_grad():
        whole = task.sample(text, torch.arange(5))
        assert torch.allclose(task.sample(text[3:], torch.tensor([3, 4])), whole[3:], atol=1e-5)
        assert not torch.allclose(task.sample(text, torch.arange(5), "another"), whole, atol=1e-2)


def test_cosines_are_those_of_the_report_of_dalle2_pytorch():
    task = make()
    text = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    image = torch.tensor([[1.0, 1.0], [0.0, 5.0]])
    predicted = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 4.0]]])
    figures = task.summarise({"text": text, "image": image, "predicted": predicted})
    half = 0.5**0.5
    assert figures == pytest.approx(
        {
            "cosine_text_image": (half + 1) / 2,
            "cosine_text_predicted": ((1 + 0) / 2 + 1) / 2,
            "cosine_image_predicted": (half + 1) / 2,
            "cosine_unrelated": ((0 + 1) / 2 + 0) / 2,
            "cosine_difference": ((1 + 0) / 2 + 1) / 2 - (half + 1) / 2,
        }
    )


def test_validation_averages_over_samples_and_keeps_the_loss():
    task = make("task.validation_samples=3").eval()
    batch = task.example_batch(4)
    batch |= task.draws(batch)
    with torch.no_grad():
        validation = task.validate(batch)
    assert validation.rows["predicted"].shape == (4, 3, DIM)
    assert not torch.equal(validation.rows["predicted"][:, 0], validation.rows["predicted"][:, 1])
    assert validation.terms["diffusion"].weight == 4


def test_it_learns_to_predict_the_image():
    # Images are a fixed rotation of texts: easy to learn, and impossible by copying the text.
    task = make("task.depth=2", "task.sample_timesteps=8")
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)))[0]
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for step in range(150):
        batch = _rotated(task, 128, step, rotation)
        term = task(batch | task.draws(batch)).terms["diffusion"]
        optimizer.zero_grad()
        (term.sum / term.weight).backward()
        optimizer.step()
    task.eval()
    batch = _rotated(task, 64, 999, rotation)
    with torch.no_grad():
        figures = task.summarise(task.validate(batch | task.draws(batch)).rows)
    assert figures["cosine_image_predicted"] > 0.8
    assert figures["cosine_image_predicted"] - figures["cosine_unrelated"] > 0.5


def _rotated(task: Dalle2PriorTask, size: int, number: int, rotation: torch.Tensor) -> dict[str, torch.Tensor]:
    batch = task.example_batch(size, seed=number)
    batch["slot"] = batch["slot"] + number * size
    batch["text_embedding"] = F.normalize(batch["image_embedding"] @ rotation, dim=-1)
    return batch


def _load(folder: Path) -> peer.DiffusionPrior:
    """What a user of dalle2-pytorch does with an export."""
    prior = DiffusionPriorConfig(**json.loads((folder / "prior_config.json").read_text())["prior"]).create()
    prior.load_state_dict(torch.load(folder / "prior.pth", weights_only=True)["model"])
    return prior.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_loads_in_dalle2_pytorch_with_the_same_output(tmp_path, variant):
    task = make(*VARIANTS[variant]).eval()
    task.export(tmp_path / "export")
    prior = _load(tmp_path / "export")
    text = task.example_batch(3)["text_embedding"]
    outputs = []
    for one in (task.prior, prior):
        torch.manual_seed(4)
        outputs.append(one.p_sample_loop((3, DIM), text_cond={"text_embed": text}, timesteps=5))
    assert torch.equal(*outputs)
    scope: dict = {}
    exec(task.usage.format(folder=tmp_path / "export"), scope)
    assert torch.equal(scope["prior"].net.learned_query, task.prior.net.learned_query)


def test_the_peers_trainer_starts_from_an_export(tmp_path):
    from dalle2_pytorch.trainer import DiffusionPriorTrainer

    task = make()
    task.export(tmp_path)
    torch.manual_seed(1)
    prior = DiffusionPriorConfig(**json.loads((tmp_path / "prior_config.json").read_text())["prior"]).create()
    trainer = DiffusionPriorTrainer(prior, use_ema=True, lr=1e-3)
    trainer.load(str(tmp_path / "prior.pth"))
    for one in (trainer.diffusion_prior, trainer.ema_diffusion_prior.ema_model):
        assert torch.equal(one.net.learned_query.cpu(), task.prior.net.learned_query)
    batch = task.example_batch(4)
    trainer(text_embed=batch["text_embedding"], image_embed=batch["image_embedding"].clone())
    trainer.update()
    assert not torch.equal(trainer.diffusion_prior.net.learned_query.cpu(), task.prior.net.learned_query)


def test_an_export_is_a_start_for_the_next_run_whatever_the_run_says_of_sizes(tmp_path):
    task = make("task.depth=2", "task.num_text_embeds=2", "task.predict_v=true")
    task.export(tmp_path / "export")
    for pretrained in (tmp_path / "export", tmp_path / "export" / "prior.pth"):
        again = Dalle2PriorTask(Dalle2PriorConfig(pretrained=str(pretrained), text_cond_drop_prob=0.2, image_cond_drop_prob=0.3), 1)
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in task.state_dict().items())
        assert again.prior.predict_v
        assert (again.prior.text_cond_drop_prob, again.prior.image_cond_drop_prob) == (0.2, 0.3)


class _Unsafe:
    """Stands for what the peer's trainer pickles beside the weights; unpickling it for real would be noticed."""

    touched: list[str] = []  # noqa: RUF012

    def __reduce__(self):
        return (_Unsafe.touched.append, ("unpickled",))


def test_checkpoints_of_the_peers_trainer_load_without_running_what_is_in_them(tmp_path):
    from packaging import version

    task = make()
    state = task.prior.state_dict()
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    loaded = {
        "version": version.parse("1.15.6"),
        "warmup_scheduler": _Unsafe(),
        "model": state,
        "ema_model": averaged,
        "step": torch.tensor([3]),
    }
    loaded["model"] = loaded["model"] | {"clip.clip.weight": torch.zeros(3)}
    torch.save(loaded, tmp_path / "latest.pth")
    again = make(f"task.pretrained={tmp_path / 'latest.pth'}")
    assert not _Unsafe.touched
    assert torch.equal(again.prior.net.learned_query, averaged["net.learned_query"])
    torch.save({"model": loaded["model"]}, tmp_path / "weights.pth")
    assert torch.equal(make(f"task.pretrained={tmp_path / 'weights.pth'}").prior.net.learned_query, state["net.learned_query"])


@pytest.mark.parametrize("damage", ["other sizes", "no weights", "not a checkpoint", "no config", "other dimension"])
def test_weights_that_do_not_fit_are_refused(tmp_path, damage):
    folder = tmp_path / "export"
    make("task.depth=2").export(folder)
    overrides = [f"task.pretrained={folder}"]
    if damage == "other sizes":
        (folder / "prior_config.json").unlink()
    elif damage == "no weights":
        torch.save({"model": {}}, folder / "prior.pth")
    elif damage == "not a checkpoint":
        (folder / "prior.pth").write_bytes(b"cut off")
    elif damage == "no config":
        (folder / "prior_config.json").write_text("{}")
    else:
        overrides.append("task.embed_dim=32")
    with pytest.raises(ConfigError) as caught:
        make(*overrides)
    assert caught.value.key == ("task.embed_dim" if damage == "other dimension" else "task.pretrained")


@pytest.mark.parametrize("source", ["/nowhere", "./nowhere", "nowhere", "no/such"])
def test_weights_that_are_not_there_are_refused(source):
    with pytest.raises(ConfigError) as caught:
        make(f"task.pretrained={source}")
    assert caught.value.key == "task.pretrained"


@pytest.mark.parametrize(
    ("facts", "overrides", "message"),
    [
        ({"image_dim": 64, "text_dim": 32}, [], "images of 64 and texts of 32"),
        ({"image_dim": 64, "text_dim": 64}, ["task.embed_dim=96"], "64"),
        ({"image_dim": None, "text_dim": 64}, [], "image"),
        ({"image_dim": 64, "text_dim": None}, [], "text"),
        ({}, [], "embed"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused_by_dimension(facts, overrides, message):
    config = apply_overrides(load_recipe("dalle2_prior", "base"), overrides).task
    with pytest.raises(ConfigError, match=message):
        config.check_data(facts)


def test_the_dimension_comes_from_the_data():
    facts = {"image_dim": 64, "text_dim": 64}
    config = load_recipe("dalle2_prior", "base").task.resolve(facts)
    config.check_data(facts)
    assert config.embed_dim == 64
    assert Dalle2PriorTask(config, 0).prior.image_embed_dim == 64
    assert Dalle2PriorConfig(embed_dim=32).resolve(facts).embed_dim == 32


def test_an_unknown_dimension_is_refused_with_where_it_comes_from():
    with pytest.raises(ConfigError, match=r"data\.embeddings") as caught:
        Dalle2PriorTask(load_recipe("dalle2_prior", "smoke").task, 0)
    assert caught.value.key == "task.embed_dim"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["task.cond_scale=2", "task.text_cond_drop_prob=0"], "task.text_cond_drop_prob"),
        (["task.sample_timesteps=200"], "task.sample_timesteps"),
        (["task.timesteps=20", "task.beta_schedule=linear"], "task.timesteps"),
        (["task.beta_schedule=cosinus"], "task.beta_schedule"),
    ],
)
def test_a_configuration_that_cannot_be_sampled_is_refused(overrides, key):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(load_recipe("dalle2_prior", "smoke"), overrides)
    assert key in (caught.value.key, *str(caught.value).split())
