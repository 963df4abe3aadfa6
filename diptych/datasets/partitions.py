"""Arrays in clip-retrieval's partitions, joined to samples by key: (shard, key) → (file, row).

Partition p has `metadata/metadata_p.parquet` with the keys and `PREFIX/PREFIX_p.npy` for each array, row for row. Embeddings and
caches are both laid out so. Partitions may stand in any order; what has no row, two of them, or a row of no sample is reported.

Shape legend: N samples of the manifest, n rows asked for, D numbers of a row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diptych.batches import Fault
from diptych.config import ConfigError
from diptych.datasets import folders, ranged, storage
from diptych.datasets.manifest import Manifest
from diptych.datasets.npy import NpyFile, open_npy
from diptych.datasets.survey import key_hash

MISSING = -1
_MOST_FAULTS_NAMED = 1000
AnyJoin = TypeVar("AnyJoin", bound="Joined")


class Kind(NamedTuple):
    """What stands in the partitions, for complaints and reports."""

    key: str
    """Of the configuration: `data.embeddings`, `data.caches`."""
    noun: str
    """Faults are `missing_NOUN`, `extra_NOUN`, …"""
    remedy: str
    """What makes such a folder."""

    @property
    def words(self) -> str:
        """The noun as people read it."""
        return self.noun.replace("_", " ")


@dataclass
class Lookup:
    """Where one array's rows stand."""

    files: list[NpyFile]
    file: np.ndarray
    """int32 [N]: index into `files`; -1 = this sample has no row."""
    row: np.ndarray
    """int64 [N]: row in that file; where each row has its own header, the byte at which that begins."""
    header: bytes = b""
    """What each row begins with, where each is an array of its own."""

    @property
    def dim(self) -> int:
        """D, the same in all files."""
        return self.files[0].dim

    def read(self, rows: np.ndarray, retries: int) -> np.ndarray:
        """float32 [n, D] of manifest rows; zeros where there is none."""
        return self.read_parts(rows, np.zeros(len(rows), np.int64), self.dim, np.dtype(np.float32), retries)

    def read_parts(self, rows: np.ndarray, starts: np.ndarray, width: int, dtype: np.dtype, retries: int) -> np.ndarray:
        """`dtype` [n, width]: of each manifest row the numbers from `starts` (int64 [n]) on; zeros where there is no row."""
        out = np.zeros((len(rows), width), dtype)
        places, inside = self.file[rows], self.row[rows]
        for number in np.unique(places[places != MISSING]).tolist():
            chosen = np.flatnonzero(places == number)
            found = self.files[number]
            unit = 1 if self.header else found.row_bytes
            offsets = (found.offset + inside[chosen] * unit + starts[chosen] * found.dtype.itemsize).tolist()
            length = len(self.header) + width * found.dtype.itemsize
            pieces = ranged.read_ranges(found.url, [(offset, length) for offset in offsets], retries=retries)
            strange = [not piece.startswith(self.header) for piece in pieces]
            # An overflow to infinity is found by whoever checks the rows, like any other.
            with np.errstate(over="ignore"):
                out[chosen] = np.frombuffer(b"".join(piece[len(self.header) :] for piece in pieces), found.dtype).reshape(-1, width)
            out[chosen[strange]] = np.nan
        return out


@dataclass
class Joined:
    """The join of a manifest with a folder of arrays."""

    folder: str
    lookups: dict[str, Lookup]
    """By array."""
    matched: int = 0
    """Samples that have a row in every array asked for."""
    counts: dict[str, int] = field(default_factory=dict)
    """Faults by kind; `faults` names the first thousand of each."""
    faults: list[Fault] = field(default_factory=list)
    saved: str = ""
    """Folder that `save` wrote it to, from which readers load it."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the folder says of itself, where it does."""

    @property
    def which(self) -> tuple[str, ...]:
        """The arrays."""
        return tuple(self.lookups)

    def settle(self, manifest: Manifest, kind: Kind) -> None:
        """Count and name what has no row. Raises `ConfigError` if nothing has one."""
        have = np.ones(manifest.samples, bool)
        for lookup in self.lookups.values():
            have &= lookup.file != MISSING
        self.matched = int(have.sum())
        if not self.matched:
            raise ConfigError(
                kind.key, self.folder, f"{kind.words}s of these shards; none of their keys is among the {manifest.samples:,} samples'",
                f"Compare `image_path` in metadata/ with the names in the tars, or run {kind.remedy} on these shards.",
            )  # fmt: skip
        missing = np.flatnonzero(~have)
        self.counts[f"missing_{kind.noun}"] = len(missing)
        detail = f"no {kind.words} in {self.folder} has this key"
        self.faults += _name_rows(manifest, missing[:_MOST_FAULTS_NAMED], f"missing_{kind.noun}", detail)
        self.counts = {name: count for name, count in self.counts.items() if count}

    def save(self, folder: Path) -> None:
        """Write the join as memory-mappable arrays; `load` opens it again."""
        folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"folder": self.folder, "matched": self.matched, "counts": self.counts, "about": self.about, "lookups": {}}
        about["headers"] = {which: lookup.header.hex() for which, lookup in self.lookups.items()}
        for which, lookup in self.lookups.items():
            np.save(folder / f"{which}_file.npy", lookup.file)
            np.save(folder / f"{which}_row.npy", lookup.row)
            about["lookups"][which] = [[file.url, file.rows, file.shape, file.dtype.str, file.offset] for file in lookup.files]
        (folder / "join.json").write_text(json.dumps(about))
        self.saved = str(folder.absolute())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open a saved join; its arrays are memory-mapped, so that readers share them."""
        about = json.loads((folder / "join.json").read_text())
        lookups = {}
        for which, files in about["lookups"].items():
            opened = [NpyFile(url, rows, tuple(shape), np.dtype(dtype), offset) for url, rows, shape, dtype, offset in files]
            file, row = (np.load(folder / f"{which}_{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("file", "row"))
            lookups[which] = Lookup(opened, file, row, bytes.fromhex(about["headers"][which]))
        return cls(about["folder"], lookups, about["matched"], about["counts"], saved=str(folder.absolute()), about=about["about"])


def open_all(paths: Sequence[str], which: str, kind: Kind, sides: int = 1) -> list[NpyFile]:
    """The files of one array, all with rows of one shape (of `sides` sides). Raises `ConfigError`."""
    files = []
    for path in paths:
        try:
            files.append(open_npy(path, sides))
        except ValueError as error:
            raise ConfigError(kind.key, path, f"a .npy file of float rows of {sides} dimensions", str(error)) from None
    shapes = Counter(file.shape for file in files)
    if len(shapes) > 1:
        odd = shapes.most_common()[-1][0]
        name = next(file.url for file in files if file.shape == odd)
        one, all_of_them = (_size(odd), [_size(shape) for shape in sorted(shapes)])
        raise ConfigError(kind.key, f"{name} with {one} dimensions", f"one dimension in all {which} files; found {all_of_them}")
    return files


def _size(shape: tuple[int, ...]) -> int | list[int]:
    return shape[0] if len(shape) == 1 else list(shape)


def join_partitions(joined: Joined, manifest: Manifest, prefixes: Mapping[str, str], kind: Kind, sides: Mapping[str, int] = {}) -> None:
    """Fill `joined` with the arrays of `prefixes` (name → prefix of its files) in its folder, whose rows have `sides` sides, or one.

    Raises `ConfigError`.
    """
    folder = joined.folder
    metadata = folders.list_files(storage.join(folder, "metadata"), ".parquet")
    numbers = [Path(path).stem.rpartition("_")[2] for path in metadata]
    for name, prefix in prefixes.items():
        listed = {Path(path).stem.rpartition("_")[2]: path for path in folders.list_files(storage.join(folder, prefix), ".npy")}
        absent = sorted(set(numbers) - set(listed)) or (sorted(set(listed) - set(numbers)) if kind.noun == "embedding" else [])
        if absent or not numbers:
            what = f"partition {absent[0]} without its counterpart" if listed and absent else f"no {prefix}/*.npy"
            raise ConfigError(kind.key, f"{folder}: {what}", f"metadata_P.parquet and {prefix}_P.npy for each partition P",
                              f"{kind.remedy} writes both; the task needs {name} {kind.words}s.")  # fmt: skip
        files = open_all([listed[number] for number in numbers], name, kind, sides.get(name, 1))
        joined.lookups[name] = Lookup(files, np.full(manifest.samples, MISSING, np.int32), np.zeros(manifest.samples, np.int64))
    matcher = _Matcher(manifest)
    for number, path in enumerate(metadata):
        _join_partition(joined, matcher, number, path, kind)


def _join_partition(joined: Joined, matcher: _Matcher, number: int, path: str, kind: Kind) -> None:
    with folders.open_input(path) as stream:
        try:
            parquet = pq.ParquetFile(stream, pre_buffer=False)
            columns = [name for name in ("image_path", "shard") if name in parquet.schema_arrow.names]
            table = parquet.read(columns=columns).combine_chunks()
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(kind.key, path, "a whole Parquet file of metadata", f"{error}. Make this partition again.") from None
    if "image_path" not in columns:
        raise ConfigError(kind.key, path, "a column image_path with the samples' keys, as clip-retrieval writes it")
    for name, lookup in joined.lookups.items():
        if lookup.files[number].rows != table.num_rows:
            raise ConfigError(kind.key, f"{lookup.files[number].url} with {lookup.files[number].rows} rows",
                              f"{table.num_rows} rows, one per row of {path}", f"The {name} partition was cut or mixed up.")  # fmt: skip
    keys = pc.fill_null(table["image_path"], "").combine_chunks()
    shards = table["shard"].combine_chunks() if "shard" in columns and pa.types.is_string(table["shard"].type) else None
    rows = matcher.rows(keys, shards)
    places = np.flatnonzero(rows >= 0)
    lookup = next(iter(joined.lookups.values()))
    # The first of two rows of one sample counts, within this partition and before it.
    unique, first = np.unique(rows[places], return_index=True)
    fresh = lookup.file[unique] == MISSING
    unique, first = unique[fresh], places[first[fresh]]
    for each in joined.lookups.values():
        each.file[unique], each.row[unique] = number, first
    double = np.setdiff1d(places, first, assume_unique=True)
    for problem, where, detail in (
        ("extra", np.flatnonzero(rows == MISSING), f"{kind.words} of no sample of these shards"),
        ("ambiguous", np.flatnonzero(rows == -2), "several samples have this key and the metadata names no shard"),
        ("duplicate", double, f"a second {kind.words} of this key; the first is used"),
    ):
        name = f"{problem}_{kind.noun}"
        joined.counts[name] = joined.counts.get(name, 0) + len(where)
        room = max(0, _MOST_FAULTS_NAMED - sum(fault.kind == name for fault in joined.faults))
        for index in where[:room].tolist():
            shard = matcher.manifest.shard_names[matcher.manifest.shard_of(rows[index : index + 1])[0]] if rows[index] >= 0 else ""
            joined.faults.append(Fault(shard, keys[index].as_py(), name, f"{detail} ({Path(path).name}, row {index})"))


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
        rows = np.where(same, found, MISSING)
        if self.repeated:
            self._tell_apart(rows, hashes, left, keys, shards)
        return rows

    def _tell_apart(self, rows: np.ndarray, hashes: np.ndarray, left: np.ndarray, keys: pa.Array, shards: pa.Array | None) -> None:
        right = np.searchsorted(self.sorted, hashes, "right")
        for index in np.flatnonzero(right - left > 1).tolist():
            key = keys[index].as_py()
            rivals = [row for row in self.order[left[index] : right[index]].tolist() if self.keys[row].as_py() == key]
            if shards is not None and len(rivals) > 1:
                number = self.numbers.get(shards[index].as_py(), MISSING)
                rivals = [row for row in rivals if self.manifest.shard_of(np.array([row]))[0] == number]
            rows[index] = rivals[0] if len(rivals) == 1 else MISSING if not rivals else -2
