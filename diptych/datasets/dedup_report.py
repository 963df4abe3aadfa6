"""`dedup` as a whole: embeddings in, a keep-list, the groups and a contact sheet of pairs out."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diptych.config import ConfigError
from diptych.datasets import contact_sheet, dedup, folders, keep, storage
from diptych.datasets.embeddings import EmbeddingJoin
from diptych.datasets.manifest import Manifest

On = Literal["image", "text", "both"]
PAIRS_SHOWN = 60
_READ_ROWS = 1 << 15

GROUP_SCHEMA = pa.schema(
    [
        ("group", pa.int64()),
        ("row", pa.int64()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("kept", pa.bool_()),
        ("similarity", pa.float32()),
    ]
)
"""`similarity` is to the sample that is kept; with `both`, the smaller of the two."""


@dataclass(frozen=True)
class Settings:
    """How near is near, and how hard to look."""

    on: On = "image"
    threshold: float = 0.95
    clusters: int = 0
    """SemDeDup: this many k-means clusters; 0 = every near pair, wherever it lies."""
    probes: int = 6
    """Cells that each vector joins above `dedup.EXACT_ROWS`."""
    exact: bool = False
    """Compare all pairs, however many."""
    seed: int = 0

    def check(self) -> None:
        """Raise `ConfigError` for values that mean nothing."""
        if self.on not in ("image", "text", "both"):
            raise ConfigError("--on", self.on, "image, text, both")
        if not 0 < self.threshold <= 1:
            raise ConfigError("--threshold", self.threshold, "a cosine above 0 and at most 1")
        for name, least in (("clusters", 0), ("probes", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name}", getattr(self, name), f"{least} or more")


def find_duplicates(
    manifest: Manifest, join: EmbeddingJoin, settings: Settings, scratch: Path, advance: Callable[[int], None] = lambda _cells: None
) -> tuple[np.ndarray, dedup.Pairs, dict[str, Any]]:
    """(int64 [N]: the row that stays for each row, near pairs, facts for the summary)."""
    settings.check()
    first: Literal["image", "text"] = "text" if settings.on == "text" else "image"
    vectors = load_vectors(join, first, manifest.samples, scratch / "first.npy")
    usable = len(vectors.rows)
    cells, method = None, "exact"
    if settings.clusters and usable:
        cells, method = dedup.build_cells(vectors, settings.clusters, 1, settings.seed), "semdedup"
    elif usable > dedup.EXACT_ROWS and not settings.exact:
        cells, method = dedup.build_cells(vectors, dedup.plan(usable, settings.probes), settings.probes, settings.seed), "ivf"
    pairs = dedup.near_pairs(vectors, settings.threshold, cells, advance)
    facts: dict[str, Any] = {"method": method, "cells": len(cells) if cells else 1, "usable": usable}
    if method == "ivf":
        facts["recall"] = dedup.estimate_recall(vectors, pairs, settings.threshold, seed=settings.seed)
    if settings.on == "both":
        text = load_vectors(join, "text", manifest.samples, scratch / "second.npy")
        cosine = text.cosine(pairs.a, pairs.b)
        near = (cosine >= settings.threshold) & text.usable[pairs.a] & text.usable[pairs.b]
        smaller = np.minimum(pairs.similarity, cosine).astype(np.float32)
        pairs = dedup.Pairs(pairs.a[near], pairs.b[near], smaller[near])
    # SemDeDup keeps the sample that is farthest from the centroid: the least typical one.
    preference = np.argsort(cells.to_centroid, kind="stable") if settings.clusters and cells else largest_first(manifest)
    return dedup.representatives(pairs, preference), pairs, facts


def load_vectors(join: EmbeddingJoin, which: str, samples: int, path: Path) -> dedup.Vectors:
    """The embeddings of all rows as unit vectors in a memory-mapped file."""
    units = np.lib.format.open_memmap(path, "w+", np.float32, (samples, join.dim(which)))
    usable = np.empty(samples, bool)
    for start in range(0, samples, _READ_ROWS):
        rows = np.arange(start, min(start + _READ_ROWS, samples))
        found, _ = join.read(rows, which)
        part = dedup.Vectors.of(found)
        units[rows[0] : rows[-1] + 1], usable[rows] = part.units, part.usable
    return dedup.Vectors(units, usable)


def largest_first(manifest: Manifest) -> np.ndarray:
    """int64 [N]: rows from the picture with the most pixels to the one with the fewest; equal ones in the manifest's order."""
    pixels = np.asarray(manifest.column("width"), np.int64) * np.asarray(manifest.column("height"), np.int64)
    return np.argsort(-pixels, kind="stable")


def write_results(out: str, manifest: Manifest, kept_for: np.ndarray, pairs: dedup.Pairs, title: str) -> None:
    """Write `keep.parquet`, `groups.parquet` and `pairs.html` into `out`."""
    folders.make_folder(out)
    stays = np.flatnonzero(kept_for == np.arange(len(kept_for)))
    storage.write_bytes(storage.join(out, "groups.parquet"), _groups(manifest, kept_for, pairs))
    storage.write_bytes(storage.join(out, "pairs.html"), _pair_sheet(manifest, pairs, kept_for, title))
    keep.write_keep(storage.join(out, "keep.parquet"), manifest, stays)


def _groups(manifest: Manifest, kept_for: np.ndarray, pairs: dedup.Pairs) -> bytes:
    """Every group of two or more: the one that stays first, then the others by similarity to it."""
    dropped = np.flatnonzero(kept_for != np.arange(len(kept_for)))
    kept = kept_for[dropped]
    places = np.searchsorted(
        _code(pairs.a, pairs.b, len(kept_for)), _code(np.minimum(kept, dropped), np.maximum(kept, dropped), len(kept_for))
    )
    leaders = np.unique(kept)
    group = np.concatenate([np.arange(len(leaders)), np.searchsorted(leaders, kept)])
    rows = np.concatenate([leaders, dropped])
    similarity = np.concatenate([np.ones(len(leaders), np.float32), pairs.similarity[places] if len(dropped) else np.empty(0, np.float32)])
    stays = np.concatenate([np.ones(len(leaders), bool), np.zeros(len(dropped), bool)])
    order = np.lexsort((rows, -similarity, ~stays, group))
    names = manifest.rows(rows[order], ["shard", "key"])
    shards = pa.array(manifest.shard_names, pa.string()).take(names["shard"].combine_chunks())
    columns = [group[order], rows[order], shards, names["key"], stays[order], similarity[order]]
    stream = io.BytesIO()
    pq.write_table(pa.table(columns, schema=GROUP_SCHEMA), stream, compression="zstd")
    return stream.getvalue()


def _code(a: np.ndarray, b: np.ndarray, rows: int) -> np.ndarray:
    return a * max(rows, 1) + b


def _pair_sheet(manifest: Manifest, pairs: dedup.Pairs, kept_for: np.ndarray, title: str) -> bytes:
    """Pairs from the least to the most similar, evenly chosen: the doubtful ones come first."""
    order = np.argsort(pairs.similarity, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), PAIRS_SHOWN)).astype(np.int64))] if len(order) else order
    ends: Sequence[np.ndarray] = (pairs.a[shown], pairs.b[shown])
    figures = contact_sheet.thumbnails(manifest, np.concatenate(ends)) if len(shown) else []
    html = []
    for index, place in enumerate(shown.tolist()):
        left, right = (
            figures[index + side * len(shown)].html("kept" if kept_for[rows[index]] == rows[index] else "dropped")
            for side, rows in enumerate(ends)
        )
        html.append(contact_sheet.pair(left, right, f"cosine {pairs.similarity[place]:.4f}"))
    intro = f"<p>{len(pairs.a):,} near-duplicate pairs; {len(shown)} of them from the least to the most similar.</p>"
    return contact_sheet.page(title, [("", intro + "".join(html))])
