"""The manifest: one row per sample of a data set, with the place of every member; and how to build or open it.

`open_manifest` is what callers use. It walks only shards that are new or changed, in parallel, and what it finds is
put in place by one rename. Opening costs memory in the number of shards, not of rows.

Shape legend: N rows asked for, S shards.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diptych.batches import Fault
from diptych.config import ConfigError
from diptych.datasets import storage
from diptych.datasets.columns import Columns
from diptych.datasets.manifest_writer import COUNTS, FORMAT
from diptych.datasets.ranged import READ_RETRIES, with_retries
from diptych.datasets.survey import SCHEMA, Survey

REMEDY = "Delete the folder; `diptych index SHARDS` builds it again."
META_BYTES = 1 << 27
"""Memory for row groups of the `meta` column, per process."""
_scratch: ContextVar[str] = ContextVar("scratch", default="")
"""Where manifests that have to be built go instead of where they belong; empty = where they belong."""


class Manifest:
    """Rows [0, samples) in (shard, offset) order. Safe to share between threads; pickled as its folder."""

    def __init__(self, folder: str, facts: dict[str, Any], local: str, root: str) -> None:
        self.folder, self.root = folder, root
        self._facts = facts
        self._path = os.path.join(local, facts["data"])
        # Neither `pq.read_table` nor `to_numpy`: both import pandas, half a second in every process that opens a manifest.
        shards = pq.ParquetFile(os.path.join(self._path, "shards.parquet"), pre_buffer=False).read()
        self.shards: pa.Table = shards
        """Per shard: name, bytes, samples, row_start, row_group, digest, stamp, and img2dataset's counts."""
        self.shard_names: list[str] = shards["name"].to_pylist()
        self.shard_starts = np.append(np.from_dlpack(shards["row_start"].combine_chunks()), facts["samples"]).astype(np.int64)
        self.samples: int = facts["samples"]
        self.digest: str = facts["digest"]
        self.failed_downloads: int = facts["failed_downloads"]
        self.extensions: list[str] = facts["extensions"]
        self.columns = Columns(self._path)
        self._meta: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._parquet: pq.ParquetFile | None = None
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: str, root: str = "", digest: str = "") -> Manifest:
        """Open the manifest in `folder`. `root` says where the shards lie now, if not where they lay when it was built.

        With `digest`, open the version of that digest: a run keeps its rows while somebody adds shards and indexes them.
        Raises `FileNotFoundError` if there is none, `ConfigError` if it is damaged, of another format or of other data.
        """
        folder = storage.absolute(folder)
        if not storage.exists(storage.join(folder, "manifest.json")):
            remedy = "`diptych index SHARDS` makes one; workers on other machines need data.manifest on storage that all share"
            raise FileNotFoundError(errno.ENOENT, f"there is no manifest; {remedy}", folder)
        facts = _read_facts(storage.join(folder, "manifest.json"))
        if digest and facts["digest"] != digest:
            facts = _former_version(folder, facts, digest)
        data, files = facts["data"], facts["files"]
        local = folder if storage.is_local(folder) else _download(folder, data, files)
        for name, size in files.items():
            path = os.path.join(local, data, name)
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                raise ConfigError("data.manifest", path, f"a file of {size} bytes", REMEDY)
        stored = facts["root"]
        if storage.is_local(stored) and not os.path.isabs(stored):
            stored = os.path.normpath(os.path.join(storage.local_path(folder), stored))
        return cls(folder, facts, local, storage.absolute(root) if root else stored)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Manifest.load, (self.folder, self.root, self.digest))

    @property
    def samples_path(self) -> str:
        """Local path of the Parquet with every row (columns of `survey.SCHEMA`), for DuckDB."""
        return os.path.join(self._path, "samples.parquet")

    @property
    def faults(self) -> list[Fault]:
        """Every fault found, those of single shards first."""
        table = pq.read_table(os.path.join(self._path, "faults.parquet"), columns=["shard", "key", "kind", "detail"])
        return [Fault(**row) for row in table.to_pylist()]

    def facts(self) -> dict[str, Any]:
        """Counts for `TaskConfig.check_data` and for people: samples, captions and images (samples that have one), …"""
        names = ("samples", "captions", "images", "shards", "bytes", "digest", "failed_downloads", "failed_resizes", "faults")
        return {name: self._facts[name] for name in names} | {"extensions": list(self.extensions)}

    def shard_url(self, shard: int) -> str:
        """Where shard number `shard` lies."""
        return storage.join(self.root, self.shard_names[shard])

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """int32 [N]: number of the shard that holds each row."""
        return (np.searchsorted(self.shard_starts, rows, "right") - 1).astype(np.int32)

    def members(self, rows: np.ndarray, exts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shard int32 [N], offset int64 [N], size int64 [N]) of the first of `exts` that each row has; -1, -1 where none."""
        rows = self._checked(rows)
        codes = [self.extensions.index(ext) for ext in exts if ext in self.extensions]
        index = self.columns.first_member(rows, codes)
        found = index >= 0
        offset, size = np.full(len(rows), -1, np.int64), np.full(len(rows), -1, np.int64)
        offset[found] = self.columns["member_offset"][index[found]]
        size[found] = self.columns["member_size"][index[found]]
        self.columns.touched(len(rows))
        return self.shard_of(rows), offset, size

    def rows(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows in the order asked, with the types of `survey.SCHEMA`; all columns unless `columns` names some."""
        rows = self._checked(rows)
        names = SCHEMA.names if columns is None else list(columns)
        arrays = [self._take(name, rows) for name in names]
        self.columns.touched(len(rows))
        return pa.Table.from_arrays(arrays, schema=pa.schema([SCHEMA.field(name) for name in names]))

    def column(self, name: str) -> np.ndarray | pa.ChunkedArray:
        """A whole column: a memory-mapped array for numbers (-1 where unknown), an Arrow array for texts and members."""
        if name in ("key_hash", "width", "height"):
            return self.columns[name]
        if name == "shard":
            return np.repeat(np.arange(len(self.shard_names), dtype=np.int32), np.diff(self.shard_starts))
        if name == "key":
            return pa.chunked_array([self.columns.texts("key")])
        if name == "caption":
            texts = self.columns.texts("caption")
            return pa.chunked_array([pc.if_else(pc.greater(pc.binary_length(texts), 0), texts, None)])
        return pq.read_table(self.samples_path, columns=[SCHEMA.field(name).name])[name]

    def survey(self, shard: int) -> Survey:
        """What the walk over shard number `shard` found, as it was added."""
        row = self.shards.slice(shard, 1).to_pylist()[0]
        faults = pq.read_table(
            os.path.join(self._path, "faults.parquet"), filters=[("shard", "=", row["name"]), ("scope", "=", "shard")]
        ).drop_columns(["scope"])
        table = SCHEMA.empty_table() if row["row_group"] < 0 else self._read_group(row["row_group"], None)
        counts = {name: row[name] for name in COUNTS if row[name] is not None}
        return Survey(
            row["name"], row["bytes"], table, [Fault(**fault) for fault in faults.to_pylist()], row["digest"], counts, row["stamp"]
        )

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.samples):
            raise IndexError(f"rows {rows.min()} to {rows.max()} asked of a manifest with {self.samples}")
        return rows

    def _take(self, name: str, rows: np.ndarray) -> pa.Array:
        if name == "shard":
            return pa.array(self.shard_of(rows))
        if name == "key_hash":
            return pa.array(self.columns["key_hash"][rows])
        if name in ("width", "height"):
            values = self.columns[name][rows]
            return pa.array(values, mask=values < 0)
        if name in ("key", "caption"):
            texts = self.columns.texts(name).take(pa.array(rows)).cast(pa.string())
            return texts if name == "key" else pc.if_else(pc.greater(pc.binary_length(texts), 0), texts, pa.scalar(None, pa.string()))
        if name == "members":
            flat, counts = self.columns.members_of(rows)
            codes = pa.array(self.columns["member_extension"][flat])
            fields = [pa.array(self.extensions, pa.string()).take(codes)]
            fields += [pa.array(self.columns[column][flat]) for column in ("member_offset", "member_size")]
            kind = SCHEMA.field("members").type
            starts = pa.array(np.append(0, np.cumsum(counts)).astype(np.int32))
            return pa.ListArray.from_arrays(starts, pa.StructArray.from_arrays(fields, fields=list(kind.value_type)))
        if name == "meta":
            return self._take_meta(rows)
        raise KeyError(f"{name}: the manifest has the columns {', '.join(SCHEMA.names)}")

    def _take_meta(self, rows: np.ndarray) -> pa.Array:
        shards = self.shard_of(rows)
        texts: list[str | None] = [None] * len(rows)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            inside = rows[places] - self.shard_starts[shard]
            for place, text in zip(places, self._meta_of(int(shard)).take(pa.array(inside)).to_pylist(), strict=True):
                texts[place] = text
        return pa.array(texts, pa.string())

    def _meta_of(self, shard: int) -> pa.ChunkedArray:
        with self._lock:
            if shard in self._meta:
                self._meta.move_to_end(shard)
                return self._meta[shard]
        column = self._read_group(self.shards["row_group"][shard].as_py(), ["meta"])["meta"]
        with self._lock:
            self._meta[shard] = column
            while len(self._meta) > 1 and sum(kept.nbytes for kept in self._meta.values()) > META_BYTES:
                self._meta.popitem(last=False)
        return column

    def _read_group(self, group: int, columns: list[str] | None) -> pa.Table:
        with self._lock:
            if self._parquet is None:
                self._parquet = pq.ParquetFile(self.samples_path)
            return self._parquet.read_row_group(group, columns=columns, use_threads=False)


def open_manifest(shards: str, folder: str = "", jobs: int | None = None, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest of `shards`, built if there is none, brought up to date where shards or their statistics changed.

    Without `folder` it is in `.diptych` beside local shards, or in the working folder if that cannot be written. A single
    tar or a pattern has its own folder, so that it does not replace the manifest of the whole folder.
    A manifest that stands beside the shards and is up to date is used wherever it cannot be written too. `progress` is
    called with (shards walked, shards to walk). Raises `ConfigError` if there are no shards, or if `folder` cannot be
    written, and `ReadError` if a shard cannot be read.
    """
    return _open(shards, folder, jobs, progress, reuse=True)


def build_manifest(shards: str, folder: str = "", jobs: int | None = None, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """The manifest of `shards`, with every shard walked anew. Otherwise as `open_manifest`."""
    return _open(shards, folder, jobs, progress, reuse=False)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Within, what has to be built is gone afterwards, and manifests that stand and are up to date are read as ever.

    For calls that only look. It reaches every `open_manifest` below, so that none of them can forget it.
    """
    with tempfile.TemporaryDirectory(prefix="diptych-") as folder:
        token = _scratch.set(folder)
        try:
            yield
        finally:
            _scratch.reset(token)


def _open(shards: str, folder: str, jobs: int | None, progress: Callable[[int, int], None] | None, reuse: bool) -> Manifest:
    from diptych.datasets.manifest_build import Builder

    builder = Builder(storage.list_shards(shards))
    beside, elsewhere = _places(shards, builder.root)
    if scratch := _scratch.get():
        places = [] if not reuse else [folder] if folder else [beside, elsewhere]
        standing = next((found for place in places if (found := builder.fresh(place))), None)
        return standing or builder.bring_up_to_date(os.path.join(scratch, os.path.basename(elsewhere)), jobs, progress, reuse)
    if folder:
        return builder.bring_up_to_date(folder, jobs, progress, reuse)
    if storage.is_local(builder.root) and _writable(builder.root):
        return builder.bring_up_to_date(beside, jobs, progress, reuse)
    return (builder.fresh(beside) if reuse else None) or builder.bring_up_to_date(elsewhere, jobs, progress, reuse)


def common_root(urls: Sequence[str]) -> str:
    """The deepest folder that holds all of `urls`."""
    folders = [storage.parent(url) for url in urls]
    low, high = min(folders).split("/"), max(folders).split("/")
    shared = next((place for place, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    root = "/".join(low[:shared]) or "/"
    if not storage.is_local(urls[0]) and root.count("/") < 2:
        raise ConfigError("shards", f"{urls[0]}, …, {urls[-1]}", "tars of one bucket or host", "Give each its own manifest.")
    return root


def _places(shards: str, root: str) -> tuple[str, str]:
    """Folder of the manifest beside the shards, and in the working folder."""
    location = storage.absolute(shards).rstrip("/")
    tag = hashlib.sha256(location.encode()).hexdigest()[:12]
    name = root.rpartition("/")[2] or "shards"
    beside = storage.join(root, ".diptych", *([] if location == root else [f"part-{tag}"]))
    return beside, os.path.abspath(os.path.join(".diptych", "manifests", f"{name}-{tag}"))


def _writable(folder: str) -> bool:
    # Root may write anywhere; a folder without any write bit was meant to be left alone.
    return bool(os.stat(folder).st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)) and os.access(folder, os.W_OK)


def _read_facts(url: str) -> dict[str, Any]:
    try:
        facts = json.loads(storage.read_bytes(url))
        version, _ = facts["format"], (facts["data"], facts["files"], facts["digest"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError("data.manifest", url, "a whole manifest", REMEDY) from None
    if version != FORMAT:
        raise ConfigError("data.manifest", f"format {version} in {url}", f"format {FORMAT}", REMEDY)
    return facts


def _former_version(folder: str, newest: dict[str, Any], digest: str) -> dict[str, Any]:
    """The facts of the version before the newest, if it has `digest`: it is kept for runs that started on it."""
    with contextlib.suppress(FileNotFoundError, KeyError):
        former = _read_facts(storage.join(folder, newest["former"], "facts.json"))
        if former["digest"] == digest:
            return former
    allowed = f"the data {digest[:12]}… that this run started on"
    remedy = "Shards were added, removed or changed. Put them back, or start a new run on the new data."
    raise ConfigError("data.manifest", f"data {newest['digest'][:12]}… in {folder}", allowed, remedy)


def _download(folder: str, data: str, files: dict[str, int]) -> str:
    """A local copy of a remote manifest, shared by the processes of this machine and user."""
    tag = hashlib.sha256(folder.encode()).hexdigest()[:12]
    local = os.path.join(tempfile.gettempdir(), f"diptych-{os.getuid()}", f"manifest-{tag}")
    with storage.locked(local):
        for name, size in files.items():
            path = os.path.join(local, data, name)
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                temporary = storage.temporary_path(path)
                fs, remote = storage.file_system(storage.join(folder, data, name))
                with_retries(functools.partial(fs.get_file, remote, temporary), remote, 0, size, READ_RETRIES)
                storage.replace_file(temporary, path)
    return local
