"""Made pictures as files that say how to make them again: PNG with its settings inside, and a line of `metadata.jsonl` beside.

The folder is in Hugging Face's `imagefolder` layout, so `diptych pack` turns it into shards and `datasets` loads it.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

METADATA = "metadata.jsonl"
_CHUNK = "diptych"
"""Name of the PNG's text chunk: a JSON object of what `metadata.jsonl` says of the picture."""


def png_bytes(image: np.ndarray, about: dict[str, Any]) -> bytes:
    """uint8 [H, W, 3] → a PNG that carries `about` as international text, and its prompt as `Description` for other programs."""
    info = PngInfo()
    info.add_itxt(_CHUNK, json.dumps(about, ensure_ascii=False, default=str))
    info.add_itxt("Description", str(about.get("prompt", "")))
    info.add_text("Software", "Diptych")
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def read_about(path: Path) -> dict[str, Any]:
    """What `png_bytes` wrote into a picture; empty for a picture that is not ours."""
    with Image.open(path) as picture:
        text = getattr(picture, "text", {}).get(_CHUNK, "")
    return json.loads(text) if text else {}


def save_picture(folder: Path, image: np.ndarray, about: dict[str, Any]) -> Path:
    """Write one picture under a name of its own and its line of `metadata.jsonl`; never overwrites.

    The name tells number, prompt and seed; one that is taken gets a further number. Several processes may write into a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = re.sub(r"[^a-z0-9]+", "-", str(about.get("prompt", "")).lower()).strip("-")[:48].strip("-")
    stem = "-".join(part for part in (f"{about.get('number', 0):05d}", words, f"s{about.get('seed', 0)}") if part)
    data = png_bytes(image, about)
    for name in _names(stem):
        try:
            with (folder / name).open("xb") as file:
                file.write(data)
        except FileExistsError:
            continue
        line = json.dumps({"file_name": name} | about, ensure_ascii=False, default=str) + "\n"
        # One write in append mode is one line, whoever else writes.
        descriptor = os.open(folder / METADATA, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        return folder / name
    raise AssertionError("unreachable")


def _names(stem: str) -> Iterator[str]:
    yield f"{stem}.png"
    number = 2
    while True:
        yield f"{stem}-{number}.png"
        number += 1


def read_metadata(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metadata.jsonl`, oldest first; a line that a kill cut short is left out."""
    path = folder / METADATA
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
