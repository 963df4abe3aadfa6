"""Precomputed embeddings, joined to samples by key and never by position.

clip-retrieval's partitions stand in another order than the tars, and a sample without the wanted member is left out of
them without a word; DALLE2-pytorch's layout has zero rows for gaps. So every sample is looked up: (shard, key) → (file, row).
What has no embedding, two of them, or none of its own is reported; a zero, NaN or infinite vector is found when it is read.

Shape legend: N samples of the manifest, n rows asked for, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from diptych.config import ConfigError
from diptych.datasets import folders, storage
from diptych.datasets.manifest import Manifest
from diptych.datasets.member_embeddings import is_members, join_members
from diptych.datasets.partitions import MISSING, Joined, Kind, Lookup, join_partitions, open_all
from diptych.datasets.reorder_index import index_width, parse_places

PREFIXES = {"image": "img_emb", "text": "text_emb"}
"""File prefix of each modality in both layouts."""
KIND = Kind("data.embeddings", "embedding", "`diptych embed`")


class EmbeddingJoin(Joined):
    """The join of a manifest with a folder of embeddings, by modality: `image`, `text`."""

    def dim(self, which: str) -> int:
        """Dimension of one modality."""
        return self.lookups[which].dim

    def read(self, rows: np.ndarray, which: str, retries: int = storage.READ_RETRIES) -> tuple[np.ndarray, list[tuple[int, str, str]]]:
        """(float32 [n, D] of manifest rows `rows`, `(index into rows, kind, detail)` of each bad vector)."""
        lookup = self.lookups[which]
        vectors = lookup.read(rows, retries)
        return vectors, check_vectors(vectors, lookup.file[rows] == MISSING, which)


def check_vectors(vectors: np.ndarray, missing: np.ndarray, which: str) -> list[tuple[int, str, str]]:
    """`(index, kind, detail)` of every vector of float [n, D] that is missing, not finite or zero."""
    finite = np.isfinite(vectors).all(axis=1)
    zero = ~vectors.any(axis=1)
    bad = []
    for index in np.flatnonzero(missing | ~finite | zero).tolist():
        if missing[index]:
            bad.append((index, "missing_embedding", f"no {which} embedding has this key"))
        elif not finite[index]:
            bad.append((index, "nan_embedding", f"the {which} embedding holds NaN or infinity"))
        else:
            bad.append((index, "zero_embedding", f"the {which} embedding is all zeros, as a gap in the reordered layout is"))
    return bad


def join(manifest: Manifest, folder: str, which: Sequence[str] = ("image", "text")) -> EmbeddingJoin:
    """Join `manifest` with clip-retrieval's layout or DALLE2-pytorch's reordered one, whichever `folder` holds, or `members` of the tars.

    Raises `ConfigError` where the folder holds neither, lacks a modality, mixes dimensions, or shares no key with the data.
    """
    inside = is_members(folder)
    joined = EmbeddingJoin(folder if inside else storage.absolute(folder), {})
    if inside:
        join_members(joined, manifest, folder, which, KIND)
    elif folders.list_files(storage.join(joined.folder, "metadata"), ".parquet"):
        join_partitions(joined, manifest, {name: PREFIXES[name] for name in which}, KIND)
    else:
        _join_reordered(joined, manifest, which)
    joined.settle(manifest, KIND)
    return joined


def _join_reordered(joined: EmbeddingJoin, manifest: Manifest, which: Sequence[str]) -> None:
    """DALLE2-pytorch's layout: `img_emb_SHARD.npy`, row = index digits of the key."""
    places, digits = parse_places(manifest.columns.texts("key").cast(pa.string()))
    names = [Path(name).stem for name in manifest.shard_names]
    folder = joined.folder
    for modality in which:
        prefix = PREFIXES[modality]
        paths = folders.list_files(folder, ".npy") + folders.list_files(storage.join(folder, prefix), ".npy")
        listed = {Path(path).stem.removeprefix(f"{prefix}_"): path for path in paths if Path(path).stem.startswith(f"{prefix}_")}
        numbered = {int(number): path for number, path in listed.items() if number.isdigit()}
        if not numbered:
            raise ConfigError("data.embeddings", folder, f"clip-retrieval's layout (metadata/, {prefix}/) or {prefix}_SHARD.npy files",
                              f"The task needs {modality} embeddings: `diptych embed` or `diptych reorder` writes them.")  # fmt: skip
        try:
            first = int(np.argmax(digits > 0))  # any key beside the name of its own tar
            width = index_width(names[int(manifest.shard_of(np.array([first]))[0])], int(digits[first]))
        except ValueError as error:
            raise ConfigError("data.embeddings", folder, "the reordered layout of these shards", str(error)) from None
        order = sorted(numbered)
        files = open_all([numbered[number] for number in order], modality, KIND)
        of_shard = np.array([order.index(int(name)) if name.isdigit() and int(name) in numbered else MISSING for name in names], np.int32)
        file = of_shard[np.asarray(manifest.column("shard"))]
        row = places % 10**width
        rows_of = np.array([*(found.rows for found in files), 0], np.int64)  # the last stands for a missing file
        file[(digits == 0) | (row >= rows_of[file])] = MISSING
        joined.lookups[modality] = Lookup(files, file, row)
