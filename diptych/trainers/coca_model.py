"""open_clip's CoCa: built from scratch or from published weights, and written in the layout that open_clip loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from diptych import clip_library
from diptych.clip_library import open_clip
from diptych.config import ConfigError
from diptych.recipes.coca import CocaConfig
from diptych.vocabulary import Vocabulary


@dataclass
class BuiltCoca:
    """A CoCa and what its export must say of it."""

    model: open_clip.CoCa
    config: dict[str, Any]
    """open_clip's `model_cfg`."""
    mean: tuple[float, ...]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, ...]


def build_coca(config: CocaConfig, vocabulary: Vocabulary, seed: int) -> BuiltCoca:
    """Build the model that `config` asks for; fresh weights are a function of `seed`.

    Raises `ConfigError` where weights, architecture, tokenizer and sizes do not belong together.
    """
    source = _source(config)
    model_config = _custom_config(config, vocabulary) if source == "custom" else _published_config(source, config)
    if "multimodal_cfg" not in model_config:
        raise ConfigError("task.model", config.model, "an architecture with a caption decoder", "Names that start with coca have one.")
    _check_sizes(config, model_config, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(config, source, model_config)


def _build(config: CocaConfig, source: str, model_config: dict[str, Any]) -> BuiltCoca:
    if source == "custom":
        model = open_clip.CoCa(**{key: value for key, value in model_config.items() if key != "custom_text"})
        defaults = open_clip.transform.PreprocessCfg()
        mean, std = defaults.mean, defaults.std
    else:
        clip_library.complete(model_config)
        tag = config.pretrained if source == config.model and config.pretrained else None
        try:
            # Without `require_pretrained` a folder or repository that holds no weights gives random ones and a line in the log.
            required = bool(config.pretrained)
            model = open_clip.create_model(source, pretrained=tag, force_image_size=config.image_size, require_pretrained=required)
        except (RuntimeError, ValueError, FileNotFoundError, OSError) as error:
            raise ConfigError("task.pretrained", config.pretrained, f"weights for {source}", str(error)) from error
        mean, std = model.visual.preprocess_cfg["mean"], model.visual.preprocess_cfg["std"]
    if not config.pretrained:
        # open_clip leaves the decoder's output projection as uninitialised memory.
        nn.init.normal_(model.text_decoder.text_projection, std=model.text_decoder.text_projection.shape[0] ** -0.5)
    elif source == "custom":
        _load_file(model, config.pretrained)
    return BuiltCoca(model, model_config, tuple(mean), tuple(std))


def _source(config: CocaConfig) -> str:
    """Where the architecture comes from: `custom`, an open_clip name, or open_clip's `local-dir:` and `hf-hub:` forms."""
    if config.pretrained and Path(config.pretrained).is_dir():
        if not (Path(config.pretrained) / "open_clip_config.json").is_file():
            raise ConfigError("task.pretrained", config.pretrained, "a folder with open_clip_config.json", "`diptych export` writes one.")
        return f"local-dir:{config.pretrained}"
    if "/" in config.pretrained and not Path(config.pretrained).is_file():
        if config.pretrained.startswith(("/", ".", "~")):
            raise ConfigError("task.pretrained", config.pretrained, "an existing folder or file", "Check the path.")
        return f"hf-hub:{config.pretrained.removeprefix('hf-hub:')}"
    if config.model != "custom" and config.model not in open_clip.list_models():
        known = ", ".join(name for name in open_clip.list_models() if "coca" in name)
        raise ConfigError("task.model", config.model, f"custom, {known}")
    return config.model


def _published_config(source: str, config: CocaConfig) -> dict[str, Any]:
    try:
        model_config = open_clip.get_model_config(source)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError("task.pretrained", config.pretrained, "a hub name or folder of an open_clip model", str(error)) from error
    model_config["vision_cfg"]["image_size"] = config.image_size
    return model_config


def _custom_config(config: CocaConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """open_clip's `model_cfg` of the sizes in `task.architecture`."""
    sizes = config.architecture
    text = {
        "context_length": config.context_length,
        "vocab_size": vocabulary.size,
        "width": sizes.width,
        "heads": sizes.heads,
        "layers": sizes.text_layers,
        "pad_id": vocabulary.pad,
        "embed_cls": True,
        "output_tokens": True,
    }
    vision = {
        "image_size": config.image_size,
        "patch_size": sizes.patch_size,
        "width": sizes.image_width,
        "layers": sizes.image_layers,
        "head_width": sizes.image_width // sizes.heads,
        "attentional_pool": sizes.image_queries > 0,
        "attn_pooler_queries": sizes.image_queries,
        "attn_pooler_heads": sizes.heads,
        "output_tokens": True,
    }
    decoder = {
        "context_length": config.context_length,
        "vocab_size": vocabulary.size,
        "width": sizes.width,
        "heads": sizes.heads,
        "layers": sizes.decoder_layers,
        "attn_pooler_heads": sizes.heads,
    }
    return {"embed_dim": sizes.width, "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": decoder, "custom_text": True}


def _load_file(model: open_clip.CoCa, path: str) -> None:
    if not Path(path).is_file():
        raise ConfigError("task.pretrained", path, "a weights file or a folder with open_clip_config.json", "Check the path.")
    try:
        open_clip.load_checkpoint(model, path)
    except RuntimeError as error:
        raise ConfigError("task.pretrained", path, "weights of the architecture in task.architecture", str(error)[:500]) from error


def _check_sizes(config: CocaConfig, model_config: dict[str, Any], vocabulary: Vocabulary) -> None:
    text = model_config["text_cfg"]
    context_length, size = text.get("context_length", 77), text.get("vocab_size", 49408)
    if "hf_model_name" not in text and config.context_length != context_length:
        raise ConfigError("task.context_length", config.context_length, f"{context_length}, the model's", f"Set {context_length}.")
    if vocabulary.pad == vocabulary.end:
        remedy = "Add a pad token to its files, or train one with task.tokenizer=train:<size>."
        raise ConfigError("task.tokenizer", config.tokenizer, "a tokenizer whose pad token is not its end token", remedy)
    if vocabulary.size > size:
        raise ConfigError(
            "task.tokenizer",
            config.tokenizer,
            f"a tokenizer of at most {size} ids, the model's; it has {vocabulary.size}",
            "Name the tokenizer that the weights were trained with.",
        )


def freeze_unused(model: open_clip.CoCa, config: CocaConfig) -> None:
    """Freeze what `config` says, and what no loss of weight above zero reaches: it would have no gradient."""
    frozen: list[nn.Module | nn.Parameter | None] = []
    if config.freeze_image:
        frozen.append(model.visual)
    if config.freeze_text:
        frozen.append(model.text)
    if config.contrastive_weight == 0:
        frozen += [model.logit_scale, getattr(model.visual, "proj", None), getattr(model.text, "text_projection", None)]
        if getattr(model.text, "cls_emb", None) is not None:
            frozen.append(model.text.ln_final)
    if config.caption_weight == 0:
        frozen.append(model.text_decoder)
    for part in frozen:
        if part is not None:
            part.requires_grad_(False)


def export_coca(built: BuiltCoca, vocabulary: Vocabulary, folder: Path) -> None:
    """Write `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer's files to `folder`.

    `open_clip.create_model_and_transforms("local-dir:<folder>")` and `open_clip.get_tokenizer` load it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model_config = json.loads(json.dumps(built.config))
    if vocabulary.folder:
        # Any name selects the Hugging Face tokenizer; for a local folder open_clip then reads it from the folder itself.
        model_config["text_cfg"]["hf_tokenizer_name"] = model_config["text_cfg"].get("hf_tokenizer_name") or "."
        _save_tokenizer(vocabulary, folder)
    preprocess = {"mean": built.mean, "std": built.std, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    state = {key: value.detach().contiguous().cpu() for key, value in built.model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


def _save_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """Save the tokenizer so that it sets the start and end tokens itself: open_clip relies on that, the data plane sets them."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    vocabulary.tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        fast = Tokenizer.from_file(str(file))
        start, end = (fast.id_to_token(token) for token in (vocabulary.start, vocabulary.end))
        template = TemplateProcessing(single=f"{start} $A {end}", special_tokens=[(start, vocabulary.start), (end, vocabulary.end)])
        fast.post_processor = template
        fast.save(str(file))
