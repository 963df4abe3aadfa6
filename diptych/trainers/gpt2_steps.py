"""GPT-2 as a `StepModel`: one token per call, keys and values of the past kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


class GPT2Steps:
    """Cached steps of transformers' `GPT2LMHeadModel`."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model
        self.cache: Any = None
        self.mask: Tensor | None = None
        self.lengths = torch.zeros(0)

    def start(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits `[P, V]` after left-padded prompts `[P, L]`."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self.lengths = mask.sum(1)
        # Without padding no mask is needed, and attention takes its fast path.
        self.mask = None if bool(mask.all()) else mask
        return self._run(tokens, (mask.cumsum(1) - 1).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        """Logits `[N, V]` after one more token `[N]`."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        # A text that has reached the model's end may wait in the batch for the others; what it computes is not used.
        positions = self.lengths[:, None].clamp(max=self.model.config.n_positions - 1)
        self.lengths = self.lengths + 1
        return self._run(tokens[:, None], positions)

    def select(self, rows: Tensor) -> None:
        """Make the cache's rows those at `rows`."""
        self.cache.reorder_cache(rows)
        self.lengths = self.lengths[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = self.model.transformer(
            input_ids=tokens, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -1])
