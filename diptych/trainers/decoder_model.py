"""dalle2-pytorch's decoder: built from a configuration or published weights, and exported.

Shape legend: B rows, S pixels of a square picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diptych.config import ConfigError, build
from diptych.recipes._dalle2_json import decoder_fields
from diptych.recipes._unets import UnetConfig
from diptych.recipes.dalle2_decoder import STAGES, Dalle2DecoderConfig
from diptych.trainers.foreign_checkpoints import locate_weights, read_state

if TYPE_CHECKING:
    from dalle2_pytorch import Decoder

WEIGHTS = "decoder.pth"
CONFIG = "decoder_config.json"
TRAINING_KEYS = (
    *("pretrained", "train_unets", "loss_type", "vb_loss_weight", "p2_loss_weight_gamma", "p2_loss_weight_k"),
    *("image_cond_drop_prob", "text_cond_drop_prob", "random_crop_sizes", "blur_prob", "blur_sigma", "blur_kernel_size"),
    *("sample_timesteps", "ddim_sampling_eta", "cond_scale", "text_tower", "tokenizer", "text_length", "resize", "flip", "min_scale"),
)
"""What a fine-tune may choose anew; everything else says what the weights mean."""


def effective_config(config: Dalle2DecoderConfig) -> tuple[Dalle2DecoderConfig, list[Path]]:
    """`config` with the sizes of the configuration beside its only weights, where there is one, and the files of the weights.

    Raises `ConfigError` where the stored configuration asks for other data than the run's, or the dimension is unknown.
    """
    files = [locate_weights("task.pretrained", source, WEIGHTS, CONFIG) for source in config.pretrained]
    if len(files) == 1 and (stored := files[0].parent / CONFIG).is_file():
        config = _with_stored_sizes(config, stored)
    if config.image_embed_dim is None:
        raise ConfigError(
            "task.image_embed_dim", None, "the dimension of the image embeddings", "`diptych train` fills it in from data.embeddings."
        )
    # Once more, now that the dimension is known.
    return build(Dalle2DecoderConfig, dict(config), "task"), files


def _with_stored_sizes(config: Dalle2DecoderConfig, path: Path) -> Dalle2DecoderConfig:
    try:
        data = json.loads(path.read_text())
        fields = decoder_fields(data.get("decoder", data))[0]
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError("task.pretrained", str(path), "a configuration of dalle2-pytorch's decoder", repr(error)) from error
    stored = build(Dalle2DecoderConfig, fields, "task")
    remedy = f"Start from what belongs to the weights: diptych train dalle2_decoder --config {path} task.pretrained=…"
    for key in ("image_sizes", "image_embed_dim", "reads_text"):
        ours, theirs = getattr(config, key), getattr(stored, key)
        if ours != theirs and not (key == "image_embed_dim" and None in (ours, theirs)):
            raise ConfigError(f"task.{key}", ours, f"{theirs}, as in task.pretrained", remedy)
    kept = {key: getattr(config, key) for key in TRAINING_KEYS}
    kept |= {key: getattr(config, key) for key in ("image_embed_dim", "text_embed_dim") if getattr(stored, key) is None}
    return build(Dalle2DecoderConfig, dict(stored) | kept, "task")


def build_decoder(config: Dalle2DecoderConfig, files: Sequence[Path], seed: int) -> Decoder:
    """The model of an effective configuration with the weights in `files`; fresh weights are a function of `seed`.

    A U-Net that neither learns nor has weights is left out, as the peer does (`nn.Identity`). Raises `ConfigError` where weights
    do not fit or are not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = create_decoder(decoder_section(config))
    loaded = [_load(decoder, path) for path in files]
    known = set(config.trained).union(*loaded)
    for number in range(1, len(decoder.unets) + 1):
        if number not in known:
            decoder.unets[number - 1] = nn.Identity()
        elif number not in config.trained:
            decoder.unets[number - 1].requires_grad_(requires_grad=False)
        else:
            _freeze_unreached(decoder.unets[number - 1])
    # Convolutions on CPUs and on tensor cores run several times faster with channels last.
    return decoder.to(memory_format=torch.channels_last)


def create_decoder(section: dict[str, Any]) -> Decoder:
    """The peer's model from the section `decoder` of its configuration."""
    from dalle2_pytorch import Decoder, Unet

    options = {key: value for key, value in section.items() if key not in ("unets", "clip")}
    return Decoder([Unet(**unet) for unet in section["unets"]], **options)


def decoder_section(config: Dalle2DecoderConfig) -> dict[str, Any]:
    """The section `decoder` of the peer's own configuration."""
    count = len(config.image_sizes)
    upsamplers = {
        key: [config.of_stage(key, index) for index in range(count - 1)]
        for key in ("use_blur_for_lowres_cond", "use_noise_for_lowres_cond")
    }
    stages = ("predict_x_start", "predict_v", "p2_loss_weight_gamma", "sample_timesteps")
    same = (
        *("timesteps", "loss_type", "learned_variance_constrain_frac", "vb_loss_weight", "p2_loss_weight_k", "image_cond_drop_prob"),
        *("text_cond_drop_prob", "blur_prob", "lowres_noise_sample_level", "lowres_downsample_first", "use_dynamic_thres"),
        *("dynamic_thres_percentile", "ddim_sampling_eta"),
    )
    return {
        "unets": [_unet_section(unet, config) for unet in config.unets],
        "image_sizes": list(config.image_sizes),
        "beta_schedule": list(config.beta_schedule) or None,
        "learned_variance": list(config.learned_variance),
        "random_crop_sizes": [size or None for size in config.random_crop_sizes] or None,
        "blur_sigma": _one_or_all(config.blur_sigma),
        "blur_kernel_size": _one_or_all(config.blur_kernel_size),
        **{key: [config.of_stage(key, index) for index in range(count)] for key in stages},
        **{key: getattr(config, key) for key in same},
        **(upsamplers if count > 1 else {"use_blur_for_lowres_cond": False}),
    }


def _unet_section(unet: UnetConfig, config: Dalle2DecoderConfig) -> dict[str, Any]:
    section = {key: list(value) if isinstance(value, tuple) else value for key, value in dict(unet).items()}
    for key in ("num_resnet_blocks", "resnet_groups", "self_attn"):
        section[key] = _one_or_all(getattr(unet, key))
    # The peer makes one channel of an empty one.
    section["cond_dim"] = unet.cond_dim or unet.dim
    section["image_embed_dim"] = config.image_embed_dim
    section["text_embed_dim"] = config.text_embed_dim if unet.cond_on_text_encodings else None
    return section


def _one_or_all(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def _freeze_unreached(unet: nn.Module) -> None:
    """Freeze what no loss reaches in this combination of conditions, so that every trainable parameter gets a gradient."""
    unreached = {
        "null_text_embed": not unet.cond_on_text_encodings,
        "null_image_embed": not unet.cond_on_image_embeds,
        "null_image_hiddens": unet.to_image_hiddens is None,
        # Only the later stages attend to these tokens; the middle has its own.
        "norm_cond": len(unet.downs) < 2,  # type: ignore[arg-type]
    }
    for name, frozen in unreached.items():
        if frozen:
            getattr(unet, name).requires_grad_(False)


_EMA = re.compile(r"^(\d+)\.ema_model\.(.+)$")


def _load(decoder: Decoder, path: Path) -> set[int]:
    """Copy the U-Nets in the checkpoint `path`, averaged ones where it has them; returns their numbers."""
    averaged = {f"unets.{found[1]}.{found[2]}": value for key, value in read_state(path, ("ema",)).items() if (found := _EMA.match(key))}
    state = read_state(path, ("model",)) | averaged
    numbers = {int(key.split(".")[1]) + 1 for key in state if key.startswith("unets.")}
    numbers &= set(range(1, len(decoder.unets) + 1))
    if not numbers:
        raise ConfigError("task.pretrained", str(path), "a checkpoint of dalle2-pytorch's decoder", "It holds no U-Net of this run.")
    for number in numbers:
        prefix = f"unets.{number - 1}."
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        bad = [key for key, value in part.items() if value.is_floating_point() and not torch.isfinite(value).all()]
        if bad:
            remedy = "The run that wrote them diverged: take an earlier checkpoint."
            raise ConfigError("task.pretrained", f"{path}: NaN or infinite numbers in {prefix}{bad[0]}", "finite weights", remedy)
        try:
            decoder.unets[number - 1].load_state_dict(part)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:500]
            raise ConfigError("task.pretrained", str(path), f"weights of the configured task.{STAGES[number - 1]}", reason) from error
    return numbers


def export_decoder(decoder: Decoder, config: Dalle2DecoderConfig, folder: Path) -> None:
    """Write `decoder.pth` and `decoder_config.json`: the peer's classes load them, and its `DecoderTrainer` starts from them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in decoder.state_dict().items()}
    torch.save({"model": state} | _trainer_state(decoder, state), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"decoder": decoder_section(config)}, indent=2))


def _trainer_state(decoder: Decoder, state: dict[str, Tensor]) -> dict[str, Any]:
    """What `DecoderTrainer.load` asks for beside the weights, as of step 0, in types that `weights_only` loading accepts."""
    from dalle2_pytorch.optimizer import get_optimizer
    from dalle2_pytorch.version import __version__

    averaged: dict[str, Tensor] = {}
    trainer: dict[str, Any] = {"version": __version__, "steps": torch.zeros(len(decoder.unets), dtype=torch.long)}
    for index, unet in enumerate(decoder.unets):
        known = not isinstance(unet, nn.Identity)
        optimizer = get_optimizer(unet.parameters(), lr=1e-4, wd=1e-2, group_wd_params=True) if known else None
        trainer[f"optim{index}"] = optimizer.state_dict() if optimizer else None
        trainer[f"sched{index}"] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0).state_dict() if optimizer else None
        averaged |= {f"{index}.initted": torch.tensor(True), f"{index}.step": torch.tensor(0)}
        prefix = f"unets.{index}."
        for owner in ("online_model", "ema_model"):
            averaged |= {f"{index}.{owner}.{key.removeprefix(prefix)}": value for key, value in state.items() if key.startswith(prefix)}
    return trainer | {"ema": averaged}
