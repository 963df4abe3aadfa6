"""Where every embedding belongs: keys of clip-retrieval's metadata, sorted on disk in bounded memory.

A key is the shard's digits followed by the sample's index digits, so its integer value is its *place*: shard × 10^width +
index. Places are spilled to buckets of neighbouring shards and each bucket is sorted on its own, so memory depends on
the size of a bucket and not on the number of embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

RECORD = np.dtype([("place", "<i8"), ("source", "<i8")])
"""One embedding: its place, and where it stands: partition × 2^40 + row."""

ROW_BITS = 40

BUCKET_ROWS = 400_000
"""Rows that a bucket of shards should hold; 16 bytes each are in memory at once."""

KEYS_PER_BATCH = 131_072
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
    data = np.frombuffer(strings.buffers()[2] or b"", np.uint8)
    lengths = np.diff(offsets)
    if strings.null_count:
        lengths = np.where(np.asarray(strings.is_valid().to_numpy(zero_copy_only=False)), lengths, 0)
    places, digits = np.full(len(strings), -1, np.int64), np.zeros(len(strings), np.int64)
    for length in np.flatnonzero(np.bincount(lengths, minlength=1)).tolist():
        if not 0 < length <= _MOST_DIGITS:
            continue
        chosen = slice(None) if lengths.min() == lengths.max() else np.flatnonzero(lengths == length)
        if isinstance(chosen, slice):  # the usual case needs no copy: the keys stand one after the other
            digit = data[offsets[0] : offsets[-1]].reshape(-1, length) - np.uint8(48)
        else:
            digit = data[offsets[chosen][:, None] + np.arange(length)] - np.uint8(48)
        # Bytes below "0" have wrapped around to large numbers.
        bad = (digit > 9).any(axis=1) if digit.max() > 9 else None
        value = np.zeros(len(digit), np.int64)
        for column in range(length):
            value *= 10
            value += digit[:, column]
        places[chosen], digits[chosen] = value, length
        if bad is not None:
            wrong = np.arange(len(places))[chosen][bad]
            places[wrong], digits[wrong] = -1, 0
    return places, digits


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
    """Places of all embeddings, spilled to `folder` and sorted per bucket of shards."""

    def __init__(self, folder: Path, shards: Sequence[ShardRows], width: int) -> None:
        self.folder, self.width = folder, width
        for shard in shards:
            index_width(shard.name, len(shard.name) + width)  # complains about names that are no integers
        self.shards = sorted(shards, key=lambda shard: shard.number)
        self.numbers = np.array([shard.number for shard in self.shards], np.int64)
        rows = np.array([shard.rows for shard in self.shards], np.int64)
        self._starts = self.numbers * 10**width
        self._stops = self._starts + rows
        if len(np.unique(self.numbers)) < len(self.numbers):
            raise ValueError("two tars have the same shard number, such as 00001.tar and 1.tar; DALLE2-pytorch could not tell them apart")
        self._name_lengths = np.array([len(shard.name) for shard in self.shards], np.int64)
        filled = np.cumsum(np.maximum(rows, 1)) // BUCKET_ROWS
        self._bucket_of_shard = np.searchsorted(np.unique(filled), filled)
        self.buckets = int(self._bucket_of_shard[-1]) + 1 if len(filled) else 0
        self.unplaced = Unplaced()
        folder.mkdir(parents=True, exist_ok=True)

    def add_partition(self, file: int, metadata: pq.ParquetFile, column: str) -> int:
        """Spill the keys of one partition's metadata; returns how many it has. What cannot be placed goes to `unplaced`."""
        row = 0
        with ThreadPoolExecutor(1) as pool:  # keys are placed while the next batch is decoded
            placing = None
            for batch in metadata.iter_batches(KEYS_PER_BATCH, columns=[column]):
                if placing is not None:
                    placing.result()
                placing = pool.submit(self._spill, file, row, batch.column(0))
                row += len(batch)
            if placing is not None:
                placing.result()
        return row

    def _spill(self, file: int, first_row: int, keys: pa.Array) -> None:
        places, digits = parse_places(keys)
        base = 10**self.width
        shard = self._shard_of(places // base)
        no_digits = places < 0
        no_shard = ~no_digits & ((self._starts[shard] > places) | (self._starts[shard] + base <= places))
        no_shard |= ~no_digits & (digits != self._name_lengths[shard] + self.width)
        no_row = ~no_digits & ~no_shard & (places >= self._stops[shard])
        rows = np.arange(first_row + (file << ROW_BITS), first_row + (file << ROW_BITS) + len(places))
        unplaced = no_digits | no_shard | no_row
        if unplaced.any():
            for reason, bad in (
                ("are not a shard's digits followed by an index", no_digits),
                ("name a shard that has no tar", no_shard),
                ("have an index beyond their shard's number of samples", no_row),
            ):
                self.unplaced.add(reason, np.flatnonzero(bad), lambda position: keys[position].as_py())
            places, shard, rows = places[~unplaced], shard[~unplaced], rows[~unplaced]
        bucket = self._bucket_of_shard[shard]
        records = np.empty(len(places), RECORD)
        records["place"], records["source"] = places, rows
        numbers = np.flatnonzero(np.bincount(bucket)).tolist()
        for number in numbers:
            with open(self._path(number), "ab") as stream:
                stream.write((records if len(numbers) == 1 else records[bucket == number]).tobytes())

    def _shard_of(self, numbers: np.ndarray) -> np.ndarray:
        """Position of the shard with this number, or of any other where there is none."""
        first, last = self.numbers[0], self.numbers[-1]
        if last - first + 1 == len(self.numbers):
            return np.clip(numbers - first, 0, len(self.numbers) - 1)
        return np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)

    def sort(self) -> int:
        """Sort every bucket, put keys that stand twice into `unplaced`, and return the number of placed embeddings."""
        total = 0
        for number in range(self.buckets):
            records = self._load(number)
            records = records[np.argsort(records["place"], kind="stable")]
            twice = records["place"][1:][np.diff(records["place"]) == 0]
            self.unplaced.add("stand more than once", twice, self.key_of)
            self._path(number).write_bytes(records.tobytes())
            total += len(records)
        return total

    def key_of(self, place: int) -> str:
        """The key at a place."""
        number, index = divmod(int(place), 10**self.width)
        shard = self.shards[int(np.searchsorted(self.numbers, number))]
        return f"{shard.name}{index:0{self.width}d}"

    def by_shard(self) -> Iterator[tuple[ShardRows, np.ndarray]]:
        """Every shard with its records (`RECORD` [n], by place), in the order of the shards; call `sort` before."""
        base = 10**self.width
        for number in range(self.buckets):
            records = self._load(number)
            members = np.flatnonzero(self._bucket_of_shard == number)
            starts = np.searchsorted(records["place"], self.numbers[members] * base)
            stops = np.searchsorted(records["place"], (self.numbers[members] + 1) * base)
            for member, start, stop in zip(members, starts, stops, strict=True):
                yield self.shards[member], records[start:stop]

    def _path(self, number: int) -> Path:
        return self.folder / f"bucket_{number:06d}.bin"

    def _load(self, number: int) -> np.ndarray:
        path = self._path(number)
        return np.fromfile(path, RECORD) if path.is_file() else np.empty(0, RECORD)
