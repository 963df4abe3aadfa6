"""Near-duplicates: every pair of vectors whose cosine reaches a threshold, and which sample of a group stays.

Up to `EXACT_ROWS` vectors all pairs are compared. Above, an inverted file (faiss k-means and search): each vector joins the
`probes` cells whose centroids are nearest, and vectors that share a cell are compared by matrix products. Joining several
cells on both sides finds far more than one probe does, and a product over a cell is many times faster than scanning
lists. Every pair is computed again in float64, so none below the threshold is returned; `estimate_recall` measures
what is missed. With `clusters` it is SemDeDup (Abbas et al. 2023): k-means clusters, one cell each.

The stated rule: samples are visited in order of preference, and one stays unless a near-duplicate of it stays already.
So every sample that is dropped has a near-duplicate that is kept, and no two that are kept are near-duplicates.

Shape legend: N vectors, D dimensions, P pairs, C cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from diptych.config import ConfigError

EXACT_ROWS = 20_000
"""Vectors up to which all pairs are compared."""
MOST_PAIRS = 100_000_000
"""Pairs that are held at once, 12 bytes each, and again while they are sorted."""
_BLOCK = 512
_MARGIN = 2e-5  # float32 sums of products of unit vectors err by less
_POINTS_PER_CELL, _ITERATIONS = 20, 3


@dataclass(frozen=True)
class Vectors:
    """Embeddings at length 1."""

    units: np.ndarray
    """float32 [N, D]; may be memory-mapped. Zeros where there is no usable vector."""
    usable: np.ndarray
    """bool [N]; False = missing, zero or not finite: such a sample is nobody's duplicate."""

    @classmethod
    def of(cls, array: np.ndarray, units: np.ndarray | None = None) -> Vectors:
        """Normalise float [N, D], into `units` if given (which may be `array` itself)."""
        units = np.empty(array.shape, np.float32) if units is None else units
        usable = np.empty(len(array), bool)
        for start in range(0, len(array), 1 << 16):
            part = np.asarray(array[start : start + (1 << 16)], np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                norms = np.sqrt(np.einsum("nd,nd->n", part, part, dtype=np.float64))
            good = np.isfinite(norms) & (norms > 0)
            units[start : start + len(part)] = np.where(good[:, None], part, 0) / np.where(good, norms, 1)[:, None]
            usable[start : start + len(part)] = good
        return cls(units, usable)

    @property
    def rows(self) -> np.ndarray:
        """int64: rows with a usable vector."""
        return np.flatnonzero(self.usable)

    def cosine(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """float64 [n]: cosines of the rows a[i] and b[i], computed in float64."""
        found = np.empty(len(a), np.float64)
        for start in range(0, len(a), 1 << 14):
            part = slice(start, start + (1 << 14))
            left, right = self.units[a[part]].astype(np.float64), self.units[b[part]].astype(np.float64)
            norms = np.sqrt((left * left).sum(axis=1) * (right * right).sum(axis=1))
            found[part] = (left * right).sum(axis=1) / np.where(norms == 0, 1, norms)
        return found


@dataclass(frozen=True)
class Pairs:
    """Near-duplicates, each pair once, sorted by (a, b)."""

    a: np.ndarray
    """int64 [P], smaller row."""
    b: np.ndarray
    """int64 [P], larger row."""
    similarity: np.ndarray
    """float32 [P]; at or above the threshold in float64."""


@dataclass(frozen=True)
class Cells:
    """The inverted file: members of every cell."""

    order: np.ndarray
    """int64 [N × probes]: rows sorted by cell."""
    starts: np.ndarray
    """int64 [C + 1]."""
    to_centroid: np.ndarray
    """float32 [N]: cosine to the nearest centroid."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def members(self, cell: int) -> np.ndarray:
        """Rows of one cell, sorted."""
        return np.sort(self.order[self.starts[cell] : self.starts[cell + 1]])


def plan(rows: int, probes: int) -> int:
    """Cells that make the two costs equal: N·C·2D for finding the cells and probes²·N²/C·D for comparing inside them."""
    return max(1, round(probes * math.sqrt(rows / 2)))


def build_cells(vectors: Vectors, cells: int, probes: int, seed: int = 0) -> Cells:
    """k-means of a sample, then the nearest `probes` of `cells` centroids for every vector; on the GPUs that faiss sees."""
    import faiss

    usable = vectors.rows
    random = np.random.default_rng(seed)
    cells = min(cells, max(1, len(usable)))
    probes = min(probes, cells)
    sample = np.sort(random.choice(usable, min(len(usable), cells * _POINTS_PER_CELL), replace=False))
    dim = vectors.units.shape[1]
    means = faiss.Kmeans(
        dim, cells, niter=_ITERATIONS, spherical=True, seed=seed + 1, max_points_per_centroid=_POINTS_PER_CELL,
        min_points_per_centroid=1, gpu=gpus() > 0,
    )  # fmt: skip
    means.train(vectors.units[sample])
    index = on_gpus(faiss.IndexFlatIP(dim))
    index.add(means.centroids)
    nearest, to_centroid = np.empty((len(usable), probes), np.int32), np.zeros(len(vectors.usable), np.float32)
    for start in range(0, len(usable), 1 << 15):
        rows = usable[start : start + (1 << 15)]
        cosine, found = index.search(vectors.units[rows], probes)
        nearest[start : start + len(rows)], to_centroid[rows] = found, cosine[:, 0]
    flat = nearest.reshape(-1)
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], np.arange(cells + 1))
    return Cells(usable[order // probes], starts.astype(np.int64), to_centroid)


def gpus() -> int:
    """How many GPUs faiss sees; its build for CPUs sees none."""
    import faiss

    return int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0


def on_gpus(index: Any) -> Any:
    """A faiss `index` on all GPUs that faiss sees, or itself where there are none."""
    import faiss

    return faiss.index_cpu_to_all_gpus(index) if gpus() else index


def near_pairs(vectors: Vectors, threshold: float, cells: Cells | None, advance: Callable[[int], None] = lambda _cells: None) -> Pairs:
    """Every pair with a cosine of at least `threshold` among the members of each cell; of all vectors if `cells` is None.

    Raises `ConfigError` if there are more than `MOST_PAIRS`.
    """
    if not 0 < threshold <= 1:
        raise ConfigError("--threshold", threshold, "a cosine above 0 and at most 1")
    rows = len(vectors.usable)
    held = _Held(threshold, rows)
    for number in range(len(cells) if cells else 1):
        members = cells.members(number) if cells else vectors.rows
        for a, b, cosine in _within(vectors, members, threshold - _MARGIN):
            held.add(a, b, cosine)
        advance(1)
    pairs, similarity = held.unique()
    a, b = pairs // max(rows, 1), pairs % max(rows, 1)
    # Only what float32 cannot tell from the threshold is computed again. A vector and its copy differ by rounding alone.
    doubtful = np.flatnonzero(similarity < threshold + _MARGIN)
    exact = vectors.cosine(a[doubtful], b[doubtful])
    similarity[doubtful] = exact
    true = np.ones(len(pairs), bool)
    true[doubtful[exact < threshold - 1e-12]] = False
    return Pairs(a[true], b[true], similarity[true])


class _Held:
    """Pairs found so far, a pair of two cells once."""

    def __init__(self, threshold: float, rows: int) -> None:
        self._threshold, self._rows, self._count = threshold, rows, 0
        self._codes: list[np.ndarray] = []
        self._cosines: list[np.ndarray] = []

    def add(self, a: np.ndarray, b: np.ndarray, cosine: np.ndarray) -> None:
        self._codes.append(a * self._rows + b)
        self._cosines.append(cosine)
        self._count += len(a)
        if self._count > MOST_PAIRS:
            codes, cosines = self.unique()
            self._codes, self._cosines, self._count = [codes], [cosines], len(codes)
            if self._count > MOST_PAIRS // 2:
                raise ConfigError("--threshold", self._threshold, f"a threshold with at most {MOST_PAIRS // 2:,} pairs", "Raise it.")

    def unique(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._codes:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        codes, cosines = np.concatenate(self._codes), np.concatenate(self._cosines)
        order = np.argsort(codes, kind="stable")
        codes, cosines = codes[order], cosines[order]
        first = np.concatenate(([True], codes[1:] != codes[:-1]))
        return codes[first], cosines[first]


def _within(vectors: Vectors, members: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs (a < b) of the sorted `members` above `threshold` in float32, with their cosines."""
    units = vectors.units[members]
    for start in range(0, len(members), _BLOCK):
        for other in range(start, len(members), 16 * _BLOCK):
            cosine = units[start : start + _BLOCK] @ units[other : other + 16 * _BLOCK].T
            found = np.flatnonzero(cosine >= threshold)
            left, right = np.divmod(found, cosine.shape[1])
            upper = left + start < right + other
            if upper.any():
                yield members[left[upper] + start], members[right[upper] + other], cosine.reshape(-1)[found[upper]]


def _unique(values: np.ndarray) -> np.ndarray:
    values = np.sort(values)
    return values[np.concatenate(([True], values[1:] != values[:-1]))] if len(values) else values


def representatives(pairs: Pairs, preference: np.ndarray) -> np.ndarray:
    """int64 [N]: for each sample the one that stays for it; itself if it stays.

    `preference` is int64 [N], a permutation: the rows in the order in which they are visited.
    """
    rows = len(preference)
    kept_for = np.arange(rows)
    if not len(pairs.a):
        return kept_for
    rank = np.empty(rows, np.int64)
    rank[preference] = np.arange(rows)
    # Neighbours above a row stand together in `b`, those below it in `a` ordered by `b`.
    by_b = np.argsort(pairs.b, kind="stable")
    below, above_b = pairs.a[by_b], pairs.b[by_b]
    nodes = np.flatnonzero(np.bincount(pairs.a, minlength=rows) + np.bincount(pairs.b, minlength=rows))
    up, up_end = np.searchsorted(pairs.a, nodes), np.searchsorted(pairs.a, nodes, "right")
    down, down_end = np.searchsorted(above_b, nodes), np.searchsorted(above_b, nodes, "right")
    dropped = np.zeros(rows, bool)
    for position in np.argsort(rank[nodes]).tolist():
        node = nodes[position]
        if dropped[node]:
            continue
        near = np.concatenate([pairs.b[up[position] : up_end[position]], below[down[position] : down_end[position]]])
        free = near[~dropped[near]]
        dropped[free] = True
        kept_for[free] = node
    return kept_for


def estimate_recall(vectors: Vectors, pairs: Pairs, threshold: float, samples: int = 512, seed: int = 0) -> dict[str, Any]:
    """Share of near-duplicate pairs that were found, measured by comparing `samples` random rows with all others.

    Returns `recall` (1.0 where no pair was met), `pairs` met, and `missed`.
    """
    usable = vectors.rows
    rows = np.sort(np.random.default_rng(seed).choice(usable, min(samples, len(usable)), replace=False))
    units, met = vectors.units[rows], []
    for start in range(0, len(usable), 1 << 15):
        others = usable[start : start + (1 << 15)]
        left, right = np.nonzero(units @ vectors.units[others].T >= threshold - _MARGIN)
        met.append(np.stack([rows[left], others[right]], 1))
    ends = np.concatenate(met) if met else np.empty((0, 2), np.int64)
    ends = np.sort(ends[ends[:, 0] != ends[:, 1]], axis=1)
    ends = ends[vectors.cosine(ends[:, 0], ends[:, 1]) >= threshold]
    total = len(vectors.usable)
    expected = _unique(ends[:, 0] * total + ends[:, 1])
    missed = len(np.setdiff1d(expected, pairs.a * total + pairs.b, assume_unique=True))
    return {"recall": 1 - missed / len(expected) if len(expected) else 1.0, "pairs": len(expected), "missed": missed}
