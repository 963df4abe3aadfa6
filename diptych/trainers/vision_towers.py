"""Vision transformers with a linear projection: transformers' CLIP image tower, or a timm model with its own head.

Shapes: B images, H = W pixels, D dimension of the targets.
"""

from __future__ import annotations

import abc
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diptych.config import ConfigError
from diptych.recipes.clip_vit import ClipVitConfig


class Tower(nn.Module, abc.ABC):
    """Pixels to projected embeddings, and what a task must know of it."""

    mean: tuple[float, ...]
    """Of the normalisation that the weights expect, per channel, for pixels in [0, 1]."""
    std: tuple[float, ...]
    usage: ClassVar[str]
    """Python that loads the exported folder `{folder}`."""

    @abc.abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, H, W]` → embeddings `[B, D]`, not normalised."""

    @abc.abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""

    @abc.abstractmethod
    def before_blocks(self) -> list[nn.Parameter]:
        """Parameters of the embeddings."""

    @abc.abstractmethod
    def tokens(self) -> int:
        """Tokens of one image, the class token included."""

    @abc.abstractmethod
    def set_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass."""

    @abc.abstractmethod
    def export(self, folder: Path) -> None:
        """Write what the library loads."""

    def freeze_below(self, block: int) -> None:
        """Freeze the embeddings and the blocks before `block`; 0 freezes nothing. `ConfigError` if there are fewer blocks."""
        blocks = self.blocks()
        if block > len(blocks):
            raise ConfigError(
                "task.unfreeze_from", block, f"at most {len(blocks)}, the number of blocks", "There only the projection would train."
            )
        if block:
            for parameter in self.before_blocks():
                parameter.requires_grad_(False)
            for frozen in blocks[:block]:
                frozen.requires_grad_(False)


class ClipTower(Tower):
    """CLIP's pooled output (the class token after the last norm), dropout, and a linear projection."""

    usage = """import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPVisionModel

vision, processor = CLIPVisionModel.from_pretrained("{folder}"), AutoImageProcessor.from_pretrained("{folder}")
projection = load_file("{folder}/projection.safetensors")
pooled = vision(**processor(Image.open("image.jpg"), return_tensors="pt")).pooler_output
print(torch.nn.functional.normalize(torch.nn.functional.linear(pooled, projection["weight"], projection["bias"])))"""

    def __init__(self, config: ClipVitConfig, dim: int) -> None:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        super().__init__()
        self.mean, self.std = tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)
        self.vision = _pretrained_clip(config) if config.model else _fresh_clip(config)
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(self.vision.config.hidden_size, dim)
        self.image_size = config.image_size
        self.interpolate = config.image_size != self.vision.config.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """See `Tower.forward`."""
        pooled = self.vision(pixels, interpolate_pos_encoding=self.interpolate).pooler_output
        return self.projection(self.dropout(pooled))

    def blocks(self) -> list[nn.Module]:
        """See `Tower.blocks`."""
        return list(self.vision.encoder.layers)

    def before_blocks(self) -> list[nn.Parameter]:
        """See `Tower.before_blocks`."""
        return [*self.vision.embeddings.parameters(), *self.vision.pre_layrnorm.parameters()]

    def tokens(self) -> int:
        """See `Tower.tokens`."""
        return (self.image_size // self.vision.config.patch_size) ** 2 + 1

    def set_gradient_checkpointing(self) -> None:
        """See `Tower.set_gradient_checkpointing`."""
        self.vision.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def export(self, folder: Path) -> None:
        """The tower as `CLIPVisionModel.from_pretrained` loads it, and `projection.safetensors`: `weight` `[D, C]` and `bias` `[D]`."""
        from safetensors.torch import save_file
        from transformers import CLIPImageProcessor

        self.vision.save_pretrained(folder)
        save_file({name: value.contiguous() for name, value in self.projection.state_dict().items()}, folder / "projection.safetensors")
        size = self.vision.config.image_size
        CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=list(self.mean), image_std=list(self.std)
        ).save_pretrained(folder)


class TimmTower(Tower):
    """A timm vision transformer whose head projects to the targets."""

    usage = """import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
print(torch.nn.functional.normalize(model(transform(Image.open("image.jpg").convert("RGB"))[None])))"""

    def __init__(self, config: ClipVitConfig, dim: int) -> None:
        super().__init__()
        self.model = _timm(config, dim)
        if not hasattr(self.model, "blocks"):
            raise ConfigError("task.model", config.model, "a timm vision transformer (with `blocks`)", "Example: vit_large_patch16_224")
        self.mean, self.std = tuple(self.model.pretrained_cfg["mean"]), tuple(self.model.pretrained_cfg["std"])

    def forward(self, pixels: Tensor) -> Tensor:
        """See `Tower.forward`."""
        return self.model(pixels)

    def blocks(self) -> list[nn.Module]:
        """See `Tower.blocks`."""
        return list(self.model.blocks)

    def before_blocks(self) -> list[nn.Parameter]:
        """See `Tower.before_blocks`."""
        after = ("blocks.", "norm.", "fc_norm.", "head.", "head_drop.", "attn_pool.")
        return [parameter for name, parameter in self.model.named_parameters() if not name.startswith(after)]

    def tokens(self) -> int:
        """See `Tower.tokens`."""
        return int(self.model.patch_embed.num_patches) + int(self.model.num_prefix_tokens)

    def set_gradient_checkpointing(self) -> None:
        """See `Tower.set_gradient_checkpointing`."""
        self.model.set_grad_checkpointing(True)

    def export(self, folder: Path) -> None:
        """What `timm.create_model("local-dir:<folder>")` loads, projection included."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, folder / "model.safetensors")
        cfg = self.model.pretrained_cfg
        kept = {
            key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct", "first_conv", "classifier") if cfg.get(key) is not None
        }
        size = list(self.model.patch_embed.img_size)
        description = {
            "architecture": cfg["architecture"],
            "num_classes": self.model.num_classes,
            "model_args": {"img_size": size},
            "pretrained_cfg": kept | {"num_classes": self.model.num_classes, "input_size": [3, *size]},
        }
        (folder / "config.json").write_text(json.dumps(description, indent=2))


def build_tower(config: ClipVitConfig, dim: int) -> Tower:
    """The tower of `config` with a projection to `dim`, its first blocks frozen."""
    tower: Tower = ClipTower(config, dim) if config.library == "clip" else TimmTower(config, dim)
    tower.freeze_below(config.unfreeze_from)
    return tower


def _fresh_clip(config: ClipVitConfig) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = config.architecture
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            image_size=config.image_size,
            patch_size=sizes.patch_size,
        )
    )


def _pretrained_clip(config: ClipVitConfig) -> Any:
    """The image tower of a CLIP that was saved alone or whole; the text tower in it is left out."""
    from transformers import AutoConfig, CLIPVisionModel
    from transformers.utils import logging

    try:
        found = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("task.model", config.model, "a hub name or a folder with config.json and weights", reason) from None
    if found.model_type not in ("clip", "clip_vision_model"):
        raise ConfigError("task.model", config.model, "a CLIP or its vision tower", f"It is a {found.model_type}.")
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # It would list every weight of the text tower.
    try:
        model, info = CLIPVisionModel.from_pretrained(config.model, dtype=torch.float32, output_loading_info=True)
    finally:
        logging.set_verbosity(before)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ConfigError("task.model", config.model, "all weights of CLIP's vision tower", f"Missing there: {', '.join(missing[:3])}.")
    return model


def _timm(config: ClipVitConfig, dim: int) -> Any:
    import timm

    local, hub = Path(config.model).is_dir(), "/" in config.model
    name = f"local-dir:{config.model}" if local else f"hf-hub:{config.model}" if hub else config.model
    fresh = not (local or hub or config.pretrained)
    try:
        return timm.create_model(name, pretrained=not fresh, num_classes=dim, drop_rate=config.dropout, img_size=config.image_size)
    except (RuntimeError, OSError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("task.model", config.model, "a timm vision transformer, a hub name or a folder", reason) from None
