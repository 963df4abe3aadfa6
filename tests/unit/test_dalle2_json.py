"""DALLE2-pytorch's JSON configurations as input: the same model as the peer makes of them, and a word on what changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dalle2_pytorch.train_configs import DecoderConfig, DiffusionPriorConfig

from diptych.config import ConfigError, RunConfig, load_config_file, set_path
from diptych.pipelines.train import resolve
from diptych.trainers.tasks.dalle2_decoder import Dalle2DecoderTask
from diptych.trainers.tasks.dalle2_prior import Dalle2PriorTask

UNET = {"dim": 8, "image_embed_dim": 24, "cond_dim": 12, "channels": 3, "dim_mults": [1, 2], "attn_dim_head": 8, "attn_heads": 2}
DECODER: dict[str, Any] = {
    "seed": 3,
    "decoder": {
        "unets": [
            UNET | {"self_attn": [False, True], "num_resnet_blocks": 1, "attend_at_middle": True},
            UNET | {"memory_efficient": True, "num_resnet_blocks": [1, 2], "resnet_groups": 4},
        ],
        "image_sizes": [16, 32],
        "channels": 3,
        "timesteps": 200,
        "sample_timesteps": [None, 50],
        "beta_schedule": ["cosine", "linear"],
        "learned_variance": True,
        "random_crop_sizes": [None, 16],
        "use_noise_for_lowres_cond": [False, True],
        "blur_sigma": [0.4, 0.8],
        "clip": {"make": "openai", "model": "ViT-L/14"},
    },
    "data": {
        "webdataset_base_url": "shards/{}.tar",
        "img_embeddings_url": "embeddings/img_emb",
        "num_workers": 4,
        "batch_size": 16,
        "start_shard": 0,
        "end_shard": 12,
        "shard_width": 3,
        "splits": {"train": 0.75, "val": 0.15, "test": 0.1},
        "shuffle_train": False,
        "preprocessing": {"RandomResizedCrop": {"size": [32, 32], "scale": [0.75, 1.0]}, "RandomHorizontalFlip": True, "ToTensor": True},
    },
    "train": {
        "epochs": 2,
        "epoch_samples": 800,
        "lr": [1e-4, 2e-4],
        "wd": 0.02,
        "max_grad_norm": 0.4,
        "save_every_n_samples": 320,
        "use_ema": True,
        "ema_beta": 0.98,
        "unet_training_mask": [False, True],
        "cond_scale": [1.5, 1.0],
        "amp": True,
        "device": "cuda:0",
    },
    "evaluate": {"FID": {"feature": 64}},
    "tracker": {"log": {"log_type": "console"}},
    "swizzle": 1,
}
PRIOR: dict[str, Any] = {
    "prior": {
        "net": {"dim": 24, "depth": 2, "num_timesteps": 100, "dim_head": 8, "heads": 3, "normformer": True, "max_text_len": 6},
        "image_embed_dim": 24,
        "image_size": 224,
        "timesteps": 100,
        "cond_drop_prob": 0.1,
        "condition_on_text_encodings": False,
        "sampling_clamp_l2norm": True,
    },
    "data": {
        "image_url": "emb/img_emb/",
        "meta_url": "emb/metadata",
        "batch_size": 32,
        "splits": {"train": 0.9, "val": 0.05, "test": 0.05},
    },
    "train": {"epochs": 1, "lr": 1e-3, "use_ema": False, "eval_timesteps": [16, 64], "random_seed": 5},
    "tracker": {"log": {"log_type": "console"}},
}


def load(tmp_path: Path, data: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """The run, and what was said of it."""
    file, said = tmp_path / "peer.json", []
    file.write_text(json.dumps(data))
    return load_config_file(str(file), said.append), said


def shapes(module: Any) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_a_decoders_configuration_makes_the_peers_model(tmp_path):
    config, said = load(tmp_path, DECODER)
    # All its U-Nets, so that shapes can be compared.
    task = Dalle2DecoderTask(set_path(config.task, "train_unets", ()), 0)
    theirs = DecoderConfig(**DECODER["decoder"] | {"clip": None}).create()
    assert shapes(task.decoder) == shapes(theirs)
    assert task.decoder.sample_timesteps == (200, 50)
    assert task.decoder.learned_variance == theirs.learned_variance == (True, False)
    assert config.task.random_crop_sizes == (0, 16)
    assert config.task.train_unets == (2,)
    assert config.task.cond_scale == (1.5, 1.0)
    assert (config.task.resize, config.task.min_scale, config.task.flip) == ("random_crop", 0.75, 0.5)
    assert (config.data.shards, config.data.embeddings) == ("shards/{000..012}.tar", "embeddings")
    assert (config.data.validation_share, config.data.shuffle, config.seed) == (0.25, False, 3)
    assert (config.train.steps, config.train.global_batch_size, config.train.precision) == (100, 16, "auto")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_norm, config.optim.ema_decay) == (1e-4, 0.02, 0.4, 0.98)
    assert (config.optim.betas, config.checkpoint.every_steps) == ((0.9, 0.99), 20)
    words = "\n".join(said)
    for field in (
        *(
            "decoder.clip",
            "decoder.blur_sigma",
            "decoder.unets.base.attend_at_middle",
            "data.batch_size",
            "data.splits",
            "data.num_workers",
        ),
        *("data.preprocessing.RandomHorizontalFlip", "train.lr", "train.epochs", "train.device", "evaluate", "tracker", "swizzle"),
    ):
        assert f"{field}: " in words, field
    assert RunConfig.from_json(config.to_json()) == config


def test_a_priors_configuration_makes_the_peers_model(tmp_path):
    config, said = load(tmp_path, PRIOR)
    theirs = DiffusionPriorConfig(**PRIOR["prior"]).create()
    assert shapes(Dalle2PriorTask(config.task, 0).prior) == shapes(theirs)
    assert (config.task.text_cond_drop_prob, config.task.image_cond_drop_prob) == (0.1, 0.1)
    assert not config.task.condition_on_text_encodings
    assert (config.task.sample_timesteps, config.task.sampling_clamp_l2norm) == (16, True)
    assert (config.data.embeddings, config.data.validation_share, config.seed) == ("emb", 0.1, 5)
    assert (config.optim.ema_decay, config.optim.lr, config.optim.eps) == (0.0, 1e-3, 1e-6)
    assert {"train.eval_timesteps", "data.meta_url", "train.epochs"} <= {line.partition(":")[0] for line in said}


def test_what_an_export_leaves_is_a_configuration_too(tmp_path):
    config, _ = load(tmp_path, {"decoder": DECODER["decoder"]})
    task = Dalle2DecoderTask(config.task, 0)
    task.export(tmp_path / "export")
    again = resolve("dalle2_decoder", "smoke", str(tmp_path / "export" / "decoder_config.json"), ["train.steps=7"])
    assert again.task.image_sizes == (16, 32)
    assert again.task.upsampler == config.task.upsampler
    assert again.train.steps == 7


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"decoder": DECODER["decoder"] | {"channels": 4}}, "decoder.channels"),
        ({"decoder": DECODER["decoder"] | {"unconditional": True}}, "decoder.unconditional"),
        ({"decoder": DECODER["decoder"] | {"unets": [UNET] * 4}}, "decoder.unets"),
        ({"decoder": {}}, "--config"),
        ({"prior": PRIOR["prior"] | {"net": PRIOR["prior"]["net"] | {"rotary_emb": False}}}, "prior.net.rotary_emb"),
    ],
)
def test_what_does_not_exist_here_is_refused(tmp_path, change, key):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, change)
    assert caught.value.key == key


def test_the_task_must_be_the_files(tmp_path):
    (tmp_path / "peer.json").write_text(json.dumps(PRIOR))
    with pytest.raises(ConfigError, match="dalle2_prior"):
        resolve("dalle2_decoder", "smoke", str(tmp_path / "peer.json"), [])
