"""Captions for images: open_clip's CoCa as a step model with key-value caches, for `text_generation.generate`.

open_clip's own generation does not run with transformers 5. The logits of a step equal `CoCa.forward` on the same
prefix; what is computed once is kept: keys and values of past tokens, and of the image in the decoder's cross-attention.

Shapes: N rows, L new tokens, T tokens so far, H heads, C channels, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.clip_library import open_clip
from diptych.config import ConfigError
from diptych.trainers.decoding import Decoding
from diptych.trainers.text_generation import Prompts, generate
from diptych.vocabulary import Vocabulary


class CaptionSteps:
    """The `StepModel` of one batch of images."""

    def __init__(self, model: open_clip.CoCa, image_tokens: Tensor, forbidden: tuple[int, ...] = ()) -> None:
        """`image_tokens` is `[N, Q, C]`, the second output of the image tower; `forbidden` ids are never generated."""
        if not isinstance(model.text, open_clip.transformer.TextTransformer):
            raise ConfigError(
                "task.model", type(model.text).__name__, "open_clip's own text tower", "Others have no causal states to decode from."
            )
        self.model, self.forbidden = model, list(forbidden)
        self.length = 0
        self._past: dict[int, tuple[Tensor, Tensor]] = {}
        self._image: list[tuple[Tensor, Tensor]] = []
        for block in model.text_decoder.cross_attn:
            channels = block.attn.embed_dim
            weight, bias = block.attn.in_proj_weight[channels:], block.attn.in_proj_bias[channels:]
            keys, values = F.linear(block.ln_1_kv(image_tokens), weight, bias).chunk(2, dim=-1)
            self._image.append((_heads(keys, block.attn), _heads(values, block.attn)))

    def start(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Take prefixes of one length, int64 `[N, T]`; return logits `[N, V]` of the next token."""
        assert bool(mask.all()), "captions start from prefixes of one length"
        return self._allowed(self.logits(tokens)[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token per row, `[N]`; return logits `[N, V]` of the next."""
        return self._allowed(self.logits(tokens[:, None])[:, -1])

    def select(self, rows: Tensor) -> None:
        """Make the cache's rows those at the indices `rows`, which may repeat, reorder and drop rows."""
        self._past = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self._past.items()}
        self._image = [(keys[rows], values[rows]) for keys, values in self._image]

    def logits(self, tokens: Tensor) -> Tensor:
        """Append `tokens` `[N, L]`; return the logits `[N, L, V]` that follow each of them."""
        text, decoder = self.model.text, self.model.text_decoder
        positions = text.positional_embedding[self.length : self.length + tokens.shape[1]]
        x = text.token_embedding(tokens) + positions
        layer = 0
        for block in text.transformer.resblocks:
            x, layer = self._self_attention(block, x, layer), layer + 1
        for block, cross, (keys, values) in zip(decoder.resblocks, decoder.cross_attn, self._image, strict=True):
            x, layer = self._self_attention(block, x, layer), layer + 1
            channels = cross.attn.embed_dim
            query = F.linear(cross.ln_1(x), cross.attn.in_proj_weight[:channels], cross.attn.in_proj_bias[:channels])
            x = _finish(cross, x, F.scaled_dot_product_attention(_heads(query, cross.attn), keys, values))
        self.length += tokens.shape[1]
        return decoder.ln_final(x) @ decoder.text_projection

    def _self_attention(self, block: open_clip.transformer.ResidualAttentionBlock, x: Tensor, layer: int) -> Tensor:
        """One block over the new tokens `[N, L, C]`, which attend to those in the cache of `layer` and to each other, causally."""
        new = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        query, keys, values = (_heads(part, block.attn) for part in new)
        if layer in self._past:
            assert x.shape[1] == 1, "only single tokens are appended to a cache"
            past_keys, past_values = self._past[layer]
            keys, values = torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)
        self._past[layer] = (keys, values)
        return _finish(block, x, F.scaled_dot_product_attention(query, keys, values, is_causal=x.shape[1] > 1))

    def _allowed(self, logits: Tensor) -> Tensor:
        if not self.forbidden:
            return logits
        return logits.index_fill(1, torch.tensor(self.forbidden, device=logits.device), -torch.inf)


def _heads(x: Tensor, attention: nn.MultiheadAttention) -> Tensor:
    """`[N, L, C]` → `[N, H, L, C/H]`."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _finish(block: open_clip.transformer.ResidualAttentionBlock, x: Tensor, attended: Tensor) -> Tensor:
    """Output projection, residual and feed-forward part of a block."""
    x = x + block.ls_1(block.attn.out_proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@torch.no_grad()
def generate_captions(
    model: open_clip.CoCa, pixels: Tensor, vocabulary: Vocabulary, decoding: Decoding, numbers: Tensor | None = None
) -> list[list[list[int]]]:
    """Token ids of K captions for each of N images, start and end token left out.

    Args:
        model: open_clip's CoCa, in `eval()`.
        pixels: float `[N, 3, H, W]`, normalised.
        vocabulary: Its special ids; padding is never generated.
        decoding: Strategy and limits; captions end with the model's context at the latest.
        numbers: int64 `[N]`, number of each image, which keys its draws; by default its place.
    """
    count, device = pixels.shape[0], pixels.device
    decoding = decoding.model_copy(update={"max_new_tokens": min(decoding.max_new_tokens, model.context_length - 1)})
    steps = CaptionSteps(model, model._encode_image(pixels)[1], (vocabulary.pad, vocabulary.start))
    start = torch.full((count, 1), vocabulary.start, device=device)
    numbers = torch.arange(count, device=device) if numbers is None else numbers
    found = generate(steps, Prompts(start, torch.ones_like(start, dtype=torch.bool), numbers), vocabulary.end, decoding)
    return [[caption.tokens for caption in captions] for captions in found]
