"""Token generation for any model with a step function: greedy, beam search and sampling, batched and cached.

The model is a `StepModel`: it holds its own cache and knows nothing of strategies. Finished texts leave the batch, so
that a few long ones do not keep the rest computing. Draws are counted: text i gets the same draws in any batch.

Shapes: P prompts, K texts per prompt, N rows computed, L tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diptych.trainers.decoding import Decoding
from diptych.trainers.randomness import uniform

_CROWDED = 0.9
"""Share of unfinished rows below which the finished ones leave the batch; copying the cache for each single one costs more."""
_NEVER = -1e9
"""Score of a beam that does not exist; finite, so that sums stay finite."""


class StepModel(Protocol):
    """A causal language model with its cache."""

    def start(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Take left-padded prompts (int64 and bool `[P, L]`); return logits `[P, V]` of the next token."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token per row, `[N]`; return logits `[N, V]` of the next."""

    def select(self, rows: Tensor) -> None:
        """Make the cache's rows those at the indices `rows` `[N]`, which may repeat, reorder and drop rows."""


class Prompts(NamedTuple):
    """P left-padded prompts."""

    tokens: Tensor
    """int64 [P, L]"""
    mask: Tensor
    """bool [P, L], False on padding"""
    numbers: Tensor
    """int64 [P]: the number of each prompt, which keys its draws"""

    def take(self, rows: Tensor) -> Prompts:
        """The prompts at `rows`, which may repeat and drop some."""
        return Prompts(*(part[rows] for part in self))

    def append(self, following: Tensor) -> Prompts:
        """One more token `[P]` each."""
        mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        return Prompts(torch.cat([self.tokens, following[:, None]], 1), mask, self.numbers)


@dataclass(frozen=True)
class Continuation:
    """What one text became."""

    tokens: list[int]
    """New tokens, the end token excluded."""
    ended: bool
    """Whether the model ended the text itself, by the end token."""


Stop = Callable[[int, list[int]], bool]
"""Given the index of the prompt and a text's new tokens, whether the text is complete."""


@torch.no_grad()
def generate(model: StepModel, prompts: Prompts, end: int, decoding: Decoding, stop: Stop | None = None) -> list[list[Continuation]]:
    """Continue P left-padded prompts; returns K continuations for each.

    Args:
        model: Where logits come from.
        prompts: What to continue.
        end: The token that ends a text.
        decoding: Strategy and limits; `keywords` and `stop` are the caller's (see the argument `stop`).
        stop: Ends a text early; beam search does not ask it, because a hypothesis is judged whole.
    """
    if decoding.num_beams > 1:
        return _beams(model, prompts, end, decoding)
    return _walk(model, prompts, end, decoding, stop)


def _walk(model: StepModel, prompts: Prompts, end: int, decoding: Decoding, stop: Stop | None) -> list[list[Continuation]]:
    """Greedy search and sampling: one path per text."""
    count, device = decoding.num_samples, prompts.tokens.device
    logits = model.start(prompts.tokens, prompts.mask)
    alive = torch.arange(len(prompts.tokens) * count, device=device)
    if count > 1:
        model.select(alive // count)
        logits, prompts = logits[alive // count], prompts.take(alive // count)
    draws = None
    if decoding.sample:
        draws = uniform(decoding.seed, "generate", prompts.numbers * count + alive % count, (decoding.max_new_tokens,))
    texts: list[list[int]] = [[] for _ in range(len(alive))]
    ended = [False] * len(alive)
    finished = torch.zeros(len(alive), dtype=torch.bool)
    for position in range(decoding.max_new_tokens):
        scores = adjust(logits.float(), prompts.tokens, prompts.mask, decoding)
        following = scores.argmax(-1) if draws is None else _draw(scores, draws[alive, position], decoding)
        for index, (text, token) in enumerate(zip(alive.tolist(), following.tolist(), strict=True)):
            if finished[index]:
                continue
            if token == end:
                ended[text] = finished[index] = True
            else:
                texts[text].append(token)
                finished[index] = stop is not None and stop(text // count, texts[text])
        left = len(alive) - int(finished.sum())
        if left == 0 or position + 1 == decoding.max_new_tokens:
            break
        prompts = prompts.append(following)
        if left <= _CROWDED * len(alive):
            rows = (~finished).nonzero()[:, 0].to(device)
            model.select(rows)
            alive, prompts, following, finished = alive[rows], prompts.take(rows), following[rows], finished[rows.cpu()]
        logits = model.step(following)
    rows_of_texts = [Continuation(text, over) for text, over in zip(texts, ended, strict=True)]
    return [rows_of_texts[start : start + count] for start in range(0, len(texts), count)]


def adjust(scores: Tensor, tokens: Tensor, mask: Tensor, decoding: Decoding) -> Tensor:
    """Weaken or forbid what would repeat: `scores` `[N, V]` (logits or log-probabilities) after `tokens` `[N, L]`."""
    if decoding.repetition_penalty != 1:
        # Padding repeats the text's first token, so that it marks nothing of its own.
        first = tokens.gather(1, mask.int().argmax(1, keepdim=True))
        seen = torch.where(mask, tokens, first)
        held = scores.gather(1, seen)
        weakened = torch.where(held < 0, held * decoding.repetition_penalty, held / decoding.repetition_penalty)
        scores = scores.scatter(1, seen, weakened)
    size = decoding.no_repeat_ngram
    if size and tokens.shape[1] >= size:
        windows, inside = tokens.unfold(1, size, 1), mask.unfold(1, size, 1).all(-1)
        tail = tokens[:, tokens.shape[1] - size + 1 :]
        again = inside & (windows[..., :-1] == tail[:, None]).all(-1)
        rows, places = again.nonzero(as_tuple=True)
        scores = scores.index_put((rows, windows[rows, places, -1]), torch.tensor(-torch.inf, device=scores.device))
    return scores


def truncate(scores: Tensor, decoding: Decoding) -> Tensor:
    """Temperature, then top-k, then top-p (Holtzman et al. 2020, arXiv:1904.09751): what may not be drawn gets -inf."""
    scores = scores / decoding.temperature
    if 0 < decoding.top_k < scores.shape[-1]:
        least = scores.topk(decoding.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if decoding.top_p < 1:
        ranked, order = scores.sort(descending=True)
        probabilities = ranked.softmax(-1)
        # A token is kept if those before it do not reach top_p yet: the first always is.
        beyond = probabilities.cumsum(-1) - probabilities >= decoding.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return scores


def _draw(scores: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    """One token per row by the inverse of the distribution function at `uniforms` `[N]`."""
    cumulative = truncate(scores, decoding).softmax(-1).double().cumsum(-1)
    # The target lies strictly below the total, so a token of probability zero is never reached.
    target = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


@dataclass
class _Search:
    """Beams of the prompts that are still searched; B beams each."""

    prompt: Tensor
    """int64 [n]"""
    tokens: Tensor
    """int64 [n, B, L], prompt included"""
    mask: Tensor
    """bool [n, L], False on the prompt's padding"""
    scores: Tensor
    """[n, B], summed log-probabilities"""
    best: Tensor
    """[n, B], scores of finished hypotheses, descending; _NEVER where there is none"""
    best_tokens: Tensor
    """int64 [n, B, longest], their new tokens"""
    best_lengths: Tensor
    """int64 [n, B]"""

    def keep(self, rows: Tensor) -> _Search:
        """The prompts at `rows` alone."""
        return _Search(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def _beams(model: StepModel, prompts: Prompts, end: int, decoding: Decoding) -> list[list[Continuation]]:
    """Beam search with the scores and the stopping rule of transformers (`early_stopping=False`)."""
    count, device, longest = decoding.num_beams, prompts.tokens.device, decoding.max_new_tokens
    size, width = prompts.tokens.shape
    repeat = torch.arange(size, device=device).repeat_interleave(count)
    logits = model.start(prompts.tokens, prompts.mask)[repeat]
    model.select(repeat)
    # All beams begin alike: only the first may be continued, or they would stay alike.
    scores = torch.full((size, count), _NEVER, device=device)
    scores[:, 0] = 0
    search = _Search(
        torch.arange(size, device=device),
        prompts.tokens[repeat].reshape(size, count, width),
        prompts.mask,
        scores,
        torch.full((size, count), _NEVER, device=device),
        torch.zeros(size, count, longest, dtype=torch.long, device=device),
        torch.zeros(size, count, dtype=torch.long, device=device),
    )
    results: list[list[Continuation]] = [[] for _ in range(size)]
    for length in range(1, longest + 1):
        source, following = _extend(search, logits, end, decoding, length)
        # A prompt is done once its best open beam, judged at this length, cannot beat its worst finished one.
        open_best = search.scores[:, 0] / length**decoding.length_penalty
        going = (open_best > search.best.min(1).values) if length < longest else torch.zeros_like(open_best, dtype=torch.bool)
        _collect(search.keep((~going).nonzero()[:, 0]), end, decoding.num_samples, results)
        rows = going.nonzero()[:, 0]
        if not len(rows):
            break
        search = search.keep(rows)
        model.select(source[rows].reshape(-1))
        logits = model.step(following[rows].reshape(-1))
    return results


def _extend(search: _Search, logits: Tensor, end: int, decoding: Decoding, length: int) -> tuple[Tensor, Tensor]:
    """Lengthen every beam by a token, in place; returns the cache row and the token of each new beam, both [n, B]."""
    prompts, count, width = search.tokens.shape
    size = logits.shape[-1]
    flat = search.tokens.reshape(-1, width)
    logprobs = adjust(logits.float().log_softmax(-1), flat, search.mask.repeat_interleave(count, 0), decoding).reshape(prompts, count, size)
    # Twice as many candidates as beams: even if the best B all end, B open ones remain.
    totals, indices = (search.scores[:, :, None] + logprobs).reshape(prompts, -1).topk(2 * count)
    beams, following = indices // size, indices % size
    candidates = torch.cat([search.tokens.gather(1, beams[..., None].expand(-1, -1, width)), following[..., None]], 2)
    ends = (following == end) | (length == decoding.max_new_tokens)
    done = ends.clone()
    done[:, count:] = False
    finals = torch.where(done, totals / length**decoding.length_penalty, _NEVER)
    padded = torch.zeros(prompts, 2 * count, search.best_tokens.shape[2], dtype=torch.long, device=logits.device)
    padded[:, :, :length] = candidates[:, :, width + 1 - length :]
    merged = torch.cat([search.best, finals], 1)
    search.best, order = merged.topk(count)
    everything = torch.cat([search.best_tokens, padded], 1)
    search.best_tokens = everything.gather(1, order[..., None].expand(-1, -1, everything.shape[2]))
    search.best_lengths = torch.cat([search.best_lengths, torch.full_like(following, length)], 1).gather(1, order)
    search.scores, order = torch.where(ends, totals + _NEVER, totals).topk(count)
    search.tokens = candidates.gather(1, order[..., None].expand(-1, -1, width + 1))
    search.mask = torch.cat([search.mask, torch.ones_like(search.mask[:, :1])], 1)
    beams = beams.gather(1, order) + count * torch.arange(prompts, device=logits.device)[:, None]
    return beams, following.gather(1, order)


def _collect(search: _Search, end: int, count: int, results: list[list[Continuation]]) -> None:
    """Write the `count` best hypotheses of each prompt of `search` to `results`."""
    for prompt, rows, lengths in zip(search.prompt.tolist(), search.best_tokens.tolist(), search.best_lengths.tolist(), strict=True):
        for row, length in list(zip(rows, lengths, strict=True))[:count]:
            ended = length > 0 and row[length - 1] == end
            results[prompt].append(Continuation(row[: length - ended], ended))
