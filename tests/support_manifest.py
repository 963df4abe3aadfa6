"""Small sets of shards for tests of the manifest, written member by member."""

from __future__ import annotations

import io
import json
import tarfile

from PIL import Image


def picture(width=20, height=10, kind="JPEG", **options):
    """A picture's file."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 80, 20)).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = picture()


def write_tar(path, members, layout=tarfile.PAX_FORMAT):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w", format=layout) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1795199932.5 if layout == tarfile.PAX_FORMAT else 0
            archive.addfile(info, io.BytesIO(data))


def sample(key, caption="a caption"):
    """Picture, caption and JSON of one sample, as `write_tar` takes them."""
    return [(f"{key}.jpg", JPEG), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps({"key": key}).encode())]


def write_set(folder, shards=3, count=8):
    """Whole samples in a folder of shards."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        write_tar(folder / f"{shard:05d}.tar", [member for index in range(count) for member in sample(f"{shard:05d}{index:03d}")])
    return str(folder)


def kinds(manifest):
    """(shard, key, kind) of every fault."""
    return [(fault.shard, fault.key, fault.kind) for fault in manifest.faults]
