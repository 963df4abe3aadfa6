"""What `diptych cache` computed, read back: caches joined to samples by key, with a variant drawn for each slot.

A cache has the partitions of `embed`, with one array per key of the batch: float16 [rows, variants, …], where variants are crops, each
followed by its mirror image if it holds flips. `cache.json` says what made it; a cache of other data or another model is refused.

Shape legend: n rows asked for, V variants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diptych.batches import CACHES, FIELDS, CachedNeed
from diptych.config import ConfigError
from diptych.datasets import draws, embed_layout, storage
from diptych.datasets.manifest import Manifest
from diptych.datasets.partitions import MISSING, Joined, Kind, join_partitions

PROVENANCE = "cache.json"
KIND = Kind("data.caches", "cached_row", "`diptych cache`")


class Found(NamedTuple):
    """What `CacheJoin.read` returns."""

    arrays: dict[str, np.ndarray]
    """[n, …] by key of the batch; zeros where there is no row."""
    faults: list[tuple[int, str, str]]
    """`(index into the rows, kind, detail)`"""


class CacheJoin(Joined):
    """The join of a manifest with one cache; its arrays are keys of the batch."""

    @property
    def crops(self) -> int:
        """Crops of each sample."""
        return int(self.about.get("crops", 1))

    @property
    def flips(self) -> bool:
        """Whether each crop is followed by its mirror image."""
        return bool(self.about.get("flips", False))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one sample's `key`, in one variant."""
        return self.lookups[key].files[0].shape[1:]

    def read(self, rows: np.ndarray, variants: np.ndarray, retries: int = storage.READ_RETRIES) -> Found:
        """The variants `variants` (int64 [n]) of manifest rows `rows` (int64 [n])."""
        arrays, bad = {}, []
        for key, lookup in self.lookups.items():
            width = math.prod(self.shape(key))
            flat = lookup.read_parts(rows, variants * width, width, lookup.files[0].dtype, retries)
            missing, finite = lookup.file[rows] == MISSING, np.isfinite(flat).all(axis=1)
            for index in np.flatnonzero(missing | ~finite).tolist():
                what = "missing_cached_row" if missing[index] else "nan_cached_row"
                bad.append((index, what, f"{key}: " + ("no cached row has this key" if missing[index] else "it holds NaN or infinity")))
            # Only now, because integers hold no NaN.
            whole = np.where(finite[:, None], flat, 0) if np.dtype(FIELDS[key].dtype).kind == "i" else flat
            arrays[key] = whole.astype(FIELDS[key].dtype, copy=False).reshape(len(rows), *self.shape(key))
        return Found(arrays, bad)


def choose_variants(seed: int, slots: np.ndarray, flip: float, crops: int, flips: bool) -> np.ndarray:
    """int64 [n]: the variant of each of `slots` (int64 [n]), a function of (seed, slot) alone."""
    key = draws.key_of(seed, "variant")
    chosen = draws.below(key, slots * 2, crops)
    mirrored = draws.uniform(key, slots * 2 + 1) < flip
    return chosen * 2 + mirrored if flips else chosen


def read_cached(joins: Sequence[CacheJoin], need: CachedNeed, rows: np.ndarray, slots: np.ndarray, seed: int, retries: int) -> Found:
    """All keys of `need` for manifest `rows` at `slots` (int64 [n] both), from the caches `joins`."""
    arrays: dict[str, np.ndarray] = {}
    faults: list[tuple[int, str, str]] = []
    for join in joins:
        found = join.read(rows, choose_variants(seed, slots, need.flip, join.crops, join.flips), retries)
        arrays |= found.arrays
        faults += found.faults
    if set(arrays) != set(need.keys):
        raise ConfigError("data.caches", sorted(arrays), f"caches of {', '.join(need.keys)}, which the task needs")
    return Found(arrays, faults)


def join_caches(manifest: Manifest, caches: Sequence[str], need: CachedNeed) -> list[CacheJoin]:
    """Join the folders in `caches` that hold what `need` names.

    Raises `ConfigError` where one is missing, stale (other data, another model or other pixels: the message says which), lacks
    flips, or shares no key with the data.
    """
    recorded = {storage.absolute(folder): _recorded(folder) for folder in caches}
    joins = []
    for kind, keys in CACHES.items():
        wanted = [key for key in keys if key in need.keys]
        if not wanted:
            continue
        folders = [folder for folder, about in recorded.items() if about["kind"] == kind]
        if len(folders) != 1:
            raise ConfigError(
                "data.caches", list(caches), f"one cache of {kind}, which the task needs; {len(folders)} are there",
                f"`diptych cache {kind} SHARDS OUT` makes one." if not folders else "Name the one to use.",
            )  # fmt: skip
        about = recorded[folders[0]]
        _refuse_stale(folders[0], about, {"data_digest": manifest.digest} | dict(need.expected.get(kind, {})))
        if need.flip and kind != "text-states" and not about.get("flips"):
            raise ConfigError(
                "data.caches", folders[0], "a cache with flips, which the task draws", "Make it with --flips, or flip nothing."
            )
        joined = CacheJoin(folders[0], {}, about=about)
        # Rows of a file are [variants, …]: as many sides as the batch's [B, …].
        join_partitions(joined, manifest, {key: key for key in wanted}, KIND, {key: len(FIELDS[key].shape) for key in wanted})
        joined.settle(manifest, KIND)
        joins.append(joined)
    crops = {join.folder: join.crops for join in joins if "crops" in join.about}
    if len(set(crops.values())) > 1:
        raise ConfigError("data.caches", crops, "caches of pictures with the same crops, so that all show the same part")
    return joins


def _recorded(folder: str) -> dict[str, Any]:
    about = embed_layout.read_provenance(folder, PROVENANCE)
    if about is None or about.get("kind") not in CACHES:
        raise ConfigError(
            "data.caches", folder, "folders that `diptych cache` wrote", f"It has no {PROVENANCE} that names a kind of cache."
        )
    return about


def _refuse_stale(folder: str, about: dict[str, Any], expected: dict[str, Any]) -> None:
    different = [key for key, value in expected.items() if about.get(key) != value]
    if different:
        found = ", ".join(f"{key}={about.get(key)!r}" for key in different)
        asked = ", ".join(f"{key}={expected[key]!r}" for key in different)
        raise ConfigError(
            "data.caches", f"{folder} made with {found}", f"a cache made with {asked}",
            f"It is stale: make it again in another folder with `diptych cache {about['kind']}`.",
        )  # fmt: skip
