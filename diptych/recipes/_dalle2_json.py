"""DALLE2-pytorch's JSON configurations (prior and decoder) as runs of ours, with a word on each field that changes meaning or is not used.

Facts of dalle2-pytorch 1.15.6: `train_configs.py` and what its training scripts do with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from diptych.config import ConfigError, RunConfig, apply_overrides, build, load_recipe, set_path
from diptych.recipes._unets import UnetConfig

_UNKNOWN = "not known to dalle2-pytorch 1.15.6 and not used here"


class Translation(NamedTuple):
    """A configuration of the peer in our terms."""

    config: RunConfig
    remarks: list[str]
    """One line for each field that means something else here, or is not used."""


def translate_text(text: str) -> Translation | None:
    """What the JSON `text` describes, if it is a configuration of DALLE2-pytorch: a whole one, or what lies beside exported weights."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(data, dict) or "task" in data or not {"decoder", "prior"} & set(data):
        return None
    try:
        return translate(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError("--config", repr(error), "a configuration of DALLE2-pytorch 1.15.6", "It lacks what that needs.") from error


def translate(data: dict[str, Any]) -> Translation:
    """The run that DALLE2-pytorch's configuration `data` describes. Raises `ConfigError` for what does not exist here."""
    name = "decoder" if "decoder" in data else "prior"
    convert = decoder_fields if name == "decoder" else prior_fields
    fields, remarks = convert(data[name])
    config = load_recipe(f"dalle2_{name}", "base")
    config = config.model_copy(update={"task": build(type(config.task), fields, "task")})
    notes = _Notes(remarks)
    steps = _steps(data, notes)
    for key, value in (_train(dict(data.get("train") or {}), data, notes) | _data(dict(data.get("data") or {}), notes)).items():
        config = set_path(config, key, value)
    config = apply_overrides(config, [f"train.steps={steps}"] if steps else [])
    if "seed" in data:
        config = set_path(config, "seed", data["seed"])
    if "evaluate" in data:
        notes("evaluate", "not used in training: `diptych evaluate` and `diptych generate` measure pictures")
    for key in ("tracker", "load"):
        if key in data:
            notes(key, "not used: MLflow is the tracker (tracking.*), and weights to start from are named by task.pretrained")
    for key in set(data) - {name, "train", "data", "seed", "evaluate", "tracker", "load"}:
        notes(key, _UNKNOWN)
    return Translation(config, notes.lines)


class _Notes:
    def __init__(self, lines: list[str]) -> None:
        self.lines = list(lines)

    def __call__(self, key: str, words: str) -> None:
        self.lines.append(f"{key}: {words}")

    def leftovers(self, section: str, values: dict[str, Any], known: dict[str, str]) -> None:
        """A word on each field that was not taken."""
        for key in values:
            self(f"{section}.{key}", known.get(key, _UNKNOWN))


def _need(key: str, value: Any, allowed: Any, remedy: str = "") -> None:
    if value != allowed:
        raise ConfigError(key, value, repr(allowed), remedy or "Diptych has nothing else.")


_UNET_UNUSED = {
    "attend_at_middle": "not used: the middle always attends, in dalle2-pytorch too",
    "lowres_cond": "not used: follows from the U-Net's place",
    "lowres_noise_cond": "not used: follows from use_noise_for_lowres_cond",
    "cond_on_image_embeds": "not used: the first U-Net is conditioned on the embedding, the others are not",
    "channels_out": "not used: follows from learned_variance",
    "out_dim": "not used, in dalle2-pytorch neither",
    "checkpoint_during_training": "means train.gradient_checkpointing=true here, for all U-Nets",
}
_DECODER_UNUSED = {
    "clip": "not used: embeddings are computed beforehand (`diptych embed`), token states by task.text_tower",
    "clip_denoised": "not used: predictions are always clipped when sampling, in dalle2-pytorch too",
    "clip_x_start": "not used, in dalle2-pytorch neither",
    "auto_normalize_img": "not used: pictures are always scaled to [-1, 1]",
    "predict_x_start_for_latent_diffusion": "not used: there is no VQ-GAN here",
    "clip_adapter_overrides": "not used, see clip",
}


def decoder_fields(section: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(fields of `Dalle2DecoderConfig`, remarks) of the peer's section `decoder`."""
    from diptych.recipes.dalle2_decoder import STAGES, Dalle2DecoderConfig

    rest, notes = {key: value for key, value in section.items() if value is not None}, _Notes([])
    fields: dict[str, Any] = {}
    unets = rest.pop("unets")
    if not 1 <= len(unets) <= len(STAGES):
        raise ConfigError("decoder.unets", f"{len(unets)} U-Nets", f"1 to {len(STAGES)}")
    for stage, unet in zip(STAGES, unets, strict=False):
        fields |= _unet(f"decoder.unets.{stage}", unet, stage, notes)
    _need("decoder.channels", rest.pop("channels", 3), 3)
    _need("decoder.unconditional", rest.pop("unconditional", False), False)
    if "image_size" in rest:
        rest["image_sizes"] = [rest.pop("image_size")]
    count = len(unets)
    for key in ("use_blur_for_lowres_cond", "use_noise_for_lowres_cond"):
        if isinstance(rest.get(key), list | tuple) and len(rest[key]) == count > 1:
            rest[key] = rest[key][1:]
    for key, empty in (("random_crop_sizes", 0), ("sample_timesteps", rest.get("timesteps", 1000))):
        values = rest.get(key, [None])
        values = [values] * count if isinstance(values, int) else values
        rest[key] = [empty if value is None else value for value in values]
    if rest["random_crop_sizes"] == [0]:
        rest.pop("random_crop_sizes")
    for key in ("blur_sigma", "blur_kernel_size"):
        if isinstance(rest.get(key), list):
            notes(f"decoder.{key}", "the ends of a range, drawn for each sample; dalle2-pytorch takes a JSON list for the two axes")
    if count > 1 and rest.get("use_blur_for_lowres_cond", True):
        notes("decoder.blur_prob", "blur is drawn for each sample, in dalle2-pytorch once for a batch")
    known = set(Dalle2DecoderConfig.model_fields)
    fields |= {key: rest.pop(key) for key in list(rest) if key in known}
    notes.leftovers("decoder", rest, _DECODER_UNUSED)
    return fields, notes.lines


def _unet(name: str, unet: dict[str, Any], stage: str, notes: _Notes) -> dict[str, Any]:
    rest = {key: value for key, value in unet.items() if value is not None}
    _need(f"{name}.channels", rest.pop("channels", 3), 3)
    dims: dict[str, Any] = {key: rest.pop(key) for key in ("image_embed_dim", "text_embed_dim") if key in rest}
    if not rest.get("cond_on_text_encodings"):
        dims.pop("text_embed_dim", None)
    values = {key: rest.pop(key) for key in list(rest) if key in UnetConfig.model_fields}
    notes.leftovers(name, rest, _UNET_UNUSED)
    return {**dims, stage: build(UnetConfig, values, name)}


_NET_FIXED = {"norm_in": False, "norm_out": True, "final_proj": True, "rotary_emb": True, "self_cond": False}
_PRIOR_UNUSED = {
    "clip": "not used: embeddings are computed beforehand (`diptych embed`)",
    "image_size": "not used: pictures are embedded beforehand",
    "image_channels": "not used: pictures are embedded beforehand",
    "clip_adapter_overrides": "not used, see clip",
}


def prior_fields(section: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(fields of `Dalle2PriorConfig`, remarks) of the peer's section `prior`."""
    from diptych.recipes.dalle2_prior import Dalle2PriorConfig

    rest, notes = {key: value for key, value in section.items() if value is not None}, _Notes([])
    net = {key: value for key, value in rest.pop("net").items() if value is not None}
    dim, timesteps = rest.pop("image_embed_dim"), rest.get("timesteps", 1000)
    _need("prior.net.dim", net.pop("dim"), dim)
    for key, fixed in _NET_FIXED.items():
        _need(f"prior.net.{key}", net.pop(key, fixed), fixed)
    steps = net.pop("num_timesteps", None)
    _need("prior.net.num_timesteps", steps or timesteps, timesteps)
    dropped = rest.pop("cond_drop_prob", 0.0)
    fields = {"embed_dim": dim, "learned_timesteps": steps is not None, "sample_timesteps": timesteps, "max_text_len": 256}
    fields |= {"text_cond_drop_prob": dropped, "image_cond_drop_prob": dropped, "condition_on_text_encodings": True}
    known = set(Dalle2PriorConfig.model_fields)
    for part in (net, rest):
        fields |= {key: part.pop(key) for key in list(part) if key in known}
    notes.leftovers("prior.net", net, {})
    notes.leftovers("prior", rest, _PRIOR_UNUSED)
    if fields["condition_on_text_encodings"]:
        notes("prior.condition_on_text_encodings", "token states come from task.text_tower, or from a cache (data.caches)")
    return fields, notes.lines


def _steps(data: dict[str, Any], notes: _Notes) -> int:
    """Optimizer steps, where the configuration tells; the peer counts epochs."""
    train, source = data.get("train") or {}, data.get("data") or {}
    samples = train.get("epoch_samples") or source.get("num_data_points")
    if "epochs" not in train or not source.get("batch_size"):
        return 0
    if not samples:
        notes("train.epochs", "not used, because it does not say how many samples an epoch has: set train.steps")
        return 0
    share = (source.get("splits") or {}).get("train", 0.75)
    steps = max(1, math.ceil(train["epochs"] * samples * (1 if "epoch_samples" in train else share) / source["batch_size"]))
    notes("train.epochs", f"train.steps={steps} here: a run is one stream of samples, without epochs")
    return steps


def _first(key: str, value: Any, notes: _Notes) -> Any:
    if not isinstance(value, list | tuple):
        return value
    if len(set(value)) > 1:
        notes(key, f"{value[0]} for all U-Nets: one optimizer steps them together")
    return value[0]


_TRAIN_UNUSED = {
    "epochs": "",
    "epoch_samples": "",
    "find_unused_parameters": "not used: what no loss reaches is frozen",
    "static_graph": "not used: buckets are settled before the first step",
    "save_immediately": "not used",
    "device": "not used: cluster.gpus_per_worker=1 trains on GPUs",
    "save_every_seconds": "not used: set checkpoint.every_steps",
    "best_validation_loss": "not used: the run folder knows its best checkpoint",
    "current_epoch": "not used: the run folder knows its position",
    "num_samples_seen": "not used: the run folder knows its position",
}


def _train(train: dict[str, Any], data: dict[str, Any], notes: _Notes) -> dict[str, Any]:
    """Dotted keys for the peer's section `train`."""
    prior = "prior" in data
    # What the peer's optimizer has by default.
    found: dict[str, Any] = {"optim.betas": (0.9, 0.99), "optim.eps": 1e-6 if prior else 1e-8}
    batch = (data.get("data") or {}).get("batch_size", 64)
    takers: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "lr": ("optim.lr", float),
        "wd": ("optim.weight_decay", float),
        "warmup_steps": ("optim.warmup_steps", lambda value: value or 0),
        "max_grad_norm": ("optim.clip_norm", float),
        "save_every_n_samples": ("checkpoint.every_steps", lambda value: max(1, value // batch)),
        "n_sample_images": ("tracking.samples", int),
        "validation_samples": ("validation.samples", lambda value: value or 512),
        "random_seed": ("seed", int),
        "amp": ("train.precision", lambda value: "auto" if value else "fp32"),
        "cond_scale": ("task.cond_scale", lambda value: value),
        "unet_training_mask": ("task.train_unets", lambda value: tuple(index + 1 for index, on in enumerate(value or []) if on)),
    }
    for key, (target, convert) in takers.items():
        if key in train:
            value = train.pop(key)
            found[target] = convert(value if key in ("cond_scale", "unet_training_mask") else _first(f"train.{key}", value, notes))
    decay = train.pop("ema_beta", 0.99 if prior else 0.999)
    found["optim.ema_decay"] = decay if train.pop("use_ema", True) else 0.0
    if "eval_timesteps" in train:
        times = train.pop("eval_timesteps")
        found["task.sample_timesteps"] = times[0]
        if len(times) > 1:
            notes("train.eval_timesteps", f"validation samples with {times[0]} steps alone")
    notes.leftovers("train", {key: value for key, value in train.items() if _TRAIN_UNUSED.get(key) != ""}, _TRAIN_UNUSED)
    return found


_DATA_UNUSED = {
    "num_workers": "not used: cluster.data_cpus is the share of the machine that reads and decodes",
    "shard_width": "not used: read from the shards' names",
    "index_width": "not used: read from the keys",
    "text_url": "not used: text embeddings are text_emb beside img_emb in data.embeddings",
    "meta_url": "not used: captions come from data.shards, joined with the embeddings by key",
    "text_embeddings_url": "not used: token states come from task.text_tower, or from a cache (data.caches)",
    "resample_train": "not used: each sample comes once in an epoch of the stream",
    "eval_every_seconds": "not used: set validation.every_steps",
    "num_data_points": "",
    "start_shard": "",
    "end_shard": "",
}


def _data(source: dict[str, Any], notes: _Notes) -> dict[str, Any]:
    """Dotted keys for the peer's section `data`."""
    found: dict[str, Any] = {}
    if "webdataset_base_url" in source:
        found["data.shards"] = _shards(source, notes)
    for key in ("img_embeddings_url", "image_url"):
        if source.get(key):
            # Image and text embeddings lie side by side in folders of these names.
            found["data.embeddings"] = source.pop(key).rstrip("/").removesuffix("/img_emb")
    if "batch_size" in source:
        found["train.global_batch_size"] = source.pop("batch_size")
        notes("data.batch_size", "the batch of all workers together; in dalle2-pytorch that of each GPU")
    if "splits" in source:
        splits = source.pop("splits")
        found["data.validation_share"] = round(splits.get("val", 0.15) + splits.get("test", 0.1), 6)
        notes("data.splits", "val and test are held out together, by hash of the key and not by whole shards")
    if "shuffle_train" in source:
        found["data.shuffle"] = source.pop("shuffle_train")
    for name, options in (source.pop("preprocessing", None) or {}).items():
        found |= _preprocessing(name, options if isinstance(options, dict) else {}, notes)
    notes.leftovers("data", {key: value for key, value in source.items() if _DATA_UNUSED.get(key) != ""}, _DATA_UNUSED)
    return found


def _shards(source: dict[str, Any], notes: _Notes) -> str:
    url = source.pop("webdataset_base_url")
    if url.startswith("pipe:"):
        notes("data.webdataset_base_url", "not used: name what the pipe reads in data.shards, such as s3://bucket/{000000..000099}.tar")
        return ""
    if "{}" not in url or "end_shard" not in source:
        return url.replace("{}", "*") if "{}" in url else url
    width = source.get("shard_width", 6)
    numbers = f"{{{source.get('start_shard', 0):0{width}d}..{source['end_shard']:0{width}d}}}"
    notes("data.end_shard", "the last shard that is read")
    return url.replace("{}", numbers)


def _preprocessing(name: str, options: dict[str, Any], notes: _Notes) -> dict[str, Any]:
    key = f"data.preprocessing.{name}"
    if name == "RandomResizedCrop":
        notes(key, "task.resize=random_crop: square crops of at least min_scale of the area; ratio is not used, size is task.image_sizes")
        return {"task.resize": "random_crop", "task.min_scale": (options.get("scale") or [0.08, 1.0])[0]}
    if name == "RandomHorizontalFlip":
        notes(key, "the embedding belongs to the picture as it is, so a flip makes them disagree")
        return {"task.flip": 0.5}
    if name != "ToTensor":
        notes(key, "not used")
    return {}
