"""GPT-2 as a `StepModel`: one token per call, keys and values of the past kept in place.

The modules are transformers' own (and peft's, where adapters stand in them); the walk through them is ours, because a step of a small
model costs less than what surrounds it in the library: masks are grown, not rebuilt, and the cache is written, not concatenated.

Shapes: N rows, L new tokens, T tokens so far, H heads, C channels of a head, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

_GROWTH = 64
"""Tokens by which the cache grows when it is full."""


class GPT2Steps:
    """Cached steps of transformers' `GPT2LMHeadModel`, which should be in `eval()`."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model
        self.length = 0
        self._cache: list[Tensor] = []
        # [capacity, 2, N, H, C] of each block: keys and values, time first, so that what is filled is one piece of memory.
        self._spare: list[Tensor] = []
        # Buffers of the same shapes that rows are selected into.
        self._mask: Tensor | None = None
        # bool [N, capacity], True beyond `length` too; None without padding.
        self._counts = torch.zeros(0, dtype=torch.long)
        # int64 [N]: tokens of each text so far.

    def start(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits `[P, V]` after left-padded prompts `[P, L]`."""
        self._cache, self._spare, self.length = [], [], 0
        self._counts = mask.sum(1)
        allowed = None
        if bool(mask.all()):
            self._mask = None
        else:
            self._mask = functional.pad(mask, (0, _GROWTH), value=True)
            size = tokens.shape[1]
            causal = torch.ones(size, size, dtype=torch.bool, device=tokens.device).tril()
            # Padding attends to itself, since attention to nothing is undefined; nobody attends to it.
            itself = torch.eye(size, dtype=torch.bool, device=tokens.device)
            allowed = ((mask[:, None, :] & causal) | itself)[:, None]
        return self._run(tokens, (mask.cumsum(1) - 1).clamp(min=0), allowed)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits `[N, V]` after one more token `[N]`."""
        # A text that has reached the model's end may wait in the batch for the others; what it computes is not used.
        positions = self._counts[:, None].clamp(max=self.model.config.n_positions - 1)
        self._counts = self._counts + 1
        if self._mask is not None and self._mask.shape[1] <= self.length:
            self._mask = functional.pad(self._mask, (0, _GROWTH), value=True)
        allowed = None if self._mask is None else self._mask[:, None, None, : self.length + 1]
        return self._run(tokens[:, None], positions, allowed)

    def select(self, rows: Tensor) -> None:
        """Make the cache's rows those at `rows`."""
        for index, cache in enumerate(self._cache):
            shape = (*cache.shape[:2], len(rows), *cache.shape[3:])
            if index == len(self._spare):
                self._spare.append(cache.new_empty(shape))
            elif self._spare[index].shape != shape:
                self._spare[index] = cache.new_empty(shape)
            torch.index_select(cache[: self.length], 2, rows, out=self._spare[index][: self.length])
            self._cache[index], self._spare[index] = self._spare[index], cache
        self._counts = self._counts[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]

    def _run(self, tokens: Tensor, positions: Tensor, allowed: Tensor | None) -> Tensor:
        """Append `tokens` `[N, L]`; logits `[N, V]` after the last of them. `allowed` is bool `[N, 1, L or 1, T]`."""
        body = self.model.transformer
        x = body.wte(tokens) + body.wpe(positions)
        stop = self.length + tokens.shape[1]
        for index, block in enumerate(body.h):
            heads = block.attn.c_attn(block.ln_1(x)).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            cache = self._room(index, heads, stop)
            cache[self.length : stop] = heads[1:].permute(3, 0, 1, 2, 4)
            keys, values = cache[:stop].permute(1, 2, 3, 0, 4)
            attended = functional.scaled_dot_product_attention(
                heads[0],
                keys,
                values,
                attn_mask=allowed,
                is_causal=allowed is None and tokens.shape[1] > 1,
                scale=block.attn.scaling,
            )
            x = x + block.attn.c_proj(attended.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        self.length = stop
        return self.model.lm_head(body.ln_f(x[:, -1]))

    def _room(self, index: int, heads: Tensor, stop: int) -> Tensor:
        """The cache of block `index`, with room for tokens before `stop`; `heads` is `[3, N, H, L, C]`."""
        shape = (stop + _GROWTH, 2, *heads.shape[1:3], heads.shape[4])
        if index == len(self._cache):
            self._cache.append(heads.new_empty(shape))
        elif self._cache[index].shape[0] < stop:
            grown = heads.new_empty(shape)
            grown[: self.length] = self._cache[index][: self.length]
            self._cache[index] = grown
        return self._cache[index]
