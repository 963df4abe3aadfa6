"""Names of models that embed, understood without loading what they run on: a call that starts actors need not import torch itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diptych.config import ConfigError

Kind = Literal["open_clip", "hf", "sentence"]
ALLOWED = (
    "an open_clip NAME/TAG such as ViT-B-32/laion2b_s34b_b79k, a folder in open_clip's layout (an exported CoCa), a Hugging Face CLIP by "
    "name or folder, or sentence:NAME for texts alone"
)


@dataclass(frozen=True)
class ModelName:
    """A model's name, understood."""

    kind: Kind
    name: str
    """open_clip architecture, or what its library loads."""
    weights: str = ""
    """open_clip's pretrained tag or a weights file."""
    config_file: str = ""
    """JSON of an architecture that open_clip does not know by itself."""


def parse_model(name: str) -> ModelName:
    """Understand a model's name. Raises `ConfigError` if it is nothing that can be loaded."""
    name = name.removeprefix("open_clip:")
    if not name:
        raise ConfigError("--model", name, ALLOWED)
    if name.startswith("sentence:"):
        return ModelName("sentence", name.removeprefix("sentence:"))
    if Path(name).is_dir():
        return _parse_folder(Path(name))
    if name.startswith("hf-hub:"):
        return ModelName("open_clip", name)
    from diptych.clip_library import open_clip

    architecture, _, tag = name.partition("/")
    if architecture in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if tag not in tags and not Path(tag).is_file():
            raise ConfigError(
                "--model", name, f"{architecture}/TAG with one of {', '.join(tags)}, or a weights file", "Fresh weights embed nothing."
            )
        return ModelName("open_clip", architecture, tag)
    if name.startswith(("/", ".", "~")) or "/" not in name:
        raise ConfigError("--model", name, ALLOWED, "There is no such folder or architecture.")
    return ModelName("hf", name)


def _parse_folder(folder: Path) -> ModelName:
    if (folder / "open_clip_config.json").is_file():
        return ModelName("open_clip", f"local-dir:{folder}")
    if (folder / "modules.json").is_file():
        return ModelName("sentence", str(folder))
    if (folder / "config.json").is_file():
        return ModelName("hf", str(folder))
    configs = [path for path in sorted(folder.glob("*.json")) if "vision_cfg" in json.loads(path.read_text())]
    weights = [path for suffix in ("safetensors", "pt", "bin") for path in sorted(folder.glob(f"*.{suffix}"))]
    if len(configs) == 1 and weights:
        return ModelName("open_clip", configs[0].stem, str(weights[0]), str(configs[0]))
    raise ConfigError(
        "--model", str(folder), ALLOWED, "The folder needs open_clip_config.json, or an architecture's JSON beside its weights."
    )
