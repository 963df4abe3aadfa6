"""Figures of generated texts: BLEU, ROUGE, and diversity. Scores are in percent, as sacrebleu gives them.

Perplexity is exp of the mean loss of a token over all texts (`GPT2Task.summarise`), never a mean of perplexities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL")


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu_max`: mean over texts of the best sentence BLEU over that text's references; `bleu_corpus`: one BLEU of the corpus.

    `references[i]` holds the references of `outputs[i]`, at least one; their numbers may differ. Source: sacrebleu (Post 2018).
    """
    import sacrebleu

    _check(outputs, references)
    best = [max(sacrebleu.sentence_bleu(output, [one]).score for one in many) for output, many in zip(outputs, references, strict=True)]
    # sacrebleu takes one stream per reference; a text with fewer references has None in the streams beyond.
    streams = [[many[index] if index < len(many) else None for many in references] for index in range(max(map(len, references)))]
    return {"bleu_max": float(np.mean(best)), "bleu_corpus": sacrebleu.corpus_bleu(list(outputs), streams).score}


def rouge(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means of ROUGE-1, -2 and -L: `rouge1_recall`, `rouge1_precision`, `rouge1_f`, …; of several references the one with the best F.

    Source: rouge_score (Lin 2004), stemmer on.
    """
    _check(outputs, references)
    score = rouge_scorer()
    sums = {f"{kind}_{part}": 0.0 for kind in ROUGE for part in ("recall", "precision", "f")}
    for output, many in zip(outputs, references, strict=True):
        scores = [score(one, output) for one in many]
        for kind in ROUGE:
            best = max((found[kind] for found in scores), key=lambda found: found.fmeasure)
            for part, value in zip(("recall", "precision", "f"), (best.recall, best.precision, best.fmeasure), strict=True):
                sums[f"{kind}_{part}"] += 100 * value / len(outputs)
    return sums


def rouge_scorer() -> Callable[[str, str], dict]:
    """`score(reference, output)` → ROUGE-1, -2 and -L by name."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True).score


def diversity(texts: Iterable[str]) -> dict[str, float]:
    """How varied texts are, in percent: `distinct_1`, `distinct_2` (Li et al. 2016) and the share of texts that repeat themselves.

    distinct_n: different n-grams / all n-grams over all texts together. `repeated_bigrams`, `repeated_trigrams`: share of texts in
    which any n-gram of words stands twice. Words are split at spaces and compared without case; commas count with their word.
    """
    words = [text.lower().split() for text in texts]
    figures: dict[str, float] = {}
    for n in (1, 2):
        grams = [gram for text in words for gram in _ngrams(text, n)]
        figures[f"distinct_{n}"] = 100 * len(set(grams)) / max(len(grams), 1)
    for name, n in (("repeated_bigrams", 2), ("repeated_trigrams", 3)):
        repeating = sum(len(set(grams)) < len(grams) for grams in (_ngrams(text, n) for text in words))
        figures[name] = 100 * repeating / max(len(words), 1)
    return figures


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _check(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not outputs or len(outputs) != len(references) or not all(references):
        raise ValueError(f"{len(outputs)} texts with {len(references)} lists of references: each text needs at least one reference")
