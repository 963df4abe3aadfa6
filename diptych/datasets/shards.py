"""Writes webdataset tars in img2dataset's layout and by its key rules, atomically.

Per shard: `00000.tar` with `<key>.<extension>` members, `00000.parquet` with a row per sample (failed ones stand only
there), and `00000_stats.json`, which comes last: a shard is done once it exists. The tar and the Parquet get their
names only when they are whole and on the disk, so that a killed writer leaves nothing that looks like a shard.

A sample is a mapping from extension to content: `{"jpg": bytes, "txt": str, "json": {"url": …}}`. Text is encoded as
UTF-8; a `json` mapping gives the columns of the Parquet row too. `status` (`success` if left out, `failed_to_download`,
`failed_to_resize`) and `error_message` are not members: a failed sample stands only in the Parquet.

A key is the shard's number in five digits, then the index in ceil(log10(samples_per_shard)) digits: a failed sample
leaves a gap. Source: img2dataset 1.47, `downloader.compute_key`.
"""

from __future__ import annotations

import glob
import itertools
import json
import math
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.config import ConfigError
from diptych.datasets import storage
from diptych.datasets.image_size import image_size
from diptych.datasets.survey import IMAGE_EXTENSIONS

SHARD_DIGITS = 5
Sample = Mapping[str, Any]
STATUSES = ("success", "failed_to_download", "failed_to_resize")


@dataclass(frozen=True)
class ShardResult:
    """What was written."""

    url: str
    samples: int
    failed: int


def shard_name(shard: int, digits: int = SHARD_DIGITS) -> str:
    """`00012`."""
    return f"{shard:0{digits}d}"


def index_digits(samples_per_shard: int) -> int:
    """Digits of the index in a key: 10000 → 4, 1000 → 3, 100 → 2, 10 → 1, 1 → 0."""
    if samples_per_shard < 1:
        raise ConfigError("samples_per_shard", samples_per_shard, "1 or more")
    return math.ceil(math.log10(samples_per_shard))


def sample_key(shard: int, index: int, samples_per_shard: int, digits: int = SHARD_DIGITS) -> str:
    """The key of sample `index` of a shard."""
    assert 0 <= index < samples_per_shard, (index, samples_per_shard)
    width = index_digits(samples_per_shard)
    return f"{shard * 10**width + index:0{width + digits}d}"


class ShardWriter:
    """Writes shards of one folder. It has no state: several processes may write different shards of a folder."""

    def __init__(self, folder: str, samples_per_shard: int = 10_000, digits: int = SHARD_DIGITS) -> None:
        index_digits(samples_per_shard)  # complains early
        self.folder, self.samples_per_shard, self.digits = folder, samples_per_shard, digits

    def is_finished(self, shard: int) -> bool:
        """Whether the shard is whole, so that a resumed call can pass it over."""
        target = storage.join(self.folder, shard_name(shard, self.digits))
        return storage.exists(f"{target}_stats.json") and storage.exists(f"{target}.tar")

    def write_shard(self, shard: int, samples: Iterable[Sample]) -> ShardResult:
        """Write one whole shard and put it in place; an older one is replaced.

        `samples` come in the order of their index, failed ones included, at most `samples_per_shard`. Memory holds one
        sample at a time. Raises `ValueError` on an unknown status, or an extension that readers would not give back.
        """
        with _OpenShard(self.folder, shard, self.samples_per_shard, self.digits) as open_shard:
            for sample in samples:
                open_shard.add(sample)
            return open_shard.finish()

    def write_all(self, samples: Iterable[Sample], first_shard: int = 0) -> list[ShardResult]:
        """Cut a stream of samples into shards of `samples_per_shard` and write them one after the other."""
        stream = iter(samples)
        results: list[ShardResult] = []
        for shard in itertools.count(first_shard):
            first = next(stream, None)
            if first is None:
                return results
            part = itertools.chain([first], itertools.islice(stream, self.samples_per_shard - 1))
            results.append(self.write_shard(shard, part))
        raise AssertionError("unreachable")


class _OpenShard:
    def __init__(self, folder: str, shard: int, samples_per_shard: int, digits: int) -> None:
        self.folder, self.shard, self.samples_per_shard, self.digits = folder, shard, samples_per_shard, digits
        self.name = shard_name(shard, digits)
        self.count = 0
        self._started = time.time()
        self._tally: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._rows: list[dict[str, Any]] = []
        self._remote = not storage.is_local(folder)
        local = tempfile.mkdtemp(prefix="diptych-shard-") if self._remote else storage.local_path(folder)
        os.makedirs(local, exist_ok=True)
        for left_over in glob.glob(os.path.join(glob.escape(local), f".{self.name}.tar.*.tmp")):
            os.unlink(left_over)  # of a writer that was killed
        self._temporary = storage.temporary_path(os.path.join(local, f"{self.name}.tar"))
        self._file: IO[bytes] = open(self._temporary, "xb")  # noqa: SIM115
        # Old GNU headers need no extended header for short names: half the blocks of img2dataset's own PAX tars.
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def __enter__(self) -> _OpenShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def add(self, sample: Sample) -> None:
        if self.count >= self.samples_per_shard:
            raise ValueError(f"shard {self.name} is full: it takes {self.samples_per_shard} samples")
        status, error = sample.get("status", "success"), sample.get("error_message")
        if status not in STATUSES:
            raise ValueError(f"status {status!r}; allowed: {', '.join(STATUSES)}")
        key = sample_key(self.shard, self.count, self.samples_per_shard, self.digits)
        members = {extension: value for extension, value in sample.items() if extension not in ("status", "error_message")}
        row = _row(members) | {"key": key, "status": status, "error_message": error}
        if status == "success":
            if not isinstance(members.get("json"), bytes):
                members["json"] = json.dumps(row, indent=4, ensure_ascii=False, default=str)
            for extension, value in members.items():
                self._member(key, extension, value.encode() if isinstance(value, str) else value)
        self.count += 1
        self._tally[status] += 1
        self._errors[error or status] += 1
        self._rows.append(row)

    def finish(self) -> ShardResult:
        """Close the tar and put the three files in place: the tar after its Parquet, the statistics last."""
        self._tar.close()
        self._file.close()
        target = storage.join(self.folder, self.name)
        stats_url = f"{target}_stats.json"
        # While an older shard is replaced, it must not count as done.
        if storage.exists(stats_url):
            storage.remove(stats_url)
        table = BytesIO()
        pq.write_table(_rows_table(self._rows), table)
        storage.write_bytes(f"{target}.parquet", table.getvalue())
        if self._remote:
            storage.upload(self._temporary, f"{target}.tar")
        else:
            storage.replace_file(self._temporary, storage.local_path(f"{target}.tar"))
        ended = time.time()
        stats = {
            "count": self.count,
            "successes": self._tally["success"],
            "failed_to_download": self._tally["failed_to_download"],
            "failed_to_resize": self._tally["failed_to_resize"],
            "duration": ended - self._started,
            "start_time": self._started,
            "end_time": ended,
            "status_dict": dict(self._errors.most_common(100)),
        }
        storage.write_bytes(stats_url, json.dumps(stats, indent=4).encode())
        return ShardResult(f"{target}.tar", self._tally["success"], self.count - self._tally["success"])

    def discard(self) -> None:
        """Leave nothing of an unfinished shard; nothing to do after `finish`."""
        if not self._file.closed:
            self._file.close()
        if os.path.exists(self._temporary):
            os.unlink(self._temporary)
        if self._remote:
            os.rmdir(os.path.dirname(self._temporary))

    def _member(self, key: str, extension: str, data: bytes) -> None:
        if not extension or set("./") & set(extension) or extension != extension.lower():
            raise ValueError(f"extension {extension!r}; allowed: lower case without dots, so that every reader finds the same key")
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size, info.mode = len(data), 0o444  # no time stamp: the same samples give the same bytes
        info.uname = info.gname = "bigdata"
        self._tar.addfile(info, BytesIO(data))


def _row(members: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that stand in the Parquet and in the `json` member."""
    row = dict(members["json"]) if isinstance(members.get("json"), Mapping) else {}
    if "txt" in members:
        text = members["txt"]
        row.setdefault("caption", text if isinstance(text, str) else text.decode())
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    size = image_size(image) if image is not None else None
    if size:
        row = row | {name: row.get(name) or pixels for name, pixels in zip(("width", "height"), size, strict=True)}
    return row


def _rows_table(rows: list[dict[str, Any]]) -> pa.Table:
    """The Parquet rows, with every column that any sample has; values of mixed types become text."""
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["key", "status", "error_message"]
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array(
                [value if value is None or isinstance(value, str) else json.dumps(value, default=str) for value in values]
            )
    for name in ("key", "status", "error_message"):
        columns[name] = columns[name].cast(pa.string())
    return pa.table(columns)
