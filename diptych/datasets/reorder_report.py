"""`reorder` as a whole: refuse what has no place, write what has, list every gap with its reason, and be resumable.

`OUT` holds `img_emb/` and `text_emb/` (nothing but `.npy`, as DALLE2-pytorch's loader demands), `gaps.parquet` with a line
for every row of zeros, and `reorder.json`, which names the inputs: files found beside it are used again if those are the same.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diptych.batches import Fault
from diptych.config import ConfigError
from diptych.datasets import folders, reorder, storage
from diptych.datasets.manifest import Manifest
from diptych.datasets.reorder_index import PlaceIndex, ShardRows, index_width, parse_places

GAP_SCHEMA = pa.schema([("shard", pa.string()), ("key", pa.string()), ("index", pa.int32()), ("reason", pa.string())])
MOST_FAULTS = 10_000
"""Faults listed one by one in the summary; `gaps.parquet` has all."""
_FORMAT = 1
_GAPS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Samples:
    """Shards of a manifest as DALLE2-pytorch's loader sees them."""

    manifest: Manifest
    width: int
    """Index digits of the keys."""

    @classmethod
    def of(cls, manifest: Manifest) -> Samples:
        """Raises `ValueError` where tars are not numbered or keys have no index digits."""
        if not manifest.samples:
            raise ValueError(f"{manifest.root} holds no samples")
        key = manifest.rows(np.array([0]), ["key"])["key"][0].as_py()
        shard = manifest.shard_names[int(manifest.shard_of(np.array([0]))[0])]
        name = shard.rpartition("/")[2].removesuffix(".tar")
        if not key.startswith(name):
            raise ValueError(f"{shard} holds the key {key!r}, which does not begin with the name of its tar; pack or ingest the data again")
        return cls(manifest, index_width(name, len(key)))

    def shards(self) -> list[ShardRows]:
        """Every shard with its rows: what img2dataset counted, failed downloads included, else up to the highest index of a sample."""
        counts = self.manifest.shards.select(["successes", "failed_to_download", "failed_to_resize"]).to_pylist()
        found = []
        for number, (name, count) in enumerate(zip(self.manifest.shard_names, counts, strict=True)):
            index = self.indices(number)
            counted = sum(value or 0 for value in count.values())
            found.append(ShardRows(name.rpartition("/")[2].removesuffix(".tar"), max(counted, int(index.max(initial=-1)) + 1)))
        return found

    def indices(self, shard: int) -> np.ndarray:
        """Sorted indices (int64) of the samples of shard number `shard`. Raises `ValueError` for a key of another shard."""
        start, stop = self.manifest.shard_starts[shard : shard + 2]
        keys = self.manifest.columns.texts("key").slice(start, stop - start)
        name = self.manifest.shard_names[shard].rpartition("/")[2].removesuffix(".tar")
        places, digits = parse_places(keys.cast(pa.string()))
        base = 10**self.width
        wrong = np.flatnonzero((digits != len(name) + self.width) | (places // base != int(name) if name.isdigit() else True))
        if len(wrong):
            raise ValueError(
                f"{name}.tar holds {len(wrong)} keys such as {keys[int(wrong[0])].as_py()!r} that are not its name followed by {self.width} index "
                "digits, so DALLE2-pytorch could not find their embedding; pack or ingest the data again"
            )
        return np.sort(places % base)


@dataclass
class Report:
    """What `reorder` found and did."""

    samples_in: int = 0
    """Embeddings read, per modality."""
    samples_out: int = 0
    """Rows that hold a usable embedding in every modality."""
    rows: int = 0
    """Rows written, gaps included, per modality."""
    gaps: int = 0
    """Rows of zeros because there is no sample, such as a dead link."""
    index_width: int = 0
    """DALLE2-pytorch's `index_width`."""
    shards: int = 0
    """Shards with files."""
    reused: int = 0
    """Shards whose files stood there already."""
    modalities: dict[str, str] = field(default_factory=dict)
    """`img_emb`, `text_emb` → dtype and dimension."""
    faults: list[Fault] = field(default_factory=list)
    faults_total: int = 0
    """Faults found; `faults` lists the first `MOST_FAULTS`."""

    def add(self, fault: Fault) -> None:
        """Count a fault, and list it if there is room."""
        self.faults_total += 1
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(fault)


def reorder_embeddings(
    embeddings: str,
    out: str,
    shards: Sequence[ShardRows],
    width: int,
    samples: Callable[[str], np.ndarray],
    *,
    overwrite: bool = False,
    jobs: int = 2,
    advance: Callable[[int], None] = lambda _rows: None,
) -> Report:
    """Write the embeddings of the folder `embeddings` below `out`, a file per shard and modality.

    `width` is the number of index digits of a key, and `samples(shard)` gives the sorted indices (int64) of the samples that stand in the tar.
    Raises `ValueError` for embeddings without a place, before anything is written, and `ConfigError` for an `out` that holds another result.
    """
    source = reorder.open_source(embeddings)
    fingerprint = _fingerprint(source, shards)
    may_reuse = stands_in(out, source, shards, overwrite) == "this very result"
    if not may_reuse:
        for url in _files(out):
            storage.remove(url)
    with folders.scratch(out, "reorder") as folder:
        index = reorder.build_index(source, shards, width, folder)
        if index.unplaced.counts:
            raise ValueError(
                f"{embeddings} has embeddings without a place: {index.unplaced.message()}. Give the shards that were embedded, all of them, "
                "and embed partitions that overlap again; nothing was written. Training needs no such layout: `data.embeddings` joins them by key."
            )
        report = Report(samples_in=source.rows, index_width=index.width)
        report.modalities = {kind: f"{dtype} [{dim}]" for kind, (dim, dtype) in source.shapes.items()}
        _write_record(out, {"status": "running", "fingerprint": fingerprint})
        gaps = _GapTable(index.width)
        for result in reorder.write_shards(source, index, out, may_reuse, jobs):
            _account(report, gaps, index, result, samples(result.name))
            advance(result.filled)
    storage.write_bytes(storage.join(out, "gaps.parquet"), gaps.to_bytes(), durable=False)
    facts = {name: getattr(report, name) for name in ("samples_in", "samples_out", "rows", "gaps", "index_width", "shards", "modalities")}
    _write_record(out, {"status": "done", "fingerprint": fingerprint, **facts, "faults": report.faults_total})
    return report


def _account(report: Report, gaps: _GapTable, index: PlaceIndex, result: reorder.ShardResult, present: np.ndarray) -> None:
    """Add one shard to the report: each row of zeros is either a sample that never was, or a fault."""
    if result.filled == 0:
        if len(present):
            detail = f"none of its {len(present)} samples has an embedding; no file was written"
            report.add(Fault(f"{result.name}.tar", "", "missing_embeddings", detail))
        return
    known = np.zeros(result.rows, bool)
    known[present] = True
    lost, dead = result.gaps[known[result.gaps]], result.gaps[~known[result.gaps]]
    known[result.gaps] = True
    extra = np.flatnonzero(~known)
    bad = np.unique(np.concatenate([*result.bad.values(), np.empty(0, np.int64)]))
    report.samples_out += result.filled - len(bad)
    report.rows += result.rows
    report.shards += 1
    report.reused += result.reused
    report.gaps += len(dead)
    for reason, rows, detail in (
        ("no_sample", dead, ""),
        ("missing_embedding", lost, "the sample is in the tar, but not among the embeddings; its row is zeros"),
        ("bad_embedding", bad, f"zeros, NaN or infinity in {' and '.join(result.bad)}; its row is zeros"),
        ("unknown_sample", extra, "an embedding whose sample is not in the tar; it was written all the same"),
    ):
        if reason != "unknown_sample" and len(rows):
            gaps.add(result.name, rows, reason)
        for number in rows.tolist() if detail else ():
            report.add(Fault(f"{result.name}.tar", f"{result.name}{number:0{index.width}d}", reason, detail))


class _GapTable:
    """`gaps.parquet`, compressed as it grows, so that memory holds little of it."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._stream = io.BytesIO()
        self._writer = pq.ParquetWriter(self._stream, GAP_SCHEMA, compression="zstd")
        self._pending: list[tuple[str, np.ndarray, str]] = []
        self._pending_rows = 0

    def add(self, shard: str, rows: np.ndarray, reason: str) -> None:
        """The `rows` (int64 [n]) of `shard`, all for one `reason`."""
        self._pending.append((shard, rows, reason))
        self._pending_rows += len(rows)
        if self._pending_rows >= _GAPS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        shards, rows, reasons = zip(*self._pending, strict=True)
        group = np.repeat(np.arange(len(rows), dtype=np.int32), [len(part) for part in rows])
        of_group, places = _integers(group), _integers(np.concatenate(rows).astype(np.int32))
        shard = _texts(shards).take(of_group)
        digits = pc.utf8_lpad(places.cast(pa.string()), self._width, "0")
        columns = [shard, pc.binary_join_element_wise(shard, digits, ""), places, _texts(reasons).take(of_group)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=GAP_SCHEMA))
        self._pending.clear()
        self._pending_rows = 0

    def to_bytes(self) -> bytes:
        self._flush()
        self._writer.close()
        return self._stream.getvalue()


# From buffers: `pa.array` of a list or an array imports pandas, which takes longer than to reorder 100,000 rows.


def _texts(values: Sequence[str]) -> pa.StringArray:
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def _integers(values: np.ndarray) -> pa.Int32Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def _fingerprint(source: reorder.Source, shards: Sequence[ShardRows]) -> str:
    """Names, sizes and stamps of every input file, and the rows of every shard, as one hash."""
    urls = list(_inputs(source))
    facts: list[Any] = [_FORMAT, [(shard.name, shard.rows) for shard in shards]]
    for url, found in zip(urls, storage.stat_many(urls), strict=True):
        facts.append((url.rpartition("/")[2], found.size if found else -1, found.stamp if found else ""))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _inputs(source: reorder.Source) -> Iterator[str]:
    for part in source.partitions:
        yield part.metadata
        yield from (array.url for array in part.embeddings.values())


def stands_in(
    out: str, source: reorder.Source, shards: Sequence[ShardRows], overwrite: bool
) -> Literal["nothing", "this very result", "another result"]:
    """What `out` holds already; `ConfigError` for another result, unless it is to be overwritten."""
    if not _files(out):
        return "nothing"
    record = storage.join(out, "reorder.json")
    if _read_record(record).get("fingerprint") == _fingerprint(source, shards):
        return "this very result"
    if not overwrite:
        raise ConfigError("OUT", out, "an empty folder, or one that holds this very result", "Name another folder, or add --overwrite.")
    return "another result"


def _files(out: str) -> list[str]:
    return [url for kind in reorder.MODALITIES for url in folders.list_files(storage.join(out, kind), ".npy")]


def _read_record(url: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(url)) if storage.exists(url) else {}
    except ValueError:  # a power failure may leave it empty
        return {}
    return found


def _write_record(out: str, record: dict[str, Any]) -> None:
    # Repeating the call mends what a power failure takes, so nothing waits for a disk that may be busy with other files.
    storage.write_bytes(storage.join(out, "reorder.json"), json.dumps(record, indent=2).encode(), durable=False)
