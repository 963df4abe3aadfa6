"""Tables that are read by range, where the work is done, because they may hold the pictures themselves: Parquet and
Hugging Face data sets.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from diptych.config import ConfigError
from diptych.datasets import folders
from diptych.datasets.pack_tables import Row, checked


@dataclass(frozen=True)
class ParquetTable:
    """Parquet files, read a row group at a time; pictures may stand in them as bytes or as `{bytes, path}`."""

    paths: tuple[str, ...]
    base: str
    columns: tuple[str, ...] = ()
    groups: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)
    """(index of the file, row group, first row of the table) of every row group."""
    length: int = 0
    indexed: bool = True

    @classmethod
    def open(cls, paths: list[str], base: str) -> ParquetTable:
        """Read the footers. Raises `ConfigError` for a file that is no Parquet or has other columns than the first."""
        import pyarrow.parquet as pq

        columns: tuple[str, ...] = ()
        groups, total = [], 0
        for index, path in enumerate(paths):
            try:
                with folders.open_input(path) as raw:
                    facts = pq.ParquetFile(raw, pre_buffer=False)
                    names, sizes = (
                        tuple(facts.schema_arrow.names),
                        [facts.metadata.row_group(g).num_rows for g in range(facts.num_row_groups)],
                    )
            except (OSError, ValueError) as error:
                raise ConfigError("SOURCE", path, "a Parquet file", f"{error}. Fetch it again, or leave it out.") from None
            if columns and names != columns:
                raise ConfigError("SOURCE", path, f"the columns of {paths[0]}: {', '.join(columns)}", f"It has {', '.join(names)}.")
            columns = names
            for group, rows in enumerate(sizes):
                groups.append((index, group, total))
                total += rows
        return cls(tuple(paths), base, columns, tuple(groups), total)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """See `Table.rows`."""
        return self._select(start, stop, None)

    def captions(self, column: str) -> Iterator[Any]:
        """The cells of one column, without reading the pictures."""
        return (row.fields.get(column) for row in self._select(0, None, [column]))

    def _select(self, start: int, stop: int | None, columns: list[str] | None) -> Iterator[Row]:
        import pyarrow.parquet as pq

        stop = self.length if stop is None else min(stop, self.length)
        for number, (index, group, first) in enumerate(self.groups):
            end = self.groups[number + 1][2] if number + 1 < len(self.groups) else self.length
            if end <= start or first >= stop:
                continue
            name = self.paths[index].rpartition("/")[2]
            with folders.open_input(self.paths[index]) as raw:
                position = first
                for batch in pq.ParquetFile(raw, pre_buffer=False).iter_batches(64, row_groups=[group], columns=columns):
                    low, high = max(start - position, 0), min(stop - position, batch.num_rows)
                    for offset, fields in enumerate(batch.slice(low, max(high - low, 0)).to_pylist() if high > low else []):
                        yield checked(Row(f"{name}:{position + low + offset}", fields))
                    position += batch.num_rows


@dataclass(frozen=True)
class HubTable:
    """A Hugging Face data set: a folder written by `save_to_disk`, or a name on the hub (`org/name` or `org/name:config`)."""

    name: str
    split: str
    columns: tuple[str, ...]
    length: int
    base: str = ""
    indexed: bool = True

    @classmethod
    def open(cls, name: str, split: str) -> HubTable:
        """Load it once here, so that workers find it in the cache. Raises `ConfigError` if it cannot be loaded."""
        dataset, chosen = _load(name, split)
        return cls(name, chosen, tuple(dataset.column_names), len(dataset))

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """See `Table.rows`."""
        dataset, _ = _load(self.name, self.split)
        for index in range(start, min(self.length if stop is None else stop, self.length)):
            yield checked(Row(f"{self.name}[{index}]", dataset[index]))

    def captions(self, column: str) -> Iterator[Any]:
        """The cells of one column, without reading the pictures."""
        dataset, _ = _load(self.name, self.split)
        return (row[column] for row in dataset.select_columns([column]))


@functools.lru_cache(maxsize=2)
def _load(name: str, split: str) -> tuple[Any, str]:
    try:
        import datasets
    except ImportError:
        raise ConfigError("SOURCE", name, "a file or folder", "`pip install datasets` to read Hugging Face data sets.") from None
    config = ""
    try:
        if os.path.isdir(name):
            found = datasets.load_from_disk(name)
        else:
            path, _, config = name.partition(":")
            found = datasets.load_dataset(path, config or None)
    except Exception as error:  # The hub's client raises whatever its transport raises.
        remedy = "Check the path; a name on the hub needs network access."
        raise ConfigError("SOURCE", name, "a file, a folder, or a data set of the Hugging Face hub", f"{error} {remedy}") from None
    if isinstance(found, datasets.DatasetDict):
        split = split or ("train" if "train" in found else next(iter(found)))
        if split not in found:
            raise ConfigError("--split", split, ", ".join(found))
        found = found[split]
    for column, kind in found.features.items():
        if isinstance(kind, datasets.Image):
            # Encoded bytes, so that our own rules decode them and a bad picture is one fault.
            found = found.cast_column(column, datasets.Image(decode=False))
    return found, split
