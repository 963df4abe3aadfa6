"""Embeddings that stand in the tars themselves, one `.npy` member per sample, as DALLE2-pytorch's loaders take them.

`data.embeddings=members` reads the image's embedding from `KEY.npy`; `members:image=EXT:text=EXT` names other members. All have one
header (type and dimension), which is taken from the first and compared at each read: nothing is ever unpickled.

Shape legend: N samples of the manifest, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diptych.config import ConfigError
from diptych.datasets import ranged
from diptych.datasets.manifest import Manifest
from diptych.datasets.npy import NpyFile, check_header
from diptych.datasets.partitions import MISSING, Joined, Kind, Lookup

WORD = "members"
_LARGEST = 1 << 20
"""Bytes of one member at most: an embedding of 1,024 float64 has 8 KB."""


def is_members(location: str) -> bool:
    """Whether `data.embeddings` means members of the tars."""
    return location == WORD or location.startswith(f"{WORD}:")


def join_members(joined: Joined, manifest: Manifest, location: str, which: Sequence[str], kind: Kind) -> None:
    """Fill `joined` with the members that `location` names. Raises `ConfigError` where a modality has none that can be read."""
    named = dict(part.partition("=")[::2] for part in location.split(":")[1:]) or {"image": "npy"}
    if set(named) - {"image", "text"} or not all(named.values()):
        raise ConfigError(kind.key, location, f"{WORD}, or {WORD}:image=EXT:text=EXT with the extensions of the members")
    for name in which:
        extension = named.get(name, "")
        if extension not in manifest.extensions:
            raise ConfigError(
                kind.key, location, f"members with the {name} embeddings, which the task needs; the tars hold {', '.join(manifest.extensions)}",
                f"Name the extension: {WORD}:{name}=EXT, or run {kind.remedy}.",
            )  # fmt: skip
        joined.lookups[name] = _lookup(joined, manifest, extension, kind)


def _lookup(joined: Joined, manifest: Manifest, extension: str, kind: Kind) -> Lookup:
    shards, offsets, sizes = manifest.members(np.arange(manifest.samples), [extension])
    reasons = []
    for row in np.flatnonzero((sizes > 0) & (sizes <= _LARGEST))[:100].tolist():
        data = ranged.read_range(manifest.shard_url(int(shards[row])), int(offsets[row]), int(sizes[row]))
        try:
            header = check_header(data)
        except ValueError as error:
            reasons.append(f"the first one {error}")
            continue
        dim = int(np.prod(header.shape, dtype=np.int64))
        if header.dtype.kind == "f" and header.dtype.itemsize <= 8 and dim and max(header.shape) == dim:
            break
        reasons.append(f"the first one holds {header.dtype} {list(header.shape)}")
    else:
        remedy = reasons[0] if reasons else "All are empty, or longer than 1 MiB."
        raise ConfigError(kind.key, f"members .{extension}", "float vectors [D] in NumPy's format", remedy)
    good = sizes == header.offset + dim * header.dtype.itemsize
    odd = int(((sizes >= 0) & ~good).sum())
    if odd:
        joined.counts[f"unreadable_{kind.noun}"] = joined.counts.get(f"unreadable_{kind.noun}", 0) + odd
    files = [NpyFile(manifest.shard_url(number), -1, (dim,), header.dtype, 0) for number in range(len(manifest.shard_names))]
    return Lookup(files, np.where(good, shards, MISSING).astype(np.int32), offsets.astype(np.int64), data[: header.offset])
