"""Low-rank adapters on a frozen Stable Diffusion: added by peft, written and read as diffusers' `pytorch_lora_weights.safetensors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diptych.config import ConfigError
from diptych.recipes.stable_diffusion import LoraConfig
from diptych.trainers.sd_model import SdParts

_FILE = "pytorch_lora_weights.safetensors"
_PARTS = ("unet", "text_encoder")


def add_adapters(parts: SdParts, config: LoraConfig) -> None:
    """Put adapters on the frozen parts: as diffusers' script, the first matrix normal, the second zero.

    Raises `ConfigError` where a target names no module, or `config.start` does not fit the base.
    """
    for key, part, targets in (("targets", parts.unet, config.targets), ("text_targets", parts.text_encoder, config.text_targets)):
        if not targets:
            continue
        assert part is not None
        settings = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha or config.rank, init_lora_weights="gaussian", target_modules=list(targets)
        )
        try:
            part.add_adapter(settings)
        except ValueError as error:
            raise ConfigError(f"task.lora.{key}", ",".join(targets), "names of modules of the model", str(error).splitlines()[0]) from error
    if config.start:
        load_adapters(parts, config.start)


def _adapted(parts: SdParts) -> dict[str, Any]:
    found = {name: getattr(parts, name) for name in _PARTS}
    return {name: part for name, part in found.items() if part is not None and getattr(part, "peft_config", None)}


def load_adapters(parts: SdParts, source: str) -> None:
    """Take the adapters of a file, or of the one in a folder; `ConfigError` unless they are exactly those of this model."""
    path = Path(source)
    path = path / _FILE if path.is_dir() else path
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError("task.lora.start", source, f"a {_FILE}, or a folder with one", str(error)) from error
    for name, part in _adapted(parts).items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        loaded = convert_unet_state_dict_to_peft(own) if name == "unet" else convert_state_dict_to_peft(own)
        # transformers before version 5 had one more level of names.
        loaded = {key.removeprefix("text_model."): value for key, value in loaded.items()}
        _check_fit(source, name, get_peft_model_state_dict(part), loaded)
        set_peft_model_state_dict(part, loaded)
    strangers = sorted({key.split(".")[0] for key in tensors} - set(_adapted(parts)))
    if strangers:
        raise ConfigError("task.lora.start", source, f"adapters of {', '.join(_adapted(parts))}; it also holds {', '.join(strangers)}")


def _check_fit(source: str, part: str, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    remedy = "It belongs to another base, rank or choice of task.lora.targets."
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        received = f"{source}: {part} lacks {missing[:2] or 'nothing'} and has unknown {unknown[:2] or 'nothing'}"
        raise ConfigError("task.lora.start", received, "adapters of this model", remedy)
    for name, value in wanted.items():
        if value.shape != found[name].shape:
            received = f"{source}: {part}.{name} of shape {list(found[name].shape)}"
            raise ConfigError("task.lora.start", received, f"{list(value.shape)}, as this base needs", remedy)


def export_adapters(parts: SdParts, folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(folder)` takes, with rank and alpha in its metadata."""
    layers: dict[str, Any] = dict.fromkeys(_PARTS)
    about: dict[str, Any] = dict.fromkeys(_PARTS)
    for name, part in _adapted(parts).items():
        layers[name] = convert_state_dict_to_diffusers(get_peft_model_state_dict(part))
        about[name] = part.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=about["unet"],
        text_encoder_lora_adapter_metadata=about["text_encoder"],
    )


@contextmanager
def adapters_off(parts: SdParts) -> Iterator[None]:
    """The parts are those of the base inside the block."""
    adapted = list(_adapted(parts).values())
    for part in adapted:
        part.disable_adapters()
    try:
        yield
    finally:
        for part in adapted:
            part.enable_adapters()
