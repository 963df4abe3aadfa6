"""Precomputed embeddings, joined to samples by key and never by position.

clip-retrieval's partitions stand in another order than the tars, and a sample without the wanted member is left out of
them without a word; DALLE2-pytorch's layout has zero rows for gaps. So every sample is looked up: (shard, key) → (file, row).
What has no embedding, two of them, or none of its own is reported; a zero, NaN or infinite vector is found when it is read.

Shape legend: N samples of the manifest, n rows asked for, D dimensions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diptych.batches import Fault
from diptych.config import ConfigError
from diptych.datasets import folders, ranged, storage
from diptych.datasets.manifest import Manifest
from diptych.datasets.npy import NpyFile, open_npy
from diptych.datasets.reorder_index import index_width, parse_places
from diptych.datasets.survey import key_hash

PREFIXES = {"image": "img_emb", "text": "text_emb"}
"""File prefix of each modality in both layouts."""

_MOST_FAULTS_NAMED = 1000
_MISSING = -1


@dataclass
class Lookup:
    """Where one modality's vectors stand."""

    files: list[NpyFile]
    file: np.ndarray
    """int32 [N]: index into `files`; -1 = this sample has no embedding."""
    row: np.ndarray
    """int64 [N]: row in that file."""

    @property
    def dim(self) -> int:
        """D, the same in all files."""
        return self.files[0].dim

    def read(self, rows: np.ndarray, retries: int) -> np.ndarray:
        """float32 [n, D] of manifest rows; zeros where there is no embedding."""
        out = np.zeros((len(rows), self.dim), np.float32)
        places, inside = self.file[rows], self.row[rows]
        for number in np.unique(places[places != _MISSING]).tolist():
            chosen = np.flatnonzero(places == number)
            found = self.files[number]
            offsets = (found.offset + inside[chosen] * found.row_bytes).tolist()
            pieces = ranged.read_ranges(found.url, [(offset, found.row_bytes) for offset in offsets], retries=retries)
            # An overflow of float64 to infinity is found by `check_vectors` like any other.
            with np.errstate(over="ignore"):
                out[chosen] = np.frombuffer(b"".join(pieces), found.dtype).reshape(len(chosen), found.dim)
        return out


@dataclass
class EmbeddingJoin:
    """The join of a manifest with a folder of embeddings."""

    folder: str
    lookups: dict[str, Lookup]
    """By modality: `image`, `text`."""
    matched: int
    """Samples that have an embedding in every modality asked for."""
    counts: dict[str, int] = field(default_factory=dict)
    """Faults by kind; `faults` names the first thousand of each."""
    faults: list[Fault] = field(default_factory=list)
    saved: str = ""
    """Folder that `save` wrote it to, from which readers load it."""

    @property
    def which(self) -> tuple[str, ...]:
        """The modalities."""
        return tuple(self.lookups)

    def dim(self, which: str) -> int:
        """Dimension of one modality."""
        return self.lookups[which].dim

    def read(self, rows: np.ndarray, which: str, retries: int = storage.READ_RETRIES) -> tuple[np.ndarray, list[tuple[int, str, str]]]:
        """(float32 [n, D] of manifest rows `rows`, `(index into rows, kind, detail)` of each bad vector)."""
        lookup = self.lookups[which]
        vectors = lookup.read(rows, retries)
        return vectors, check_vectors(vectors, lookup.file[rows] == _MISSING, which)

    def save(self, folder: Path) -> None:
        """Write the join as memory-mappable arrays; `load` opens it again."""
        folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"folder": self.folder, "matched": self.matched, "counts": self.counts, "lookups": {}}
        for which, lookup in self.lookups.items():
            np.save(folder / f"{which}_file.npy", lookup.file)
            np.save(folder / f"{which}_row.npy", lookup.row)
            about["lookups"][which] = [[file.url, file.rows, file.dim, file.dtype.str, file.offset] for file in lookup.files]
        (folder / "join.json").write_text(json.dumps(about))
        self.saved = str(folder.absolute())

    @classmethod
    def load(cls, folder: Path) -> EmbeddingJoin:
        """Open a saved join; its arrays are memory-mapped, so that readers share them."""
        about = json.loads((folder / "join.json").read_text())
        lookups = {}
        for which, files in about["lookups"].items():
            opened = [NpyFile(url, rows, dim, np.dtype(dtype), offset) for url, rows, dim, dtype, offset in files]
            arrays = [np.load(folder / f"{which}_{name}.npy", mmap_mode="r") for name in ("file", "row")]
            lookups[which] = Lookup(opened, *arrays)
        return cls(about["folder"], lookups, about["matched"], about["counts"], saved=str(folder.absolute()))


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
    """Join `manifest` with clip-retrieval's layout or DALLE2-pytorch's reordered one, whichever `folder` holds.

    Raises `ConfigError` where the folder holds neither, lacks a modality, mixes dimensions, or shares no key with the data.
    """
    folder = storage.absolute(folder)
    metadata = folders.list_files(storage.join(folder, "metadata"), ".parquet")
    joined = _join_partitions(manifest, folder, metadata, which) if metadata else _join_reordered(manifest, folder, which)
    have = np.ones(manifest.samples, bool)
    for lookup in joined.lookups.values():
        have &= lookup.file != _MISSING
    joined.matched = int(have.sum())
    if not joined.matched:
        raise ConfigError(
            "data.embeddings", folder, f"embeddings of these shards; none of their keys is among the {manifest.samples:,} samples'",
            "Compare `image_path` in metadata/ with the names in the tars, or run `diptych embed` on these shards.",
        )  # fmt: skip
    missing = np.flatnonzero(~have)
    joined.counts["missing_embedding"] = len(missing)
    joined.faults += _name_rows(manifest, missing[:_MOST_FAULTS_NAMED], "missing_embedding", f"no embedding in {folder} has this key")
    joined.counts = {kind: count for kind, count in joined.counts.items() if count}
    return joined


def _open_all(paths: Sequence[str], which: str) -> list[NpyFile]:
    files = []
    for path in paths:
        try:
            files.append(open_npy(path))
        except ValueError as error:
            raise ConfigError("data.embeddings", path, "a .npy file of float [rows, dim]", str(error)) from None
    dims = {file.dim for file in files}
    if len(dims) > 1:
        odd = Counter(file.dim for file in files).most_common()[-1][0]
        name = next(file.url for file in files if file.dim == odd)
        raise ConfigError("data.embeddings", f"{name} with {odd} dimensions", f"one dimension in all {which} files; found {sorted(dims)}")
    return files


def _name_rows(manifest: Manifest, rows: np.ndarray, kind: str, detail: str) -> list[Fault]:
    if not len(rows):
        return []
    table = manifest.rows(rows, ["shard", "key"])
    names = manifest.shard_names
    return [Fault(names[shard], key, kind, detail) for shard, key in zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True)]


class _Matcher:
    """Finds manifest rows by key: sorted hashes, then the whole key."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        hashes = np.asarray(manifest.column("key_hash"))
        self.order = np.argsort(hashes, kind="stable")
        self.sorted = hashes[self.order]
        self.keys = manifest.columns.texts("key")
        self.numbers = {name: number for number, name in enumerate(manifest.shard_names)}
        self.repeated = bool((self.sorted[1:] == self.sorted[:-1]).any())

    def rows(self, keys: pa.Array, shards: pa.Array | None) -> np.ndarray:
        """int64: manifest row of each key; -1 = no such sample, -2 = several samples have this key and no shard tells which."""
        hashes = np.array([key_hash(key) for key in keys.to_pylist()], np.uint64)
        left = np.searchsorted(self.sorted, hashes, "left")
        found = self.order[np.minimum(left, len(self.order) - 1)]
        same = np.asarray(pc.equal(self.keys.take(pa.array(found)).cast(pa.string()), keys.cast(pa.string())))
        rows = np.where(same, found, _MISSING)
        if self.repeated:
            self._tell_apart(rows, hashes, left, keys, shards)
        return rows

    def _tell_apart(self, rows: np.ndarray, hashes: np.ndarray, left: np.ndarray, keys: pa.Array, shards: pa.Array | None) -> None:
        right = np.searchsorted(self.sorted, hashes, "right")
        for index in np.flatnonzero(right - left > 1).tolist():
            key = keys[index].as_py()
            rivals = [row for row in self.order[left[index] : right[index]].tolist() if self.keys[row].as_py() == key]
            if shards is not None and len(rivals) > 1:
                number = self.numbers.get(shards[index].as_py(), _MISSING)
                rivals = [row for row in rivals if self.manifest.shard_of(np.array([row]))[0] == number]
            rows[index] = rivals[0] if len(rivals) == 1 else _MISSING if not rivals else -2


def _join_partitions(manifest: Manifest, folder: str, metadata: list[str], which: Sequence[str]) -> EmbeddingJoin:
    """clip-retrieval's layout: partition p has `metadata_p.parquet` and one `.npy` per modality, row for row."""
    numbers = [Path(path).stem.rpartition("_")[2] for path in metadata]
    lookups = {}
    for modality in which:
        prefix = PREFIXES[modality]
        listed = {Path(path).stem.rpartition("_")[2]: path for path in folders.list_files(storage.join(folder, prefix), ".npy")}
        absent = sorted(set(numbers) - set(listed)) or sorted(set(listed) - set(numbers))
        if absent:
            what = f"partition {absent[0]} without its counterpart" if listed else f"no {prefix}/*.npy"
            raise ConfigError("data.embeddings", f"{folder}: {what}", f"metadata_P.parquet and {prefix}_P.npy for each partition P",
                              f"`diptych embed` writes both; the task needs {modality} embeddings.")  # fmt: skip
        files = _open_all([listed[number] for number in numbers], modality)
        empty = np.full(manifest.samples, _MISSING, np.int32), np.zeros(manifest.samples, np.int64)
        lookups[modality] = Lookup(files, *empty)
    joined, matcher = EmbeddingJoin(folder, lookups, 0), _Matcher(manifest)
    for number, path in enumerate(metadata):
        _join_partition(joined, matcher, number, path)
    return joined


def _join_partition(joined: EmbeddingJoin, matcher: _Matcher, number: int, path: str) -> None:
    with folders.open_input(path) as stream:
        try:
            parquet = pq.ParquetFile(stream, pre_buffer=False)
            columns = [name for name in ("image_path", "shard") if name in parquet.schema_arrow.names]
            table = parquet.read(columns=columns).combine_chunks()
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError("data.embeddings", path, "a whole Parquet file of metadata", f"{error}. Make this partition again.") from None
    if "image_path" not in columns:
        raise ConfigError("data.embeddings", path, "a column image_path with the samples' keys, as clip-retrieval writes it")
    for modality, lookup in joined.lookups.items():
        if lookup.files[number].rows != table.num_rows:
            raise ConfigError("data.embeddings", f"{lookup.files[number].url} with {lookup.files[number].rows} rows",
                              f"{table.num_rows} rows, one per row of {path}", f"The {modality} partition was cut or mixed up.")  # fmt: skip
    keys = pc.fill_null(table["image_path"], "").combine_chunks()
    shards = table["shard"].combine_chunks() if "shard" in columns and pa.types.is_string(table["shard"].type) else None
    rows = matcher.rows(keys, shards)
    places = np.flatnonzero(rows >= 0)
    lookup = next(iter(joined.lookups.values()))
    # The first of two embeddings of one sample counts, within this partition and before it.
    unique, first = np.unique(rows[places], return_index=True)
    fresh = lookup.file[unique] == _MISSING
    unique, first = unique[fresh], places[first[fresh]]
    for each in joined.lookups.values():
        each.file[unique], each.row[unique] = number, first
    double = np.setdiff1d(places, first, assume_unique=True)
    for kind, where, detail in (
        ("extra_embedding", np.flatnonzero(rows == _MISSING), "an embedding of no sample of these shards"),
        ("ambiguous_embedding", np.flatnonzero(rows == -2), "several samples have this key and the metadata names no shard"),
        ("duplicate_embedding", double, "a second embedding of this key; the first is used"),
    ):
        joined.counts[kind] = joined.counts.get(kind, 0) + len(where)
        room = max(0, _MOST_FAULTS_NAMED - sum(fault.kind == kind for fault in joined.faults))
        for index in where[:room].tolist():
            shard = matcher.manifest.shard_names[matcher.manifest.shard_of(rows[index : index + 1])[0]] if rows[index] >= 0 else ""
            joined.faults.append(Fault(shard, keys[index].as_py(), kind, f"{detail} ({Path(path).name}, row {index})"))


def _join_reordered(manifest: Manifest, folder: str, which: Sequence[str]) -> EmbeddingJoin:
    """DALLE2-pytorch's layout: `img_emb_SHARD.npy`, row = index digits of the key."""
    places, digits = parse_places(manifest.columns.texts("key").cast(pa.string()))
    names = [Path(name).stem for name in manifest.shard_names]
    lookups = {}
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
        files = _open_all([numbered[number] for number in order], modality)
        of_shard = np.array([order.index(int(name)) if name.isdigit() and int(name) in numbered else _MISSING for name in names], np.int32)
        file = of_shard[np.asarray(manifest.column("shard"))]
        row = places % 10**width
        rows_of = np.array([*(found.rows for found in files), 0], np.int64)  # the last stands for a missing file
        file[(digits == 0) | (row >= rows_of[file])] = _MISSING
        lookups[modality] = Lookup(files, file, row)
    return EmbeddingJoin(folder, lookups, 0)
