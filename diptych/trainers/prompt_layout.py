"""Prompts of unequal lengths laid out for a causal model with little padding, without touching the order of the run.

A micro-batch is cut to its longest prompt, computed in groups of like lengths, or packed (`task.batching`). Every prompt attends to
itself alone, so the layout changes sums only in their last digits.

Shapes: B prompts, L tokens, R rows of T tokens as laid out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diptych.recipes.gpt2 import GPT2Config


class Sheet(NamedTuple):
    """Prompts laid out for one call of the model."""

    tokens: Tensor
    """int64 [R, T]"""
    owner: Tensor
    """int64 [R, T]: the row of the batch that a token belongs to, -1 on padding"""
    positions: Tensor | None
    """int64 [R, T] where prompts don't start at column 0, else None"""


def lay_out(tokens: Tensor, lengths: Tensor, config: GPT2Config) -> list[Sheet]:
    """The prompts `tokens` [B, L] of `lengths` [B] as sheets with little padding."""
    rows = lengths.tolist()
    if config.batching == "pack":
        return [_packed(tokens, rows)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    if config.batching == "trim" or len(order) < 2 * config.buckets:
        return [_trimmed(tokens, lengths, torch.arange(len(rows)), max(rows))]
    # Groups of like lengths: prompts sorted by length and cut into equal parts.
    size = -(-len(order) // config.buckets)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [_trimmed(tokens, lengths, torch.tensor(group), max(rows[row] for row in group)) for group in groups]


def _trimmed(tokens: Tensor, lengths: Tensor, rows: Tensor, longest: int) -> Sheet:
    rows = rows.to(tokens.device)
    width = max(longest, 2)
    kept = tokens[rows, :width]
    inside = torch.arange(width, device=tokens.device) < lengths[rows, None]
    return Sheet(kept, torch.where(inside, rows[:, None], -1), None)


def _packed(tokens: Tensor, lengths: list[int]) -> Sheet:
    """First fit decreasing: each prompt goes to the first row that still has room for it."""
    width = max(*lengths, 2)
    room: list[int] = []
    place: dict[int, tuple[int, int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if lengths[row]:
            target = next((index for index, free in enumerate(room) if free >= lengths[row]), len(room))
            if target == len(room):
                room.append(width)
            place[row] = (target, width - room[target])
            room[target] -= lengths[row]
    shape = (max(len(room), 1), width)
    owner, source = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    for row, (target, start) in place.items():
        span = slice(start, start + lengths[row])
        owner[target, span] = row
        positions[target, span] = torch.arange(lengths[row])
        source[target, span] = torch.arange(lengths[row]) + row * tokens.shape[1]
    device = tokens.device
    return Sheet(tokens.reshape(-1)[source.to(device)], owner.to(device), positions.to(device))
