"""Predicted embeddings made readable: the nearest known prompts by cosine, and the competition's rows.

Shapes: N predictions, M known prompts, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from diptych.config import ConfigError


class PromptIndex:
    """Exact search for the known prompts whose embeddings are nearest by cosine (faiss, inner product)."""

    def __init__(self, prompts: Sequence[str], embeddings: np.ndarray) -> None:
        """`embeddings` is float `[M, D]`, row i that of `prompts[i]`; equal prompts count once."""
        try:
            import faiss
        except ModuleNotFoundError:
            raise ConfigError(
                "--neighbours", "nearest prompts", "0 without faiss", "Install it: `pip install 'diptych[cpu]'` or `[gpu]`."
            ) from None
        first = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
        self.prompts = list(first)
        self._index = faiss.IndexFlatIP(embeddings.shape[1])
        self._index.add(_normalised(embeddings[list(first.values())]))

    def nearest(self, predictions: np.ndarray, count: int) -> list[list[tuple[str, float]]]:
        """For each of `[N, D]` the `count` nearest prompts with their cosines, nearest first."""
        cosines, rows = self._index.search(_normalised(predictions), min(count, len(self.prompts)))
        return [[(self.prompts[row], float(cosine)) for row, cosine in zip(*pair, strict=True)] for pair in zip(rows, cosines, strict=True)]


def submission_rows(ids: Sequence[str], predictions: np.ndarray) -> Iterator[tuple[str, float]]:
    """The image-to-prompt competition's rows, `<imgId>_<dimension>` and its value, for `[N, D]` predictions."""
    for name, prediction in zip(ids, predictions.tolist(), strict=True):
        for dimension, value in enumerate(prediction):
            yield f"{name}_{dimension}", value


def _normalised(vectors: np.ndarray) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
