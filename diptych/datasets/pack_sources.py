"""What a source is: look at a path and open it as a table of rows.

Folders: Hugging Face `imagefolder` (`metadata.csv`/`.jsonl`, any caption column), `captions.jsonl`, Kaggle's (one table
beside the images), DiffusionDB's parts, Hugging Face's own (`save_to_disk`, Parquet snapshots), pictures with `.txt` side-cars,
and pictures alone. Files: csv, tsv, jsonl, json, parquet, and txt with one prompt a line. Else: a name on the hub.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diptych.config import ConfigError
from diptych.datasets import storage
from diptych.datasets.pack_captions import IMAGE_COLUMNS, choose_column
from diptych.datasets.pack_ranges import HubTable, ParquetTable
from diptych.datasets.pack_tables import JsonTable, LineTable, Row, Table

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".heic", ".heif", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
)
_TABLES = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".json": "json", ".parquet": "parquet",
}  # fmt: skip
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet", "captions.jsonl")
_ALLOWED = "an image folder, a csv, tsv, jsonl, json, parquet or txt file, or a Hugging Face data set"


def open_source(source: str, split: str = "", image_column: str = "") -> Table:
    """Open `source` as a table; `split` chooses among a data set's, `image_column` where several could be meant. Raises `ConfigError` if it is nothing of the kinds above."""
    if not source:
        raise ConfigError("SOURCE", source, _ALLOWED)
    if storage.is_local(source) and Path(storage.local_path(source)).is_dir():
        return _open_folder(Path(storage.local_path(source)).absolute(), split, image_column)
    suffix = Path(source.partition("?")[0]).suffix.lower()
    if suffix in _TABLES:
        if not storage.exists(source):
            raise ConfigError("SOURCE", source, _ALLOWED, "There is no such file.")
        return _open_table(storage.absolute(source))
    if storage.exists(source):
        raise ConfigError("SOURCE", source, _ALLOWED, "It is a file of another kind; tars are shards already (`diptych index`).")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) or source.startswith("."):
        raise ConfigError("SOURCE", source, _ALLOWED, "There is no such file or folder.")
    return HubTable.open(source, split)


def _open_table(path: str) -> Table:
    kind = _TABLES[Path(path).suffix.lower()]
    if kind == "parquet":
        return ParquetTable.open([path], storage.parent(path))
    return JsonTable.open(path) if kind == "json" else LineTable.open(path, kind)


def _open_folder(folder: Path, split: str, image_column: str) -> Table:
    names = sorted(entry.name for entry in folder.iterdir())
    if {"state.json", "dataset_dict.json"} & set(names):
        return HubTable.open(str(folder), split)
    metadata = sorted(path for name in _METADATA for path in folder.rglob(name))
    metadata = [path for path in metadata if split in path.relative_to(folder).parts] or metadata if split else metadata
    if metadata:
        return MetadataFolder.open(folder, metadata, image_column)
    parts = sorted(path for path in folder.rglob("part-*.json"))
    if parts:
        return DiffusionParts(str(folder), tuple(map(str, parts)))
    tables = [folder / name for name in names if Path(name).suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet", ".json")]
    parquet = sorted(map(str, folder.rglob("*.parquet")))
    if len(tables) == 1:
        return _open_table(str(tables[0]))
    if parquet and len(tables) == sum(name.endswith(".parquet") for name in names):
        return ParquetTable.open(_of_split(parquet, split), str(folder))
    if len(tables) > 1:
        raise ConfigError("SOURCE", str(folder), "a folder with one table", f"Name one of {', '.join(table.name for table in tables)}.")
    pictures = PictureFolder.open(folder)
    if next(iter(pictures.rows()), None) is None:
        remedy = "It holds no pictures and no table." + (" Tars are shards already: `diptych index`." if any(folder.glob("*.tar")) else "")
        raise ConfigError("SOURCE", str(folder), _ALLOWED, remedy)
    return pictures


def _of_split(paths: list[str], split: str) -> list[str]:
    """Parquet files of one split, told by the hub's names (`train-00000-of-00004.parquet`)."""
    splits = {found[1] for path in paths if (found := re.match(r"(\w+)-\d+-of-\d+", Path(path).name))}
    if not splits:
        return paths
    chosen = split or ("train" if "train" in splits else min(splits))
    if chosen not in splits:
        raise ConfigError("--split", split, ", ".join(sorted(splits)))
    return [path for path in paths if Path(path).name.startswith(f"{chosen}-")]


def _pictures(folder: Path) -> Iterator[Path]:
    """Every picture under `folder`, in a fixed order, one folder's names in memory at a time."""
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(place) / name


@dataclass(frozen=True)
class MetadataFolder:
    """An image folder with one metadata file, or one per subfolder; pictures that no row names are faults."""

    folder: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    base: str
    image_column: str
    indexed: bool = False

    @classmethod
    def open(cls, folder: Path, files: list[Path], image_column: str) -> MetadataFolder:
        """Raises `ConfigError` if the metadata files disagree on their columns."""
        tables = [_open_table(str(path)) for path in files]
        for path, table in zip(files, tables, strict=True):
            if set(table.columns) != set(tables[0].columns):
                raise ConfigError("SOURCE", str(path), f"the columns of {files[0]}: {', '.join(tables[0].columns)}")
        column = choose_column("image", image_column, tables[0].columns, IMAGE_COLUMNS)
        return cls(str(folder), tuple(map(str, files)), tables[0].columns, str(folder), column)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """See `Table.rows`; image paths are made relative to the whole folder."""
        return itertools.islice(self._rows(), start, stop)

    def _rows(self) -> Iterator[Row]:
        column, named = self.image_column, set()
        for path in self.files:
            inner = os.path.relpath(os.path.dirname(path), self.folder)
            for row in _open_table(path).rows():
                value = row.fields.get(column)
                if isinstance(value, str):
                    place = os.path.normpath(os.path.join(inner, value))
                    named.add(place)
                    row = Row(row.name, row.fields | {column: place}, row.fault)
                yield row
        for picture in _pictures(Path(self.folder)):
            name = os.path.relpath(picture, self.folder)
            if name not in named:
                yield Row(name, {}, ("no_row", "no row of the metadata names this picture"))


@dataclass(frozen=True)
class DiffusionParts:
    """DiffusionDB: folders `part-000001/` of pictures, each with a JSON of file name → prompt and settings."""

    base: str
    files: tuple[str, ...]
    columns: tuple[str, ...] = ("file_name", "prompt", "seed", "step", "cfg", "sampler")
    indexed: bool = False

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """See `Table.rows`."""
        return itertools.islice(self._rows(), start, stop)

    def _rows(self) -> Iterator[Row]:
        short = {"prompt": "p", "seed": "se", "step": "st", "cfg": "c", "sampler": "sa"}
        for path in self.files:
            inner = os.path.relpath(os.path.dirname(path), self.base)
            try:
                part = json.loads(Path(path).read_text())
            except ValueError as error:
                yield Row(os.path.relpath(path, self.base), {}, ("unreadable_row", f"no JSON: {error}"))
                continue
            for name, facts in part.items():
                place = os.path.normpath(os.path.join(inner, name))
                yield Row(place, {"file_name": place} | {column: facts.get(key) for column, key in short.items()})


@dataclass(frozen=True)
class PictureFolder:
    """Pictures, with their captions as `.txt` of the same name, or without any."""

    base: str
    columns: tuple[str, ...]
    indexed: bool = False

    @classmethod
    def open(cls, folder: Path) -> PictureFolder:
        """With captions if any picture among the first 10,000 has a side-car."""
        captioned = any(picture.with_suffix(".txt").is_file() for picture in itertools.islice(_pictures(folder), 10_000))
        return cls(str(folder), ("file_name", "text") if captioned else ("file_name",))

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """See `Table.rows`."""
        return (self._row(picture) for picture in itertools.islice(_pictures(Path(self.base)), start, stop))

    def _row(self, picture: Path) -> Row:
        name = os.path.relpath(picture, self.base)
        if "text" not in self.columns:
            return Row(name, {"file_name": name})
        try:
            caption = picture.with_suffix(".txt").read_text()
        except FileNotFoundError:
            return Row(name, {"file_name": name, "text": None})
        except UnicodeDecodeError as error:
            return Row(name, {}, ("unreadable_row", f"invalid UTF-8 in the side-car: {error}"))
        return Row(name, {"file_name": name, "text": caption})
