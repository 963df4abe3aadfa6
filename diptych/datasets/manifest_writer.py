"""Writes a manifest: surveys of shards in, one atomic folder out.

    <folder>/manifest.json        facts, and the name of the folder that holds the data; replaced last, so it commits
    <folder>/v-<id>/samples.parquet   a row per sample, one row group per shard: for DuckDB, people and other programs
    <folder>/v-<id>/shards.parquet    a row per shard: name, bytes, samples, row_start, row_group, digest, counts
    <folder>/v-<id>/faults.parquet    a row per fault
    <folder>/v-<id>/*.bin             the same rows as flat arrays, for random access (`columns.py`)
    <folder>/v-<id>/facts.json        copy of `manifest.json`; the version before the newest stays for runs that use it

Faults that only the whole data set shows are found here: `repeated_key`, `missing_member`, `unfinished_shard`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diptych.batches import Fault
from diptych.datasets import storage
from diptych.datasets.columns import Columns, ColumnWriter
from diptych.datasets.survey import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, SCHEMA, Survey

FORMAT = 1
"""Raised when the files change, so that older manifests are built again."""
CHUNK_ROWS = 1 << 20
HASHES_AT_ONCE = 1 << 25
"""Key hashes that the search for repeated keys sorts at a time (256 MB)."""

COUNTS = ("successes", "failed_to_download", "failed_to_resize")
FAULT_SCHEMA = pa.schema([(name, pa.string()) for name in ("shard", "key", "kind", "detail", "scope")])
SHARD_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("bytes", pa.int64()),
        ("samples", pa.int64()),
        ("row_start", pa.int64()),
        ("row_group", pa.int32()),
        ("digest", pa.string()),
        ("stamp", pa.string()),
        *((name, pa.int64()) for name in COUNTS),
    ]
)


class ManifestWriter:
    """Collects surveys in the order of the shards' names and commits them as one manifest; use as a context manager.

    Memory does not grow with the number of rows. Without `commit` nothing of it is left.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._remote = not storage.is_local(folder)
        self._data = f"v-{uuid.uuid4().hex[:12]}"
        self._base = tempfile.mkdtemp(prefix="diptych-manifest-") if self._remote else storage.local_path(folder)
        self._path = os.path.join(self._base, self._data)
        self._columns = ColumnWriter(self._path)
        self._rows = pq.ParquetWriter(os.path.join(self._path, "samples.parquet"), SCHEMA, compression="zstd")
        self._shards: list[dict[str, Any]] = []
        self._faults: list[tuple[Fault, str]] = []
        self._samples = self._row_groups = 0
        self._committed = False

    def __enter__(self) -> ManifestWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            with contextlib.suppress(OSError):  # of a full disk, which is on its way to the caller already
                self._rows.close()
                self._columns.close()
            shutil.rmtree(self._path, ignore_errors=True)
        if self._remote:
            shutil.rmtree(self._base, ignore_errors=True)

    def add(self, survey: Survey) -> None:
        """Append one shard. Shards come in the order of their names, each once."""
        assert not self._shards or self._shards[-1]["name"] < survey.name, (self._shards[-1]["name"], survey.name)
        count = survey.table.num_rows
        if count:
            shard = pa.array(np.full(count, len(self._shards), np.int32))
            table = survey.table.set_column(0, SCHEMA.field("shard"), shard)
            self._rows.write_table(table, row_group_size=count)
            self._columns.append(table)
        self._shards.append(
            {
                "name": survey.name,
                "bytes": survey.bytes,
                "samples": count,
                "row_start": self._samples,
                "row_group": self._row_groups if count else -1,
                "digest": survey.digest,
                "stamp": survey.stamp,
            }
            | {name: survey.counts.get(name) for name in COUNTS}
        )
        self._faults += [(fault, "shard") for fault in survey.faults]
        self._samples += count
        self._row_groups += bool(count)

    def commit(self, root: str) -> None:
        """Put the manifest in place. `root` is the folder that the names of the shards are relative to."""
        self._rows.close()
        self._columns.close()
        columns = Columns(self._path)
        extensions = list(self._columns.extensions)
        names = [shard["name"] for shard in self._shards]
        starts = np.array([shard["row_start"] for shard in self._shards] + [self._samples], np.int64)
        roles = _Roles(columns, extensions)
        overall = [*roles.faults(names, starts), *_repeated_keys(columns, names, starts), *_unfinished(self._shards)]
        self._faults += [(fault, "dataset") for fault in overall]
        self._write_tables()
        storage.sync_files(self._path)
        facts = {
            "format": FORMAT,
            "data": self._data,
            "files": {entry.name: entry.stat().st_size for entry in sorted(os.scandir(self._path), key=lambda entry: entry.name)},
            "root": _relative_root(root, self.folder),
            "digest": dataset_digest((shard["name"], shard["digest"]) for shard in self._shards),
            "shards": len(names),
            "samples": self._samples,
            "captions": roles.captions,
            "images": roles.images,
            "failed_downloads": sum(shard["failed_to_download"] or 0 for shard in self._shards),
            "failed_resizes": sum(shard["failed_to_resize"] or 0 for shard in self._shards),
            "bytes": sum(shard["bytes"] for shard in self._shards),
            "faults": len(self._faults),
            "extensions": extensions,
        }
        former = _data_of(self.folder)
        facts["former"] = former
        content = json.dumps(facts, indent=2).encode()
        storage.write_bytes(os.path.join(self._path, "facts.json"), content)
        if self._remote:
            for name in (*facts["files"], "facts.json"):
                storage.upload(os.path.join(self._path, name), storage.join(self.folder, self._data, name))
        storage.write_bytes(storage.join(self.folder, "manifest.json"), content)
        self._committed = True
        if not self._remote:
            _remove_versions(self._base, {self._data, former})

    def _write_tables(self) -> None:
        shards = pa.Table.from_pylist(self._shards, SHARD_SCHEMA)
        pq.write_table(shards, os.path.join(self._path, "shards.parquet"))
        faults = [{"shard": f.shard, "key": f.key, "kind": f.kind, "detail": f.detail, "scope": scope} for f, scope in self._faults]
        pq.write_table(pa.Table.from_pylist(faults, FAULT_SCHEMA), os.path.join(self._path, "faults.parquet"))


def dataset_digest(shards: Iterable[tuple[str, str]]) -> str:
    """Identity of the data: sha256 over the sorted (name, digest) of the shards; where the folder lies does not count."""
    digest = hashlib.sha256(b"diptych manifest 1\n")
    for name, shard in sorted(shards):
        digest.update(f"{len(name)}:{name};{shard}\n".encode())
    return digest.hexdigest()


class _Roles:
    """Which rows have an image, and which a caption, counted in chunks of rows."""

    def __init__(self, columns: Columns, extensions: list[str]) -> None:
        self.columns = columns
        self._image_codes = [extensions.index(ext) for ext in IMAGE_EXTENSIONS if ext in extensions]
        self._caption_codes = [extensions.index(ext) for ext in CAPTION_EXTENSIONS if ext in extensions]
        self.images = self.texts = self.captions = self.rows = 0
        for rows in self._chunks():
            self.rows += len(rows)
            self.images += int((columns.first_member(rows, self._image_codes) >= 0).sum())
            self.texts += int((columns.first_member(rows, self._caption_codes) >= 0).sum())
            self.captions += int((columns["caption_start"][rows + 1] > columns["caption_start"][rows]).sum())

    def faults(self, names: list[str], starts: np.ndarray) -> Iterator[Fault]:
        """`missing_member` for every row without an image, or a caption, that most rows have."""
        roles = (("image", self._image_codes, self.images), ("caption", self._caption_codes, self.texts))
        for role, codes, count in roles:
            if not self.rows > count > self.rows / 2:
                continue
            for rows in self._chunks():
                for row in rows[self.columns.first_member(rows, codes) < 0]:
                    members = self.columns["member_start"][row : row + 2]
                    detail = f"no {role} among its {members[1] - members[0]} members, where {count} of {self.rows} samples have one"
                    yield Fault(_shard_of(row, names, starts), _key(self.columns, row), "missing_member", detail)

    def _chunks(self) -> Iterator[np.ndarray]:
        total = len(self.columns["member_start"]) - 1
        for start in range(0, total, CHUNK_ROWS):
            yield np.arange(start, min(start + CHUNK_ROWS, total))


def _repeated_keys(columns: Columns, names: list[str], starts: np.ndarray) -> Iterator[Fault]:
    hashes = columns["key_hash"]
    parts = (np.sort(part) for part in _hashes_in_parts(hashes, columns.folder))
    found = [np.unique(ordered[1:][ordered[1:] == ordered[:-1]]) for ordered in parts]
    repeated = np.concatenate(found)
    if not len(repeated):
        return
    first: dict[str, int] = {}
    for start in range(0, len(hashes), CHUNK_ROWS):
        for row in (start + np.flatnonzero(np.isin(hashes[start : start + CHUNK_ROWS], repeated))).tolist():
            key = _key(columns, row)
            if first.setdefault(key, row) != row:
                detail = f"{_shard_of(first[key], names, starts)} has a sample of the same key"
                yield Fault(_shard_of(row, names, starts), key, "repeated_key", detail)


def _hashes_in_parts(hashes: np.ndarray, folder: str) -> Iterator[np.ndarray]:
    """The hashes in parts of about `HASHES_AT_ONCE`, equal ones in the same: each is read once, however many parts there are."""
    parts = 1 + len(hashes) // HASHES_AT_ONCE
    if parts == 1:
        yield hashes
        return
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(parts)]
        for start in range(0, len(hashes), CHUNK_ROWS):
            chunk = np.asarray(hashes[start : start + CHUNK_ROWS])
            owner = chunk % np.uint64(parts)
            order = np.argsort(owner, kind="stable")
            ends = np.searchsorted(owner[order], np.arange(parts + 1, dtype=np.uint64))
            for number, file in enumerate(files):
                file.write(chunk[order[ends[number] : ends[number + 1]]].tobytes())
        for file in files:
            file.seek(0)
            yield np.frombuffer(file.read(), hashes.dtype)


def _unfinished(shards: list[dict[str, Any]]) -> Iterator[Fault]:
    if any(shard["successes"] is not None for shard in shards):
        for shard in shards:
            if shard["successes"] is None:
                detail = "other shards have img2dataset's statistics, this one has none: its download did not finish"
                yield Fault(shard["name"], "", "unfinished_shard", detail)


def _shard_of(row: int, names: list[str], starts: np.ndarray) -> str:
    return names[int(np.searchsorted(starts, row, "right")) - 1]


def _key(columns: Columns, row: int) -> str:
    start, end = columns["key_start"][row : row + 2]
    return bytes(columns["key_text"][start:end]).decode()


def _relative_root(root: str, folder: str) -> str:
    """`root` relative to the manifest where that lies inside, so that both can be moved together."""
    if storage.is_local(root) and storage.is_local(folder):
        relative = os.path.relpath(storage.absolute(root), storage.absolute(folder))
        if all(part == ".." for part in Path(relative).parts):
            return relative
    return storage.absolute(root)


def _data_of(folder: str) -> str:
    try:
        return str(json.loads(storage.read_bytes(storage.join(folder, "manifest.json"))).get("data", ""))
    except (FileNotFoundError, ValueError, AttributeError):
        return ""


def _remove_versions(base: str, kept: set[str]) -> None:
    # The version before the newest stays, for runs that started on it.
    for entry in os.scandir(base):
        if entry.name.startswith("v-") and entry.name not in kept:
            shutil.rmtree(entry.path, ignore_errors=True)
