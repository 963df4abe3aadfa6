"""What identifies a frozen model and a cache of what it computed. No torch: recipes state with it what a cache must be.

A folder of weights is identified by its contents, so that it may be moved or be reached by another path; a hub name by itself.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from diptych.batches import AspectBuckets

_WEIGHTS = (".safetensors", ".bin", ".pt")
_DESCRIPTIONS = ("config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")


def component(model: str, name: str) -> str:
    """Where the part `name` (`vae`, `text_encoder`, …) of `model` stands: a subfolder of a pipeline's folder, or `model` itself."""
    inside = os.path.join(model, name)
    return inside if os.path.isdir(inside) else model


def model_identity(model: str) -> str:
    """`sha256:…` of a local folder's weights and configuration, or the hub name."""
    if not os.path.isdir(model):
        return model
    files = sorted(path for path in Path(model).rglob("*") if path.is_file() and (path.suffix in _WEIGHTS or path.name in _DESCRIPTIONS))
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"sha256:{_contents(model, tuple(stamps))}"


def weights_digest(model: str) -> str:
    """sha256 of a local folder's weights alone; empty for a hub name."""
    if not os.path.isdir(model):
        return ""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(model).rglob("*") if path.suffix in _WEIGHTS):
        digest.update(_file_digest(path))
    return digest.hexdigest()


def latents(
    model: str, size: int, resize: str = "center_crop", min_scale: float = 1.0, buckets: AspectBuckets | None = None
) -> dict[str, Any]:  # fmt: skip
    """What `cache latents` records that a task must agree with: the VAE and the pixels that it saw.

    `model` is a pipeline's folder with `vae/`, a VAE's own folder, or a hub name; the others as in `batches.ImageNeed`.
    """
    # None is what a cache of squares that is older than buckets says of them.
    shapes = [f"{width}x{height}" for height, width in buckets.shapes] if buckets else None
    return {
        "model": model_identity(component(model, "vae")), "size": size, "resize": resize, "min_scale": min_scale, "buckets": shapes
    }  # fmt: skip


def text_states(model: str) -> dict[str, Any]:
    """What `cache text-states` records that a task must agree with: `text_encoder/` and `tokenizer/` of a pipeline's folder, or a hub name."""
    return {"model": model_identity(component(model, "text_encoder")), "tokenizer": model_identity(component(model, "tokenizer"))}


def image_states(model: str, size: int, layer: int = -1) -> dict[str, Any]:
    """What `cache image-states` records that a task must agree with: CLIP's image tower, its input in pixels, and the layer of the states."""
    return {"model": model_identity(component(model, "image_encoder")), "size": size, "layer": layer}


@functools.lru_cache(maxsize=16)
def _contents(root: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """sha256 over relative names and contents; `stamps` (path, size, time) tell whether a file has changed since."""
    digest = hashlib.sha256()
    for path, _, _ in stamps:
        digest.update(os.path.relpath(path, root).encode() + b"\0")
        digest.update(_file_digest(Path(path)))
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
