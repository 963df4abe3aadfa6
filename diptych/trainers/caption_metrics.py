"""Figures of generated captions against the true ones: BLEU-4, ROUGE-L, CIDEr, exact match. No torch here.

BLEU and ROUGE are in percent, as sacrebleu gives them; CIDEr is pycocoevalcap's score (10 is the most a caption can get
there); exact match is a share.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

from diptych.trainers.text_metrics import bleu, rouge

_WORDS = re.compile(r"\w+|[^\w\s]")


def normalised(text: str) -> str:
    """Lower case, single spaces between words and punctuation: what two captions are compared by."""
    return " ".join(_WORDS.findall(text.lower()))


def exact_match(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of captions that equal one of their references, up to case and spacing."""
    hits = [normalised(output) in {normalised(one) for one in many} for output, many in zip(outputs, references, strict=True)]
    return sum(hits) / max(len(hits), 1)


def cider(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """CIDEr-D of the corpus (Vedantam et al. 2015) by pycocoevalcap's scorer; None where it is not installed.

    Words are split by `normalised`, not by the Java tokenizer of the COCO server, whose figures differ slightly.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        return None
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for output, many in zip(outputs, references, strict=True):
        scorer += (normalised(output), [normalised(one) for one in many])
    return float(scorer.compute_score()[0])


def caption_metrics(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu4`, `rouge_l`, `exact_match`, and `cider` where pycocoevalcap (the extra `text-metrics`) is installed.

    `references[i]` holds the true captions of `outputs[i]`, at least one.
    """
    figures = {
        "bleu4": bleu(outputs, references)["bleu_corpus"],
        "rouge_l": rouge(outputs, references)["rougeL_f"],
        "exact_match": exact_match(outputs, references),
    }
    score = cider(outputs, references)
    return figures if score is None else figures | {"cider": score}
