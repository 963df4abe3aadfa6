"""Folders of partitions, local or remote: list them by suffix, open a file to seek in, make and empty scratch space."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from diptych.datasets.ranged import READ_RETRIES, file_system, is_local, local_path, with_retries


def list_files(folder: str, suffix: str) -> list[str]:
    """Files of `folder` that end with `suffix`, sorted; hidden ones are left out. Empty where there is no such folder."""
    if is_local(folder):
        path = local_path(folder)
        names = os.listdir(path) if os.path.isdir(path) else []
        return sorted(os.path.join(path, name) for name in names if name.endswith(suffix) and not name.startswith("."))
    fs, path = file_system(folder)
    fs.invalidate_cache(path)

    def listed() -> list[dict[str, Any]]:
        try:
            return fs.ls(path, detail=True)
        except FileNotFoundError:
            return []

    entries = with_retries(listed, folder, 0, -1, READ_RETRIES)
    names = [entry["name"] for entry in entries if entry["type"] == "file" and entry["name"].endswith(suffix)]
    return sorted(fs.unstrip_protocol(name) for name in names if not name.rpartition("/")[2].startswith("."))


@contextmanager
def open_input(url: str) -> Iterator[BinaryIO]:
    """A file to read and seek in."""
    if is_local(url):
        with open(local_path(url), "rb") as stream:
            yield stream
    else:
        fs, path = file_system(url)
        with fs.open(path, "rb") as stream:
            yield stream


def make_folder(url: str) -> None:
    """Make the folder and its parents; object stores have none to make."""
    if is_local(url):
        os.makedirs(local_path(url), exist_ok=True)
    else:
        fs, path = file_system(url)
        fs.makedirs(path, exist_ok=True)


@contextmanager
def scratch(out: str, name: str) -> Iterator[Path]:
    """A fresh local folder for the length of the block: hidden inside a local `out`, else in the system's place for them."""
    if is_local(out):
        folder = Path(local_path(out)) / f".{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix=f"diptych-{name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
