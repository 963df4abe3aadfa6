"""Reads and decodes every member of a data set, and writes clean copies of broken tars beside them.

The walk of the manifest looks at headers and texts; a picture with good headers and bad bytes is found only by decoding it. A
repaired copy holds the samples that are whole, with their names and bytes unchanged; the broken tar is never written to.

Fault kinds: `undecodable_image`, `bad_array`, `unreadable_member`.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from diptych.batches import Fault, ImageNeed
from diptych.datasets import folders, ranged, storage
from diptych.datasets.images import BadImageError, choose_decoder, decode_image
from diptych.datasets.manifest import Manifest
from diptych.datasets.npy import check_header
from diptych.datasets.survey import IMAGE_EXTENSIONS

_SIDE = 64
_ROWS_AT_ONCE = 64
REPAIRED = "repaired"
"""Folder beside the shards for clean copies."""


@dataclass(frozen=True)
class Repair:
    """What a clean copy holds."""

    url: str
    samples: int
    lost: int
    """Samples of the manifest that were left out."""


def verify_shard(manifest: Manifest, shard: int) -> list[Fault]:
    """A fault for every member of one shard that cannot be read or decoded."""
    faults = []
    for key, extension, data, error in _members(manifest, shard):
        kind, detail = ("unreadable_member", error) if error else _check(extension, data)
        if kind:
            faults.append(Fault(manifest.shard_names[shard], key, kind, f"{key}.{extension}: {detail}"))
    return faults


def _members(manifest: Manifest, shard: int) -> Iterator[tuple[str, str, bytes, str]]:
    """(key, extension, content, why it cannot be read) of every member, in the order of the samples."""
    start, stop = manifest.shard_starts[shard : shard + 2].tolist()
    url = manifest.shard_url(shard)
    for first in range(start, stop, _ROWS_AT_ONCE):
        rows = manifest.rows(np.arange(first, min(first + _ROWS_AT_ONCE, stop)), ["key", "members"]).to_pylist()
        for row in rows:
            for member in row["members"]:
                try:
                    yield row["key"], member["ext"], ranged.read_range(url, member["offset"], member["size"]), ""
                except OSError as error:
                    yield row["key"], member["ext"], b"", str(error)


def _check(extension: str, data: bytes) -> tuple[str, str]:
    """(kind, detail) of what is wrong with a member's content; empty if nothing. Texts were read by the manifest's walk."""
    if extension in IMAGE_EXTENSIONS:
        try:
            decode_image(data, ImageNeed(_SIDE, "pad"), np.zeros(4), choose_decoder("auto"))
        except BadImageError as error:
            return "undecodable_image", str(error)
    if extension == "npy":
        try:
            check_header(data)
        except ValueError as error:
            return "bad_array", str(error)
    return "", ""


def repair_shard(manifest: Manifest, shard: int, bad_keys: set[str]) -> Repair:
    """Write the samples of one shard that are whole to `repaired/NAME` beside the shards; an older copy is replaced.

    `bad_keys` are samples to leave out, such as those of `verify_shard`.
    """
    target = storage.join(manifest.root, REPAIRED, manifest.shard_names[shard])
    folders.make_folder(storage.parent(target))
    start, stop = manifest.shard_starts[shard : shard + 2].tolist()
    local = storage.temporary_path(storage.local_path(target)) if storage.is_local(target) else ""
    buffer = open(local, "xb") if local else io.BytesIO()  # noqa: SIM115 - closed below, then renamed
    kept: set[str] = set()
    try:
        with buffer, tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for key, extension, data, error in _members(manifest, shard):
                if key in bad_keys or error:
                    continue
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                kept.add(key)
            tar.close()
            if isinstance(buffer, io.BytesIO):
                storage.write_bytes(target, buffer.getvalue())
        if local:
            storage.replace_file(local, storage.local_path(target))
    finally:
        if local and os.path.exists(local):
            os.unlink(local)
    return Repair(target, len(kept), stop - start - len(kept))
