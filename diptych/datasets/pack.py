"""A source's rows → shards in img2dataset's layout: the work of `diptych pack`, a shard at a time.

The source is cut into parts, one per shard; a part is picklable, so that any process can pack it. What cannot be used (a
missing or damaged picture, a row without a caption, a line that is no row) keeps its place as a gap in the keys and a
line with its reason in the shard's Parquet, as img2dataset does with failed downloads.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pydantic

from diptych.batches import Fault
from diptych.config import Config, ConfigError
from diptych.datasets import storage
from diptych.datasets.pack_captions import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    apply_template,
    captions_of,
    check_template,
    choose_column,
    clean_keywords,
)
from diptych.datasets.pack_images import BadImageError, Resize, pack_image
from diptych.datasets.pack_tables import Row, Table
from diptych.datasets.shards import Sample, ShardWriter, shard_name

_SUFFIXES = ("", ".jpg", ".png", ".jpeg", ".webp")
_FOLDERS = ("", "images", "image", "imgs", "train")
_OURS = ("key", "status", "error_message", "caption", "source")
"""Columns that every row of a shard has; a source's own of that name stand beside them as `source_<name>`."""


class PackOptions(Config):
    """How a source becomes shards; stored with them, so that a resumed call is the same call."""

    samples_per_shard: int = pydantic.Field(1000, ge=1, le=1_000_000)
    """Samples of one tar, gaps included; it fixes the width of the keys."""
    image_column: str = ""
    """Column with the picture's path or bytes; empty = the first usual name."""
    caption_column: str = ""
    """Column with the caption or captions; empty = the first usual name."""
    captions: Literal["first", "each", "all"] = "first"
    """Of several captions: the first, one sample for each, or all of them joined by line breaks."""
    uncaptioned: Literal["fault", "keep"] = "fault"
    """What a picture without a caption is, in a source that has captions."""
    template: str = ""
    """Caption made of columns, such as `'{label}':{text}`."""
    clean_keywords: bool = False
    """Tidy prompts as lists of keywords."""
    resize: Resize = "none"
    """`none`, `border` (white margins), `center_crop`, or `longest` (longest side at most `size`, never enlarged)."""
    size: int = pydantic.Field(256, ge=8, le=16_384)
    """Side after the resize, in pixels."""
    image_format: Literal["jpg", "png", "webp"] = "jpg"
    """Encoding of pictures that change; others keep their bytes if they have it."""
    quality: int = pydantic.Field(95, ge=1, le=100)
    """JPEG and WebP quality."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a source matter, as found out once."""

    image: str
    caption: str
    base: str

    @classmethod
    def of(cls, table: Table, options: PackOptions) -> Columns:
        """Raises `ConfigError` if a named column is missing, or if the source has neither pictures nor captions."""
        image = choose_column("image", options.image_column, table.columns, IMAGE_COLUMNS)
        several = ("captions", "sentences") if options.captions != "first" else ()
        rest = [column for column in table.columns if column != image]
        caption = choose_column("caption", options.caption_column, rest, several + CAPTION_COLUMNS)
        if options.template:
            check_template(options.template, table.columns)
        if not image and not caption and not options.template:
            raise ConfigError(
                "--caption-column",
                "",
                f"one of the source's columns: {', '.join(table.columns)}",
                "None has a usual name; name it, or --image-column.",
            )
        return cls(image, caption, table.base)


class Record(NamedTuple):
    """One sample to be."""

    row: Row
    caption: str | None
    fault: tuple[str, str] | None


@dataclass(frozen=True)
class Part:
    """The samples of one shard: rows in hand, or a range of a table that the packing process reads itself."""

    number: int
    rows: tuple[Row, ...] | None
    table: Table | None
    start: int
    stop: int
    skip: int
    take: int
    """Of the rows' samples, leave out the first `skip` and pack the next `take`."""

    def records(self, columns: Columns, options: PackOptions) -> Iterator[Record]:
        """The part's samples in order."""
        rows: Any = self.rows if self.rows is not None else self.table.rows(self.start, self.stop) if self.table else ()
        samples = itertools.chain.from_iterable(records_of(row, columns, options) for row in rows)
        return itertools.islice(samples, self.skip, self.skip + self.take)


def records_of(row: Row, columns: Columns, options: PackOptions) -> list[Record]:
    """The samples of one row: one, or one per caption with `captions="each"`."""
    if row.fault:
        return [Record(row, None, row.fault)]
    if not columns.caption and not options.template:
        return [Record(row, None, None)]
    found = captions_of(row.fields.get(columns.caption)) if columns.caption else ()
    found = found[:1] if options.captions == "first" else ("\n".join(found),) if options.captions == "all" else found
    # One sample per caption found, even if the template or the cleaning empties it: `parts` counts on that.
    return [_record(row, text, columns, options) for text in found or ("",)]


def _record(row: Row, text: str, columns: Columns, options: PackOptions) -> Record:
    if options.template:
        text = apply_template(options.template, row.fields | ({columns.caption: text} if columns.caption else {}))
    text = clean_keywords(text) if options.clean_keywords else text
    if text:
        return Record(row, text, None)
    if options.uncaptioned == "keep" and columns.image:
        return Record(row, None, None)
    return Record(row, None, ("no_caption", f"nothing in column {columns.caption or options.template!r}"))


def parts(table: Table, columns: Columns, options: PackOptions) -> Iterator[Part]:
    """Cut `table` into one part per shard, streaming: only one part's rows are held, and none of an indexed table's."""
    size = options.samples_per_shard
    if not table.indexed:
        # Rows are expanded here, so that a shard never holds more samples than its keys have room for.
        pending: list[tuple[Row, int]] = []
        number = 0
        for row in table.rows():
            pending.extend((row, place) for place in range(len(records_of(row, columns, options))))
            while len(pending) >= size:
                yield _listed(number, pending[:size])
                pending, number = pending[size:], number + 1
        if pending:
            yield _listed(number, pending)
        return
    start = skip = samples = 0
    number = index = 0
    for index, count in enumerate(_counts(table, columns, options)):
        first = 0
        while samples + count - first >= size:
            taken = size - samples
            yield Part(number, None, table, start, index + 1, skip, size)
            number, first, samples = number + 1, first + taken, 0
            start, skip = (index, first) if first < count else (index + 1, 0)
        samples += count - first
    if samples:
        yield Part(number, None, table, start, index + 1, skip, samples)


def _listed(number: int, expanded: list[tuple[Row, int]]) -> Part:
    rows = tuple(row for position, (row, _) in enumerate(expanded) if position == 0 or expanded[position - 1][0] is not row)
    return Part(number, rows, None, 0, 0, expanded[0][1], len(expanded))


def _counts(table: Any, columns: Columns, options: PackOptions) -> Iterator[int]:
    """Samples of each row of an indexed table; only with `each` must the captions be looked at."""
    if options.captions == "each" and columns.caption:
        for cell in table.captions(columns.caption):
            yield max(1, len(captions_of(cell)))
    else:
        yield from itertools.repeat(1, table.length)


@dataclass(frozen=True)
class PartResult:
    """What became of one part."""

    number: int
    samples_in: int
    samples_out: int
    faults: tuple[Fault, ...]
    skipped: bool
    """The shard was there already."""


def pack_part(part: Part, columns: Columns, options: PackOptions, out: str) -> PartResult:
    """Write the shard of `part` to the folder `out`, unless it is there."""
    found = finished_part(part, out)
    if found is not None:
        return found
    samples = (_sample(record, columns, options) for record in part.records(columns, options))
    ShardWriter(out, options.samples_per_shard).write_shard(part.number, samples)
    return _result(part.number, out, skipped=False)


def finished_part(part: Part, out: str) -> PartResult | None:
    """The result of an earlier call for `part`, or None; a shard with another number of samples is packed again."""
    if not ShardWriter(out).is_finished(part.number):
        return None
    result = _result(part.number, out, skipped=True)
    return result if result.samples_in == part.take else None


def _result(number: int, out: str, skipped: bool) -> PartResult:
    """Read back what the shard's own Parquet says, so that a resumed call tells the same as an unbroken one."""
    import pyarrow.parquet as pq

    name = shard_name(number)
    data = storage.read_bytes(storage.join(out, f"{name}.parquet"))
    # Read by this thread alone: pyarrow's own would still hold Python's bytes at exit, and abort the process.
    table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(columns=["key", "status", "error_message"], use_threads=False)
    faults = []
    for row in table.to_pylist():
        if row["status"] != "success":
            kind, _, detail = row["error_message"].partition(": ")
            faults.append(Fault(f"{name}.tar", row["key"], kind, detail))
    return PartResult(number, table.num_rows, table.num_rows - len(faults), tuple(faults), skipped)


def _sample(record: Record, columns: Columns, options: PackOptions) -> Sample:
    fields = {
        name: value for name, value in record.row.fields.items() if not _is_picture(value) and (name, value) != ("caption", record.caption)
    }
    meta: dict[str, Any] = {f"source_{name}" if name in _OURS else name: _plain(value) for name, value in fields.items()}
    meta |= {"caption": record.caption, "source": record.row.name}
    if record.fault:
        return _failed(meta, "failed_to_download", *record.fault, record)
    members: dict[str, Any] = {}
    if columns.image:
        try:
            data = _image_bytes(record.row.fields.get(columns.image), columns.base)
        except (OSError, ValueError) as error:
            return _failed(meta, "failed_to_download", "missing_image", str(error), record)
        try:
            packed = pack_image(data, options.resize, options.size, options.image_format, options.quality)
        except BadImageError as error:
            return _failed(meta, "failed_to_resize", "undecodable_image", str(error), record)
        members[options.image_format] = packed.data
        meta |= {"width": packed.width, "height": packed.height}
        meta |= {"original_width": packed.original_width, "original_height": packed.original_height}
        meta |= {"sha256": hashlib.sha256(data).hexdigest()}
    if record.caption is not None:
        members["txt"] = record.caption
    return members | {"json": meta}


def _failed(meta: dict[str, Any], status: str, kind: str, detail: str, record: Record) -> Sample:
    return {"json": meta, "status": status, "error_message": f"{kind}: {record.row.name}: {detail}"}


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _plain(value: Any) -> Any:
    """`value` as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def _image_bytes(value: Any, base: str) -> bytes:
    """The bytes of a picture cell: bytes, `{bytes, path}`, or a path, looked up beside the table.

    Tables of competitions name pictures without suffix or folder. Raises `OSError` or `ValueError` if there is none.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    path = str(value).strip() if isinstance(value, str | int) else ""  # ids may be numbers; NaN is an empty cell
    if not path:
        raise ValueError("no path in the row")
    if not storage.is_local(path):
        return storage.read_bytes(path)
    stems = [storage.join(base, *filter(None, (folder, path))) for folder in _FOLDERS]
    candidates = [path] if path.startswith("/") else [stem + suffix for stem in stems for suffix in _SUFFIXES]
    found = next((name for name in candidates if storage.exists(name)), None)
    if found is None:
        raise FileNotFoundError(f"there is no file {candidates[0]}")
    return storage.read_bytes(found)
