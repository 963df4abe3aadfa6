"""A packed data set as a repository of the Hugging Face hub: its files in one of two layouts, and a card that says what is in it.

`webdataset` is the shards as they are; `imagefolder` is pictures with `metadata.jsonl`, which `datasets.load_dataset` and the
diffusers scripts read. Both are what Hugging Face documents under "Image Dataset" and "WebDataset".
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np

from diptych.config import ConfigError
from diptych.datasets import ranged, storage
from diptych.datasets.manifest import Manifest
from diptych.datasets.survey import IMAGE_EXTENSIONS

Layout = Literal["webdataset", "imagefolder"]
FILES_PER_FOLDER = 10_000
"""The hub takes at most this many files in one folder."""
_ROWS_AT_ONCE = 256
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))


def stage(manifest: Manifest, folder: Path, layout: Layout, repository: str) -> int:
    """Put what is to be uploaded into the empty local `folder`; returns the number of samples in it.

    Raises `ConfigError` for another layout, or data without pictures in `imagefolder`.
    """
    if layout == "webdataset":
        for number, name in enumerate(manifest.shard_names):
            target = folder / "data" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(manifest.shard_url(number), target)
        samples = manifest.samples
    elif layout == "imagefolder":
        samples = _write_pictures(manifest, folder)
    else:
        raise ConfigError("--hub-layout", layout, "webdataset, imagefolder")
    (folder / "README.md").write_text(card(manifest, layout, repository, samples), encoding="utf-8")
    return samples


def _copy(url: str, target: Path) -> None:
    if storage.is_local(url):
        try:
            target.hardlink_to(storage.local_path(url))
        except OSError:  # another file system
            shutil.copyfile(storage.local_path(url), target)
    else:
        fs, path = storage.file_system(url)
        fs.get_file(path, str(target))


def _write_pictures(manifest: Manifest, folder: Path) -> int:
    written = 0
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as table:
        for start in range(0, manifest.samples, _ROWS_AT_ONCE):
            rows = np.arange(start, min(start + _ROWS_AT_ONCE, manifest.samples))
            for row, fact in zip(rows.tolist(), manifest.rows(rows, ["shard", "key", "caption", "members"]).to_pylist(), strict=True):
                picture = next((member for member in fact["members"] if member["ext"] in IMAGE_EXTENSIONS), None)
                if picture is None:
                    continue
                # The row makes the name unique and safe, whatever the key holds.
                name = f"images/{row // FILES_PER_FOLDER:04d}/{row:09d}.{picture['ext']}"
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(ranged.read_range(manifest.shard_url(fact["shard"]), picture["offset"], picture["size"]))
                line = {"file_name": name, "text": fact["caption"] or "", "key": fact["key"]}
                table.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
    if not written:
        raise ConfigError("--hub-layout", "imagefolder", "webdataset for data without pictures")
    return written


def card(manifest: Manifest, layout: Layout, repository: str, samples: int) -> str:
    """The repository's README.md: metadata for the hub, counts and the digest for people."""
    facts = manifest.facts()
    size = next((label for limit, label in _SIZES if samples < limit), "n>10M")
    task = "text-to-image" if facts["images"] else "text-generation"
    kind = "image" if facts["images"] else "text"
    files = 'configs:\n- config_name: default\n  data_files: "data/**/*.tar"\n' if layout == "webdataset" else ""
    modalities = "tags:\n- diptych\n" + ("- webdataset\n" if layout == "webdataset" else "- imagefolder\n")
    return (
        f"---\ntask_categories:\n- {task}\nsize_categories:\n- {size}\n{modalities}{files}---\n\n# {repository.rpartition('/')[2]}\n\n"
        f"{samples:,} samples of {kind}{' with captions' if facts['images'] and facts['captions'] else ''}, packed with "
        "[Diptych](https://diptych.readthedocs.io).\n\n| | |\n|---|---|\n"
        f"| samples | {samples:,} |\n| captions | {facts['captions']:,} |\n| pictures | {facts['images']:,} |\n"
        f"| layout | {layout} |\n| digest | `{manifest.digest}` |\n\nAdd where the data comes from, and its licence, before you make it public.\n"
    )
