"""Retrieval among a validation set: how often the right partner is among the k nearest."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1024


def recall_at(queries: Tensor, candidates: Tensor, same: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[int, float]:
    """Share of queries with a right candidate among the k most similar.

    queries, candidates: `[N, D]`, L2-normalised, partners in the same row. same: `[N]` integers; rows with equal values
    are each other's right answers too (the same caption twice). Ties are broken at random, in expectation: features that
    have all collapsed score k/N, not 1.
    """
    hits = dict.fromkeys(ks, 0.0)
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ candidates.T
        right = same[start : start + _CHUNK, None] == same[None, :]
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        nearer = ((similarity > best) & ~right).sum(dim=1)
        tied = ((similarity == best) & ~right).sum(dim=1)
        for k in ks:
            hits[k] += ((k - nearer) / (tied + 1)).clamp(0, 1).sum().item()
    return {k: hit / max(len(queries), 1) for k, hit in hits.items()}


def retrieval_metrics(image: Tensor, text: Tensor, tokens: Tensor) -> dict[str, float]:
    """R@1/5/10 both ways: `image_to_text_r1`, …, `text_to_image_r10`.

    image, text: `[N, D]`, L2-normalised. tokens: `[N, L]` ids of the captions; equal captions count as one.
    """
    same = torch.unique(tokens, dim=0, return_inverse=True)[1]
    found = {f"image_to_text_r{k}": share for k, share in recall_at(image, text, same).items()}
    return found | {f"text_to_image_r{k}": share for k, share in recall_at(text, image, same).items()}
