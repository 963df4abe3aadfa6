"""`diptych embed --verify`: compute samples of existing embeddings again, whoever made them, and compare by key.

A plain cosine tells little where a model maps all pictures close together: there a row that belongs to another sample
still has 0.995. So vectors are compared around the mean of the folder's too, where only their own differences count.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from diptych.config import ConfigError, build
from diptych.pipelines.console import progress
from diptych.pipelines.embed import EmbedOptions, prepare

if TYPE_CHECKING:
    from diptych.datasets.embeddings import EmbeddingJoin

SAME_COSINE, SAME_AROUND_MEAN = 0.99, 0.95
"""Cosines from which two embeddings of one sample count as equal; float16 and other kernels stay far above."""
_NOISE = 1e-5
"""1 - cosine of float16's rounding and more; below it two vectors are equal however close all others are."""
_MEAN_OF = 1000


def run(shards: str, out: str, count: int, options: dict[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
    """Compute `count` random samples (0 = all) of the embeddings in `out` again, in this process.

    Returns `samples_in, samples_out, faults, seconds, cosine: {modality: {min, mean, min_around_mean}}`; `faults` names every
    sample whose embedding is another. The folder may be ours, clip-retrieval's, or in the reordered layout.
    """
    from diptych.datasets import embed_layout
    from diptych.datasets.embeddings import join
    from diptych.pipelines.embed_worker import EmbedWorker

    started = time.monotonic()
    chosen = build(EmbedOptions, options or {})
    former = embed_layout.read_provenance(out) or {}
    present = _present(out, chosen)
    asked = "model" in (options or {})
    updates = {
        "model": chosen.model if asked else former.get("model", chosen.model),
        "modality": "both" if len(present) == 2 else present[0],
    }
    # What the embeddings were made in is unknown, and bf16's own noise would hide small differences.
    updates |= {"precision": "fp32"} if chosen.precision == "auto" else {}
    spec = prepare(shards, out, chosen.model_copy(update=updates))
    joined = join(spec.manifest, out, present)
    have = np.flatnonzero(np.all([joined.lookups[name].file >= 0 for name in present], axis=0))
    rng = np.random.default_rng(seed)
    rows = have if not count or count >= len(have) else np.sort(rng.choice(have, count, replace=False))
    means = {name: _mean(joined, rng.choice(have, min(len(have), _MEAN_OF), replace=False), name) for name in present}
    found: dict[str, list[np.ndarray]] = {name: [] for name in present}
    faults: list[dict[str, Any]] = []
    with progress(f"verifying with {updates['model']}", len(rows)) as advance:
        for batch, vectors in EmbedWorker(spec).embed(rows):
            faults += [{"shard": fault.shard, "key": fault.key, "kind": fault.kind, "detail": fault.detail} for fault in batch.faults]
            for name in present:
                cosines = _compare(joined.read(batch.rows, name)[0], vectors[name], means[name])
                found[name].append(cosines)
                for index in np.flatnonzero(~_same(cosines)).tolist():
                    plain, around = cosines[:, index]
                    detail = f"{name} embedding: cosine {plain:.4f} with the one computed again, {around:.4f} around the mean"
                    fault = {"shard": batch.shards[index], "key": batch.keys[index], "kind": "embedding_mismatch", "detail": detail}
                    faults.append(fault)
            advance(len(batch.rows) + len(batch.faults))
    return {
        "samples_in": len(rows),
        "samples_out": len(rows) - len({(fault["shard"], fault["key"]) for fault in faults}),
        "faults": faults,
        "seconds": time.monotonic() - started,
        "cosine": {name: _summary(np.concatenate(parts, axis=1)) for name, parts in found.items() if parts},
        "dimensions": {name: joined.dim(name) for name in present},
    }


def _present(out: str, options: EmbedOptions) -> list[str]:
    """The modalities that are asked for and there. Raises `ConfigError` if there is none."""
    from diptych.datasets import folders, storage
    from diptych.datasets.embeddings import PREFIXES

    found = []
    for name in options.modalities:
        prefix = PREFIXES[name]
        inside = folders.list_files(storage.join(out, prefix), ".npy")
        if inside or any(path.rpartition("/")[2].startswith(f"{prefix}_") for path in folders.list_files(out, ".npy")):
            found.append(name)
    if not found:
        raise ConfigError("OUT", out, "a folder with img_emb or text_emb", "`diptych embed` without --verify makes one.")
    return found


def _mean(joined: EmbeddingJoin, rows: np.ndarray, name: str) -> np.ndarray:
    """float32 [D]: mean direction of stored vectors."""
    return _normalised(joined.read(rows, name)[0]).mean(axis=0)


def _compare(stored: np.ndarray, computed: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """float32 [2, B]: cosine of each pair of [B, D], and the same around the mean. Zero and NaN vectors give 0."""
    stored = np.nan_to_num(_normalised(stored), posinf=0.0, neginf=0.0)
    around = (_normalised(stored - mean) * _normalised(computed - mean)).sum(axis=1)
    return np.stack([(stored * computed).sum(axis=1), around])


def _same(cosines: np.ndarray) -> np.ndarray:
    plain, around = cosines
    return (plain >= SAME_COSINE) & ((around >= SAME_AROUND_MEAN) | (1 - plain <= _NOISE))


def _summary(cosines: np.ndarray) -> dict[str, float]:
    plain, around = cosines
    return {"min": float(plain.min(initial=1)), "mean": float(plain.mean()), "min_around_mean": float(around.min(initial=1))}


def _normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
