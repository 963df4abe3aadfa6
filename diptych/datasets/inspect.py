"""What a data set looks like: counts, sizes, captions, histograms and a contact sheet, as one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diptych.batches import Fault
from diptych.datasets import contact_sheet, draws
from diptych.datasets.manifest import Manifest

PICTURES = 48
WORDS = 40
"""Most frequent words and captions that are listed."""
_CAPTIONS_LOOKED_AT = 200_000
_BINS = 16
_FAULTS_SHOWN = 200


@dataclass(frozen=True)
class Look:
    """Facts of a data set, for the page and for `--json`."""

    facts: dict[str, Any]
    """`Manifest.facts`, and medians."""
    histograms: dict[str, list[tuple[str, int]]]
    """Title → bars."""
    words: list[tuple[str, int]]
    repeated_captions: list[tuple[str, int]]
    """Captions that stand more than once."""
    extensions: list[tuple[str, int]]
    faults: list[Fault]


def look(manifest: Manifest, seed: int = 0) -> Look:
    """Count; captions are counted on at most 200,000 samples, drawn by `seed`."""
    width, height = np.asarray(manifest.column("width")), np.asarray(manifest.column("height"))
    known = (width > 0) & (height > 0)
    captions = _captions(manifest, seed)
    lengths = pc.utf8_length(captions).to_numpy(zero_copy_only=False) if len(captions) else np.empty(0, np.int64)
    words = Counter(word for text in captions.to_pylist() for word in text.lower().split())
    counted = [len(text.split()) for text in captions.to_pylist()]
    repeated = pc.value_counts(captions).to_pylist() if len(captions) else []
    shortest = np.minimum(width[known], height[known])
    facts = manifest.facts() | {
        "captions_looked_at": len(captions),
        "distinct_captions": len(repeated),
        "median_width": _median(width[known]),
        "median_height": _median(height[known]),
        "unknown_sizes": int((~known).sum()),
        "median_words": _median(np.array(counted)),
    }
    histograms = {
        "shorter side, pixels": bars(shortest),
        "aspect, width / height": bars(width[known] / height[known]),
        "caption length, characters": bars(lengths),
        "caption length, words": bars(np.array(counted)),
        "samples per shard": bars(np.diff(manifest.shard_starts)),
    }
    repeats = sorted(((row["values"], row["counts"]) for row in repeated if row["counts"] > 1), key=lambda pair: (-pair[1], pair[0]))
    codes = np.bincount(np.asarray(manifest.columns["member_extension"]), minlength=len(manifest.extensions))
    return Look(
        facts,
        histograms,
        words.most_common(WORDS),
        repeats[:WORDS],
        list(zip(manifest.extensions, codes.tolist(), strict=True)),
        manifest.faults,
    )


def _captions(manifest: Manifest, seed: int) -> pa.Array:
    rows = np.arange(manifest.samples)
    if manifest.samples > _CAPTIONS_LOOKED_AT:
        rows = _drawn(manifest.samples, _CAPTIONS_LOOKED_AT, seed)
    found = manifest.rows(rows, ["caption"])["caption"].combine_chunks() if len(rows) else pa.array([], pa.string())
    return found.drop_null()


def _drawn(samples: int, count: int, seed: int) -> np.ndarray:
    """Up to `count` rows, spread evenly with a random place in each part, so that reads go forward."""
    count = min(count, samples)
    edges = np.linspace(0, samples, count + 1)
    uniform = draws.uniform(draws.key_of(seed, "inspect"), np.arange(count))
    return np.minimum((edges[:-1] + uniform * np.diff(edges)).astype(np.int64), samples - 1)


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def bars(values: np.ndarray) -> list[tuple[str, int]]:
    """(label, count) of up to 16 bins between the 1st and 99th percentile; the outer bins take what lies beyond."""
    values = np.asarray(values)
    values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not len(values):
        return []
    low, high = np.percentile(values, [1, 99])
    whole = values.dtype.kind in "iu"
    distinct = np.unique(values)
    if whole and len(distinct) <= _BINS:
        return [(f"{value:,}", int((values == value).sum())) for value in distinct.tolist()]
    if low == high:
        low, high = float(values.min()), float(values.max())
        if low == high:
            return [(f"{low:g}", len(values))]
    edges = np.linspace(low, high, _BINS + 1)
    edges = np.unique(np.round(edges)) if whole else edges
    place = np.clip(np.searchsorted(edges, values, "right") - 1, 0, len(edges) - 2)
    counts = np.bincount(place, minlength=len(edges) - 1)
    text = "{:,.0f} – {:,.0f}" if whole or high - low > 50 else "{:.2f} – {:.2f}"
    return [(text.format(edges[index], edges[index + 1]), int(count)) for index, count in enumerate(counts)]


def html(manifest: Manifest, found: Look, title: str, pictures: int = PICTURES, seed: int = 0) -> bytes:
    """The page, with `pictures` samples drawn by `seed`."""
    facts = [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in found.facts.items()
        if value is not None
    ]
    sections = [("", contact_sheet.facts_table(facts))]
    if manifest.samples:
        shown = contact_sheet.thumbnails(manifest, np.unique(_drawn(manifest.samples, pictures, seed)))
        sections.append((f"{len(shown)} of {manifest.samples:,} samples", contact_sheet.grid([thumbnail.html() for thumbnail in shown])))
    sections += [(name, contact_sheet.histogram(counts)) for name, counts in found.histograms.items() if counts]
    for name, counts in (
        ("files per extension", found.extensions),
        ("frequent words", found.words),
        ("captions that stand more than once", found.repeated_captions),
    ):
        if counts:
            sections.append((name, contact_sheet.histogram([(label[:120], count) for label, count in counts])))
    kinds = Counter(fault.kind for fault in found.faults)
    if kinds:
        rows = [(f"{fault.shard} {fault.key}", f"{fault.kind}: {fault.detail}") for fault in found.faults[:_FAULTS_SHOWN]]
        sections.append((f"{len(found.faults):,} faults", contact_sheet.histogram(kinds.most_common()) + contact_sheet.facts_table(rows)))
    return contact_sheet.page(title, sections)
