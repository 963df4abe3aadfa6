"""clip-retrieval's layout of embeddings, written a partition at a time and resumable.

`img_emb/img_emb_{p}.npy`, `text_emb/text_emb_{p}.npy` (float16 [rows, D]) and `metadata/metadata_{p}.parquet` with `image_path`
(the sample's key), `caption` and `shard`, row for row. p is padded as clip-retrieval 2.45 pads it. The metadata comes last:
a partition is done once it is there. `embed.json` says what made the folder; another model or other data are refused.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diptych.batches import Fault
from diptych.config import ConfigError
from diptych.datasets import storage
from diptych.datasets.embeddings import PREFIXES

PROVENANCE = "embed.json"


@dataclass(frozen=True)
class Layout:
    """A folder of partitions over N samples."""

    folder: str
    samples: int
    partition_size: int

    @property
    def partitions(self) -> int:
        """How many there are."""
        return max(1, math.ceil(self.samples / self.partition_size))

    def span(self, partition: int) -> tuple[int, int]:
        """(start, stop) among the samples."""
        start = partition * self.partition_size
        return start, min(start + self.partition_size, self.samples)

    def path(self, what: str, partition: int) -> str:
        """File of a partition: `what` is `image`, `text`, `metadata` or `faults`."""
        number = str(partition).zfill(int(math.log10(self.partitions)) + 1)
        stem = PREFIXES.get(what, what)
        suffix = {"metadata": "parquet", "faults": "json"}.get(what, "npy")
        return storage.join(self.folder, stem, f"{stem}_{number}.{suffix}")

    def is_finished(self, partition: int) -> bool:
        """Whether the partition is whole."""
        return storage.exists(self.path("metadata", partition))

    def write(
        self, partition: int, vectors: Mapping[str, np.ndarray], rows: Mapping[str, Sequence[str | None]], faults: list[Fault]
    ) -> None:
        """Write one partition: `vectors` are float [rows, D] by modality, `rows` the metadata's columns, `faults` one per sample left out."""
        lengths = {len(column) for column in (*vectors.values(), *rows.values())}
        assert len(lengths) == 1, lengths
        for modality, found in vectors.items():
            storage.write_bytes(self.path(modality, partition), _npy(found.astype(np.float16)))
        storage.write_bytes(self.path("faults", partition), json.dumps([asdict(fault) for fault in faults]).encode())
        table = io.BytesIO()
        pq.write_table(pa.table({name: pa.array(column, pa.string()) for name, column in rows.items()}), table)
        storage.write_bytes(self.path("metadata", partition), table.getvalue())

    def read_outcome(self, partition: int) -> tuple[int, list[dict[str, Any]]]:
        """(rows, faults) of a finished partition."""
        faults = json.loads(storage.read_bytes(self.path("faults", partition)))
        start, stop = self.span(partition)
        return stop - start - len(faults), faults


def default_partition_size(samples: int) -> int:
    """A function of the data alone, so that a resumed call cuts alike: about 64 partitions, of 2,048 to 100,000 samples."""
    return min(max(math.ceil(samples / 64), 2048), 100_000)


def claim(folder: str, provenance: dict[str, Any], name: str = PROVENANCE, *, dry_run: bool = False) -> None:
    """Record what fills `folder` in its file `name`, or with `dry_run` only look.

    Raises `ConfigError` that names the difference if something else has begun it.
    """
    place = storage.join(folder, name)
    former = read_provenance(folder, name)
    if former is None:
        if storage.exists(storage.join(folder, "metadata")):
            raise ConfigError(
                "OUT", folder, "a new folder, or one that the same call began", "It holds partitions that this verb did not make."
            )
        if not dry_run:
            storage.write_bytes(place, json.dumps(provenance, indent=2).encode())
        return
    for key, value in provenance.items():
        if former.get(key) != value:
            remedy = f"It was begun with {key}={former.get(key)!r}, not {value!r}. Choose another folder."
            raise ConfigError("OUT", folder, "a new folder, or one that the same call began", remedy)


def read_provenance(folder: str, name: str = PROVENANCE) -> dict[str, Any] | None:
    """What `claim` recorded, or None. Raises `ConfigError` for a file that is damaged."""
    place = storage.join(folder, name)
    if not storage.exists(place):
        return None
    try:
        return json.loads(storage.read_bytes(place))
    except ValueError as error:
        raise ConfigError(name, place, f"JSON that says what made the folder ({error})", "Make it again in another folder.") from None


def _npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()
