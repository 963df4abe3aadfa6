"""Evaluation of a prompt model by the texts that it writes: from given keywords, and from a fixed prefix.

The keyword-aligned table sets strategies against how many keywords are given. Prompts with more than two commas are completed from their text through the first or the second comma. The output is cut to the
reference's number of keywords, the given keywords are dropped from both, and what is left is compared by ROUGE-L (stemmer on).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diptych.trainers.completion import Completer
from diptych.trainers.decoding import STRATEGIES, Decoding
from diptych.trainers.task import Evaluation, Table
from diptych.trainers.text_metrics import bleu, diversity, rouge, rouge_scorer

GIVEN = {"one_keyword": 1, "two_keywords": 2}
"""How much of a prompt is given."""


def keyword_prompts(texts: Sequence[str]) -> list[str]:
    """The texts that the table is made on: those with more than two commas."""
    return [text for text in texts if text.count(",") > 2]


def beginning(text: str, keywords: int) -> str:
    """The text through its comma number `keywords`, that comma included."""
    return ",".join(text.split(",")[:keywords]) + ","


def aligned(output: str, reference: str, keywords: int) -> tuple[str, str]:
    """Output cut to the reference's number of keywords, then both without the first `keywords` ones."""
    whole = reference.split(",")
    return ",".join(output.split(",")[keywords : len(whole)]).strip(), ",".join(whole[keywords:]).strip()


def keyword_rouge(outputs: Sequence[str], references: Sequence[str], keywords: int) -> float:
    """Mean F of ROUGE-L over aligned pairs, in percent."""
    score = rouge_scorer()
    values = []
    for output, reference in zip(outputs, references, strict=True):
        cut, rest = aligned(output, reference, keywords)
        values.append(score(rest, cut)["rougeL"].fmeasure)
    return 100 * float(np.mean(values))


def evaluate_prompts(
    completer: Completer, texts: Sequence[str], strategies: Mapping[str, Decoding] = STRATEGIES, samples: int = 200
) -> Evaluation:
    """The strategies table and the scores of greedy completions, on the first `samples` of the `texts` that have enough keywords.

    Metrics: `rouge_l_<strategy>_<given>` for every cell; of greedy completions from one keyword, BLEU, ROUGE-1, -2 and -L, diversity
    and `ended`, the share that ended by itself.
    """
    chosen = keyword_prompts(texts)[:samples]
    if not chosen:
        return Evaluation()
    evaluation = Evaluation()
    rows = []
    for name, decoding in strategies.items():
        row: list[float] = []
        found = {}
        for given, keywords in GIVEN.items():
            prompts = [beginning(text, keywords) for text in chosen]
            completions = [texts_of[0] for texts_of in completer.complete(prompts, decoding)]
            found[given] = completions
            row.append(keyword_rouge([one.text for one in completions], chosen, keywords))
            evaluation.metrics[f"rouge_l_{_key(name)}_{given}"] = row[-1]
        figures = diversity([one.text for one in found["one_keyword"]])
        ended = 100 * float(np.mean([one.ended for one in found["one_keyword"]]))
        rows.append([name, *row, *figures.values(), ended])
        if name == "greedy":
            pairs = [aligned(one.text, text, 1) for one, text in zip(found["one_keyword"], chosen, strict=True)]
            outputs, references = [output for output, _ in pairs], [[reference] for _, reference in pairs]
            evaluation.metrics |= bleu(outputs, references) | rouge(outputs, references) | figures | {"ended": ended}
    title = f"Keyword-aligned ROUGE-L and diversity in percent, {len(chosen)} prompts"
    evaluation.tables.append(Table(title, ["strategy", *GIVEN, *figures, "ended"], rows))
    return evaluation


def evaluate_prefix(completer: Completer, texts: Sequence[str], prefix: str, samples: int = 32) -> Evaluation:
    """Texts drawn from `prefix` as the report generator does (temperature 0.7, 35 tokens), against every held-out text that begins so.

    Metrics: BLEU (maximum over references, and corpus), ROUGE-1, -2 and -L, diversity, each `prefix_…`.
    """
    references = [text.removeprefix(prefix).strip() for text in texts if text.startswith(prefix)]
    if not references:
        return Evaluation()
    decoding = Decoding(sample=True, temperature=0.7, max_new_tokens=35, num_samples=samples, with_prompt=False)
    outputs = [one.text for one in completer.complete([prefix], decoding)[0]]
    figures = bleu(outputs, [references] * samples) | rouge(outputs, [references] * samples) | diversity(outputs)
    title = f"Texts from {prefix!r}, best of {len(references)} references"
    table = Table(title, ["figure", "value"], [[name, value] for name, value in figures.items()])
    return Evaluation({f"prefix_{name}": value for name, value in figures.items()}, [table])


def _key(strategy: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in strategy).replace("___", "_")
