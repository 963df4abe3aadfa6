"""Tables of images and captions as rows, streamed: csv, tsv, jsonl, json and plain lines.

A line that cannot be read becomes a row with a fault and the rest goes on.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from diptych.config import ConfigError
from diptych.datasets import folders, storage

_LARGEST_FIELD = 1 << 24
"""Characters of one csv cell; longer ones are a fault instead of a `csv.Error` that ends the file."""


@dataclass(frozen=True)
class Row:
    """One line of a source."""

    name: str
    """What the source calls it, for people: a file name, or the table and its line."""
    fields: dict[str, Any]
    fault: tuple[str, str] | None = None
    """(kind, detail) if the line itself cannot be used."""


class Table(Protocol):
    """A source of rows."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, as far as the first row tells them."""
        ...

    @property
    def base(self) -> str:
        """Folder that relative image paths start from."""
        ...

    @property
    def indexed(self) -> bool:
        """Whether `rows(start, stop)` is cheap anywhere, so that workers read their own range (and `captions` reads one column)."""
        ...

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Rows `start` to `stop` in the source's order."""
        ...


@dataclass(frozen=True)
class LineTable:
    """csv, tsv, jsonl or plain lines (one prompt each, column `text`). Raises `ConfigError` if there is no first row."""

    path: str
    kind: str
    base: str = ""
    columns: tuple[str, ...] = ()
    indexed: bool = False

    @classmethod
    def open(cls, path: str, kind: str) -> LineTable:
        """Read the header, or the first readable line's keys."""
        base = storage.parent(path)
        if kind == "txt":
            return cls(path, kind, base, ("text",))
        probe = cls(path, kind, base)
        if kind in ("csv", "tsv"):
            return cls(path, kind, base, tuple(probe._header()))
        for row in itertools.islice(probe.rows(), 1000):
            if row.fault is None:
                return cls(path, kind, base, tuple(row.fields))
        raise ConfigError("SOURCE", path, "one JSON object a line", "None of its first 1,000 lines is one.")

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """See `Table.rows`."""
        readers = {"csv": self._cells, "tsv": self._cells, "txt": self._lines}
        return itertools.islice(readers.get(self.kind, self._objects)(), start, stop)

    def _text(self) -> Iterator[str]:
        """Lines with undecodable bytes kept as surrogates, so that only their own row is at fault."""
        with folders.open_input(self.path) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as text:
            yield from text

    def _header(self) -> list[str]:
        header = next(csv.reader(self._text(), delimiter=self._delimiter), [])
        if not header or len(set(header)) < len(header):
            raise ConfigError("SOURCE", self.path, "a first line that names each column once", f"Its first line is {header}.")
        return header

    @property
    def _delimiter(self) -> str:
        return "\t" if self.kind == "tsv" else ","

    def _cells(self) -> Iterator[Row]:
        csv.field_size_limit(_LARGEST_FIELD)
        reader = csv.reader(self._text(), delimiter=self._delimiter)
        header = next(reader, [])
        while True:
            name = f"{self._short}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(name, {}, ("unreadable_row", str(error)))
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                yield Row(name, {}, ("unreadable_row", f"{len(cells)} cells where the header has {len(header)}"))
            else:
                yield checked(Row(name, dict(zip(header, cells, strict=True))))

    def _lines(self) -> Iterator[Row]:
        for number, line in enumerate(self._text(), 1):
            if line.strip():
                yield checked(Row(f"{self._short}:{number}", {"text": line.strip()}))

    def _objects(self) -> Iterator[Row]:
        for number, line in enumerate(self._text(), 1):
            if not line.strip():
                continue
            name = f"{self._short}:{number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(name, {}, ("unreadable_row", f"no JSON: {error}"))
                continue
            yield checked(Row(name, fields)) if isinstance(fields, dict) else Row(name, {}, ("unreadable_row", "not a JSON object"))

    @property
    def _short(self) -> str:
        return self.path.rpartition("/")[2]


def checked(row: Row) -> Row:
    """`row`, or a row with a fault if a value holds bytes that are no UTF-8 or a NUL."""
    for column, value in row.fields.items():
        if isinstance(value, str):
            if "\x00" in value:
                return Row(row.name, {}, ("unreadable_row", f"NUL byte in column {column!r}"))
            try:
                value.encode()
            except UnicodeEncodeError:
                return Row(row.name, {}, ("unreadable_row", f"invalid UTF-8 in column {column!r}"))
    return row


@dataclass(frozen=True)
class JsonTable:
    """A JSON file: a list of objects, or COCO's captions file (`images`, `annotations`)."""

    path: str
    base: str
    columns: tuple[str, ...]
    indexed: bool = False

    @classmethod
    def open(cls, path: str) -> JsonTable:
        """Raises `ConfigError` for other JSON."""
        first = next(iter(cls(path, "", ()).rows()), None)
        return cls(path, storage.parent(path), tuple(first.fields) if first else ())

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """See `Table.rows`."""
        try:
            content = json.loads(storage.read_bytes(self.path))
        except ValueError as error:
            raise ConfigError("SOURCE", self.path, "a JSON file", str(error)) from None
        if isinstance(content, dict) and {"images", "annotations"} <= set(content):
            content = _coco(content)
        if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
            raise ConfigError("SOURCE", self.path, "a list of objects, or COCO's captions file", "Convert it to csv or jsonl.")
        for number, fields in enumerate(content[start:stop], start):
            yield checked(Row(f"{self.path.rpartition('/')[2]}[{number}]", fields))


def _coco(content: dict[str, Any]) -> list[dict[str, Any]]:
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [{"file_name": image["file_name"], "captions": captions.get(image["id"], [])} for image in content["images"]]
