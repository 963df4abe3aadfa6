"""One shard → its samples and its faults: the rows that the manifest holds.

Members are grouped by key (the name without its last extension), captions and img2dataset's JSON are taken inline, and
the counts are compared with img2dataset's `_stats.json` and Parquet where they lie beside the tar.

Fault kinds beside those of `tar.py`: `duplicate_key`, `split_sample`, `dotted_key`, `no_extension`, `empty_member`,
`bad_text`, `bad_json`, `count_mismatch`, `missing_sample`, `unlisted_sample`, `bad_statistics`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.batches import Fault
from diptych.datasets import storage
from diptych.datasets.image_size import image_size
from diptych.datasets.tar import Entry, Source, split_name, walk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "heic", "heif", "avif")
CAPTION_EXTENSIONS = ("txt", "text", "caption")
TEXT_LIMIT = 1 << 20
"""Bytes of the longest caption or JSON that is taken inline."""
IMAGE_HEAD, LONG_IMAGE_HEAD = 1 << 12, 1 << 19
"""Bytes of an image that are looked at for its size: usual, and where long metadata comes first."""

SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("key_hash", pa.uint64()),
        pa.field("caption", pa.string()),
        pa.field("members", pa.list_(pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]))),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("meta", pa.string()),
    ]
)


class Member(NamedTuple):
    """One file of a sample."""

    ext: str
    offset: int
    size: int


@dataclass
class Sample:
    """One row in the making."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    caption: str | None = None
    meta: str | None = None
    size: tuple[int, int] | None = None
    """Width and height in pixels."""


@dataclass
class Survey:
    """What one walk over a shard found."""

    name: str
    """Name of the tar, relative to the root of the data set."""
    bytes: int
    table: pa.Table
    """Rows in the order of their offsets, with `SCHEMA`; `shard` is filled in by the manifest."""
    faults: list[Fault]
    digest: str
    """Over every key, extension, offset, size and caption."""
    counts: dict[str, int]
    """img2dataset's own `successes`, `failed_to_download`, `failed_to_resize`; empty where it left none."""
    stamp: str = ""
    """Changes when the tar or its statistics are written again."""


def sidecars(url: str) -> tuple[str, str]:
    """img2dataset's `_stats.json` and Parquet of a tar."""
    stem = url.removesuffix(".tar")
    return f"{stem}_stats.json", f"{stem}.parquet"


def key_hash(key: str) -> int:
    """The 64-bit hash of a key that splits and joins use: blake2b of its UTF-8 bytes, 8 bytes, little-endian."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def survey_shard(url: str, name: str, size: int | None = None, stamp: str = "", statistics: bool = True) -> Survey:
    """Walk one tar. `statistics` compares the counts with img2dataset's files beside it.

    Raises `ReadError` or `FileNotFoundError` if the tar cannot be read; damage inside it is in `faults`.
    """
    source = Source(url, size)
    surveyor = _Surveyor(source, name)
    surveyor.take(walk(source, name))
    samples, faults = list(surveyor.samples.values()), surveyor.faults
    counts = _compare(url, name, surveyor.samples, faults) if statistics else {}
    return Survey(name, source.size, _table(samples), faults, _digest(samples), counts, stamp)


class _Surveyor:
    def __init__(self, source: Source, name: str) -> None:
        self.source, self.name = source, name
        self.samples: dict[str, Sample] = {}
        self.faults: list[Fault] = []

    def take(self, found: Iterator[Entry | Fault]) -> None:
        current: Sample | None = None
        last_key: str | None = None
        for item in found:
            if isinstance(item, Fault):
                self.faults.append(item)
                continue
            key, extension = split_name(item.name)
            if not extension:
                self._fault(key, "no_extension", f"{item.name} belongs to no sample: its name has no key before an extension")
                continue
            if key != last_key or (current is not None and extension in current.members):
                current, last_key = self._begin(key, extension, item), key
            if current is not None:
                self._add(current, extension, item)
        for sample in self.samples.values():
            self._finish(sample)

    def _begin(self, key: str, extension: str, entry: Entry) -> Sample | None:
        """The sample that a run of members of one key belongs to; None if they repeat one that is already there."""
        first = self.samples.get(key)
        if first is None:
            sample = self.samples[key] = Sample(key)
            if "." in key.rpartition("/")[2]:
                self._fault(key, "dotted_key", "webdataset and Ray cut a key at its first dot and would merge samples")
            return sample
        if extension in first.members:
            where = first.members[extension].offset
            self._fault(key, "duplicate_key", f"{entry.name} at offset {entry.offset} repeats the one at {where}, which is kept")
            return None
        detail = f"{entry.name} at offset {entry.offset} lies apart from the other members; webdataset would see two samples"
        self._fault(key, "split_sample", detail)
        return first

    def _add(self, sample: Sample, extension: str, entry: Entry) -> None:
        sample.members[extension] = Member(extension, entry.offset, entry.size)
        if entry.size == 0:
            self._fault(sample.key, "empty_member", f"{entry.name} has no bytes")
        elif extension in CAPTION_EXTENSIONS:
            if sample.caption is None:
                sample.caption = self._text(sample.key, entry, "bad_text")
        elif extension == "json":
            sample.meta = self._text(sample.key, entry, "bad_json")
        elif extension in IMAGE_EXTENSIONS and sample.size is None:
            sample.size = image_size(self.source.read(entry.offset, min(entry.size, IMAGE_HEAD)))

    def _text(self, key: str, entry: Entry, kind: str) -> str | None:
        if entry.size > TEXT_LIMIT:
            self._fault(key, kind, f"{entry.name} has {entry.size} bytes; at most {TEXT_LIMIT} are taken as text")
            return None
        data = self.source.read(entry.offset, entry.size)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            self._fault(key, kind, f"{entry.name} is not valid UTF-8 (byte {error.start})")
            return None
        if "\0" in text:
            self._fault(key, kind, f"{entry.name} holds a NUL byte")
            return None
        return text

    def _finish(self, sample: Sample) -> None:
        if sample.meta is not None:
            try:
                meta = json.loads(sample.meta)
            except (ValueError, RecursionError) as error:
                self._fault(sample.key, "bad_json", f"{sample.key}.json: {error}")
                sample.meta = None
            else:
                sample.size = _stated_size(meta) or sample.size
        if sample.size is None:
            image = next((sample.members[ext] for ext in IMAGE_EXTENSIONS if ext in sample.members), None)
            if image and image.size > IMAGE_HEAD:
                head = storage.read_range(self.source.url, image.offset, min(image.size, LONG_IMAGE_HEAD), self.source.retries)
                sample.size = image_size(head)

    def _fault(self, key: str, kind: str, detail: str) -> None:
        self.faults.append(Fault(self.name, key, kind, detail))


def _stated_size(meta: Any) -> tuple[int, int] | None:
    if isinstance(meta, dict):
        width, height = meta.get("width"), meta.get("height")
        if isinstance(width, int) and isinstance(height, int) and 0 < width < 1 << 31 and 0 < height < 1 << 31:
            return width, height
    return None


def _table(samples: list[Sample]) -> pa.Table:
    keys = [sample.key for sample in samples]
    members = [member for sample in samples for member in sample.members.values()]
    starts = [0]
    for sample in samples:
        starts.append(starts[-1] + len(sample.members))
    extensions, offsets, sizes = zip(*members, strict=True) if members else ((), (), ())
    kind = SCHEMA.field("members").type.value_type
    flat = pa.StructArray.from_arrays(
        [pa.array(extensions, pa.string()), pa.array(offsets, pa.int64()), pa.array(sizes, pa.int64())], fields=list(kind)
    )
    columns = [
        pa.array([0] * len(samples), pa.int32()),
        pa.array(keys, pa.string()),
        pa.array([key_hash(key) for key in keys], pa.uint64()),
        pa.array([sample.caption for sample in samples], pa.string()),
        pa.ListArray.from_arrays(pa.array(starts, pa.int32()), flat),
        pa.array([sample.size[0] if sample.size else None for sample in samples], pa.int32()),
        pa.array([sample.size[1] if sample.size else None for sample in samples], pa.int32()),
        pa.array([sample.meta for sample in samples], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _digest(samples: list[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        members = ",".join(f"{ext}:{offset}:{size}" for ext, offset, size in sample.members.values())
        caption = "-" if sample.caption is None else f"{len(sample.caption)}:{sample.caption}"
        digest.update(f"{len(sample.key)}:{sample.key};{members};{caption}\n".encode())
    return digest.hexdigest()


def _compare(url: str, name: str, samples: dict[str, Sample], faults: list[Fault]) -> dict[str, int]:
    """img2dataset's counts of the shard; what disagrees with them is appended to `faults`."""
    stats_url, parquet_url = sidecars(url)
    counts: dict[str, int] = {}
    try:
        stats = json.loads(storage.read_bytes(stats_url))
        counts = {field: int(stats[field]) for field in ("successes", "failed_to_download", "failed_to_resize")}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        faults.append(Fault(name, "", "bad_statistics", f"{stats_url.rpartition('/')[2]}: {type(error).__name__}: {error}"))
    if counts and counts["successes"] != len(samples):
        detail = f"{stats_url.rpartition('/')[2]} counts {counts['successes']} successes, the tar holds {len(samples)} samples"
        faults.append(Fault(name, "", "count_mismatch", detail))
    try:
        data = storage.read_bytes(parquet_url)
        parquet = pq.ParquetFile(io.BytesIO(data), pre_buffer=False)
        if not {"key", "status"} <= set(parquet.schema_arrow.names):
            return counts
        listed = parquet.read(columns=["key", "status"], use_threads=False)
    except FileNotFoundError:
        return counts
    except (pa.ArrowException, OSError) as error:
        faults.append(Fault(name, "", "bad_statistics", f"{parquet_url.rpartition('/')[2]}: {error}"))
        return counts
    expected: dict[str, None] = {}
    tally: dict[str, int] = {"successes": 0, "failed_to_download": 0, "failed_to_resize": 0}
    for key, status in zip(listed["key"].to_pylist(), listed["status"].to_pylist(), strict=True):
        if status == "success":
            expected[key] = None
        status = "successes" if status == "success" else status
        tally[status] = tally.get(status, 0) + 1
    missing, extra = (key for key in expected if key not in samples), (key for key in samples if key not in expected)
    file = parquet_url.rpartition("/")[2]
    faults += [Fault(name, str(key), "missing_sample", f"{file} lists it as a success, the tar lacks it") for key in missing]
    faults += [Fault(name, key, "unlisted_sample", f"the tar holds it, {file} lists no such success") for key in extra]
    return counts or tally
