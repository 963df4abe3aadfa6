"""N-gram language models as baselines: unigram, and a trigram interpolated after Kneser and Ney, over the same tokens as the model's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


class NgramModel:
    """Interpolated n-grams with absolute discounting and continuation counts (Kneser and Ney 1995; Chen and Goodman 1999).

    Texts are token sequences with start and end tokens; every token but the first is predicted, as in training.
    """

    def __init__(self, texts: Iterable[Sequence[int]], order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
        for text in texts:
            for position in range(1, len(text)):
                for n in range(1, order + 1):
                    if position - n + 1 >= 0:
                        counts[n - 1][tuple(text[position - n + 1 : position + 1])] += 1
        # Below the highest order a token counts once per different word before it, not once per occurrence.
        for n in range(order - 1, 0, -1):
            lower: Counter[tuple[int, ...]] = Counter()
            for gram in counts[n]:
                lower[gram[1:]] += 1
            # What stands at the start of a text has no word before it.
            for gram, count in counts[n - 1].items():
                if gram not in lower:
                    lower[gram] = count
            counts[n - 1] = lower
        self.counts = counts
        self.totals: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
        self.kinds: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
        for n in range(order):
            for gram, count in counts[n].items():
                self.totals[n][gram[:-1]] += count
                self.kinds[n][gram[:-1]] += 1
        self.discounts = []
        for n in range(order):
            ones, twos = (sum(1 for count in counts[n].values() if count == k) for k in (1, 2))
            self.discounts.append(ones / (ones + 2 * twos) if ones else 0.5)

    def probability(self, history: Sequence[int], token: int) -> float:
        """P(token | the last order − 1 tokens of history)."""
        probability = 1 / self.vocabulary
        for n in range(min(self.order, len(history) + 1)):
            context = tuple(history[len(history) - n :])
            total = self.totals[n][context]
            if not total:
                break
            discount = self.discounts[n]
            seen = max(self.counts[n][(*context, token)] - discount, 0) / total
            probability = seen + discount * self.kinds[n][context] / total * probability
        return probability

    def perplexity(self, texts: Iterable[Sequence[int]]) -> float:
        """exp of the mean negative log-probability of every token but each text's first."""
        total, count = 0.0, 0
        for text in texts:
            for position in range(1, len(text)):
                total -= math.log(self.probability(text[max(0, position - self.order + 1) : position], text[position]))
                count += 1
        return math.exp(total / count)


class LinearTrigram:
    """Trigram, bigram, unigram and uniform estimates mixed by weights (Jelinek and Mercer 1980) that a tenth of the texts decides."""

    def __init__(self, texts: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        tenth = max(len(texts) // 10, 1)
        self._count(texts[tenth:])
        parts = np.array([row for text in texts[:tenth] for row in self._parts(text)])
        weights = np.full(4, 0.25)
        for _ in range(50):
            shares = parts * weights
            weights = (shares / shares.sum(1, keepdims=True)).mean(0)
        self.weights = weights
        self._count(texts)

    def _count(self, texts: Sequence[Sequence[int]]) -> None:
        self.counts: list[Counter[tuple[int, ...]]] = [Counter(), Counter(), Counter()]
        self.totals: list[Counter[tuple[int, ...]]] = [Counter(), Counter(), Counter()]
        for text in texts:
            for position in range(1, len(text)):
                for n in range(min(3, position + 1)):
                    gram = tuple(text[position - n : position + 1])
                    self.counts[n][gram] += 1
                    self.totals[n][gram[:-1]] += 1

    def _parts(self, text: Sequence[int]) -> Iterator[list[float]]:
        for position in range(1, len(text)):
            row = [1 / self.vocabulary, 0.0, 0.0, 0.0]
            for n in range(min(3, position + 1)):
                gram = tuple(text[position - n : position + 1])
                total = self.totals[n][gram[:-1]]
                row[n + 1] = self.counts[n][gram] / total if total else 0.0
            yield row

    def perplexity(self, texts: Sequence[Sequence[int]]) -> float:
        """exp of the mean negative log-probability of every token but each text's first."""
        parts = np.array([row for text in texts for row in self._parts(text)])
        return math.exp(-np.log(parts @ self.weights).mean())
