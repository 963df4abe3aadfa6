"""Where every embedding belongs: keys of clip-retrieval's metadata, brought into order on disk in bounded memory.

A key is the shard's digits followed by the sample's index digits, so its integer value is its *place*: shard × 10^width +
index. Places are spilled to buckets of neighbouring shards and each bucket is put in order on its own, so memory depends on
the size of a bucket and not on the number of embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

RECORD = np.dtype([("row", "<i8"), ("source", "<i8")])
"""One embedding: its row among those of its bucket, and where it stands: partition × 2^40 + row."""

ROW_BITS = 40
NOWHERE = -1
"""The source of a row without an embedding."""

BUCKET_ROWS = 1 << 17
"""Rows that a bucket of shards should hold; 8 bytes each are in memory at once."""

KEYS_PER_BATCH = 1 << 15
"""Keys that are placed at once, so few that what is computed from them stays in the processor's cache."""
SPILL_ROWS = 1 << 17
"""Records that wait in memory, to be spilled together."""
_ZERO = ord("0")
_MOST_DIGITS = 18  # 10^18 is below 2^63
_EXAMPLES = 5


@dataclass(frozen=True)
class ShardRows:
    """A shard as its embedding file sees it."""

    name: str
    """Name of the tar without `.tar`; all digits."""
    rows: int
    """Samples the shard was made of, failed downloads included = rows of its embedding file."""

    @property
    def number(self) -> int:
        """The shard as an integer, as DALLE2-pytorch reads it."""
        return int(self.name)


@dataclass
class Unplaced:
    """What cannot be placed: how often, and the first few keys, per reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: np.ndarray, key_at: Callable[[int], object]) -> None:
        """Count `where` under `reason`; `key_at` gives the key of one of its elements."""
        if len(where):
            self.counts[reason] = self.counts.get(reason, 0) + len(where)
            kept = self.examples.setdefault(reason, [])
            kept.extend(repr(key_at(int(position))) for position in where[: _EXAMPLES - len(kept)])

    def message(self) -> str:
        """One line per reason."""
        return "; ".join(f"{count} keys {reason}, such as {', '.join(self.examples[reason])}" for reason, count in self.counts.items())


def parse_places(keys: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Places of keys: (int64 [N], length in digits [N]); -1 and 0 where a key is not all digits, is null or too long."""
    strings = keys.cast(pa.string()) if not pa.types.is_string(keys.type) else keys
    offsets = np.frombuffer(strings.buffers()[1], np.int32, len(strings) + 1, strings.offset * 4)
    text = np.frombuffer(strings.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    digits = np.diff(offsets)
    shortest, longest = digits.min(initial=_MOST_DIGITS), digits.max(initial=1)
    if (
        strings.null_count
        or shortest < 1
        or longest > _MOST_DIGITS
        or text.min(initial=_ZERO) < _ZERO
        or text.max(initial=_ZERO) > _ZERO + 9
    ):
        usable = pc.match_substring_regex(strings, f"^[0-9]{{1,{_MOST_DIGITS}}}$").fill_null(False)
        strings = pc.if_else(usable, strings, "-1")
        digits = np.where(usable.to_numpy(zero_copy_only=False), digits, 0)
    places = strings.cast(pa.int64())
    return np.frombuffer(places.buffers()[1], np.int64, len(places), 8 * places.offset), digits


def index_width(shard_name: str, key_length: int) -> int:
    """Index digits of a key of `key_length` digits whose tar is named `shard_name`; raises `ValueError` where there are none.

    img2dataset pads a shard's name to five digits and lets it grow beyond, the key with it, so a key is measured against its own tar.
    """
    if not shard_name.isascii() or not shard_name.isdigit():
        raise ValueError(
            f"the tar {shard_name!r} is not named by an integer: DALLE2-pytorch reads the shard's number from the name. "
            "Pack or ingest the data again into numbered tars."
        )
    width = key_length - len(shard_name)
    if width < 1:
        raise ValueError(
            f"keys have {key_length} digits and their tar {shard_name} has {len(shard_name)}: no index digits are left. DALLE2-pytorch "
            "takes the row from the last digits of the key, so pack more than one sample per shard."
        )
    return width


class PlaceIndex:
    """Where the embedding of every row of every shard stands, spilled to `folder` and brought into order per bucket of shards."""

    def __init__(self, folder: Path, shards: Sequence[ShardRows], width: int) -> None:
        self.folder, self.width = folder, width
        for shard in shards:
            index_width(shard.name, len(shard.name) + width)  # complains about names that are no integers
        self.shards = sorted(shards, key=lambda shard: shard.number)
        self.numbers = np.array([shard.number for shard in self.shards], np.int64)
        if len(np.unique(self.numbers)) < len(self.numbers):
            raise ValueError("two tars have the same shard number, such as 00001.tar and 1.tar; DALLE2-pytorch could not tell them apart")
        rows = np.array([shard.rows for shard in self.shards], np.int64)
        self._starts = self.numbers * 10**width
        self._stops = self._starts + rows
        self._key_lengths = np.array([len(shard.name) + width for shard in self.shards], np.int64)
        filled = np.cumsum(np.maximum(rows, 1)) // BUCKET_ROWS
        self._bucket_of_shard = np.searchsorted(np.unique(filled), filled)
        self.buckets = int(self._bucket_of_shard[-1]) + 1 if len(filled) else 0
        self._first_shards = np.searchsorted(self._bucket_of_shard, np.arange(self.buckets + 1))
        starts = np.concatenate(([0], np.cumsum(rows)))
        self._bucket_rows = np.diff(starts[self._first_shards])
        self._offsets = starts[:-1] - starts[self._first_shards][self._bucket_of_shard]
        self._pending: dict[int, list[np.ndarray]] = {}
        self._pending_rows = 0
        self.unplaced = Unplaced()
        folder.mkdir(parents=True, exist_ok=True)

    def add_partition(self, file: int, metadata: pq.ParquetFile, column: str) -> None:
        """Take in the keys of one partition's metadata. What cannot be placed goes to `unplaced`."""
        row = 0
        with ThreadPoolExecutor(1) as pool:  # keys are placed while the next batch is decoded
            placing = None
            for batch in metadata.iter_batches(KEYS_PER_BATCH, columns=[column], use_threads=False):
                if placing is not None:
                    placing.result()
                placing = pool.submit(self._place, (file << ROW_BITS) + row, batch.column(0))
                row += len(batch)
            if placing is not None:
                placing.result()

    def _place(self, first_source: int, keys: pa.Array) -> None:
        places, digits = parse_places(keys)
        shard = self._shard_of(places // 10**self.width)
        placed = (places >= self._starts[shard]) & (places < self._stops[shard]) & (digits == self._key_lengths[shard])
        records = np.empty(len(places), RECORD)
        np.add(places, (self._offsets - self._starts)[shard], out=records["row"])
        records["source"] = np.arange(first_source, first_source + len(places))
        if not placed.all():
            self._refuse(places, digits, shard, keys)
            records, shard = records[placed], shard[placed]
        if len(records) == 0:
            return
        first, last = self._bucket_of_shard[[shard.min(), shard.max()]].tolist()
        if first == last:
            self._pending.setdefault(first, []).append(records)
        else:
            bucket = self._bucket_of_shard[shard]
            for number in np.flatnonzero(np.bincount(bucket)).tolist():
                self._pending.setdefault(number, []).append(records[bucket == number])
        self._pending_rows += len(records)
        if self._pending_rows >= SPILL_ROWS:
            self._spill()

    def _refuse(self, places: np.ndarray, digits: np.ndarray, shard: np.ndarray, keys: pa.Array) -> None:
        """Count what cannot be placed under its reason."""
        no_digits = places < 0
        no_shard = (places < self._starts[shard]) | (places >= self._starts[shard] + 10**self.width) | (digits != self._key_lengths[shard])
        no_row = places >= self._stops[shard]
        for reason, bad in (
            ("are not a shard's digits followed by an index", no_digits),
            ("name a shard that has no tar", no_shard & ~no_digits),
            ("have an index beyond their shard's number of samples", no_row & ~no_shard & ~no_digits),
        ):
            self.unplaced.add(reason, np.flatnonzero(bad), lambda position: keys[position].as_py())

    def _spill(self) -> None:
        for number, parts in self._pending.items():
            with open(self._path(number), "ab") as stream:
                for records in parts:
                    records.tofile(stream)
        self._pending.clear()
        self._pending_rows = 0

    def _shard_of(self, numbers: np.ndarray) -> np.ndarray:
        """Position of the shard with this number, or of any other where there is none."""
        first, last = self.numbers[0], self.numbers[-1]
        if last - first + 1 == len(self.numbers):
            return np.clip(numbers - first, 0, len(self.numbers) - 1)
        return np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)

    def sort(self) -> None:
        """Bring every bucket into the order of its rows; keys that stand twice go to `unplaced`."""
        for number in range(self.buckets):
            # A bucket has a known number of rows, so every record has its place without a comparison.
            sources, records = np.full(self._bucket_rows[number], NOWHERE), 0
            for part in self._records(number):
                sources[part["row"]] = part["source"]
                records += len(part)
            if np.count_nonzero(sources != NOWHERE) < records:
                rows = np.sort(np.concatenate([part["row"] for part in self._records(number)]))
                self.unplaced.add("stand more than once", rows[1:][np.diff(rows) == 0], functools.partial(self._key_of, number))
            self._pending.pop(number, None)
            sources.tofile(self._path(number))

    def _key_of(self, bucket: int, row: int) -> str:
        first, end = self._first_shards[bucket : bucket + 2]
        position = first + int(np.searchsorted(self._offsets[first:end], row, side="right")) - 1
        return f"{self.shards[position].name}{row - self._offsets[position]:0{self.width}d}"

    def by_shard(self) -> Iterator[tuple[ShardRows, np.ndarray]]:
        """Every shard with the source of each of its rows (int64 [rows], `NOWHERE` for gaps), in the order of the shards; call `sort` before."""
        for number in range(self.buckets):
            sources = np.fromfile(self._path(number), np.int64)
            for position in range(*self._first_shards[number : number + 2].tolist()):
                start = self._offsets[position]
                yield self.shards[position], sources[start : start + self.shards[position].rows]

    def _path(self, number: int) -> Path:
        return self.folder / f"bucket_{number:06d}.bin"

    def _records(self, number: int) -> Iterator[np.ndarray]:
        """Those of a bucket, a bounded number at a time."""
        path = self._path(number)
        if path.is_file():
            with path.open("rb") as stream:
                while len(records := np.fromfile(stream, RECORD, SPILL_ROWS)):
                    yield records
        yield from self._pending.get(number, [])
