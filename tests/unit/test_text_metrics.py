"""Text figures, checked by hand-counted cases and by the libraries' own calls."""

from __future__ import annotations

import pytest
import sacrebleu

from diptych.trainers.completion import Completion
from diptych.trainers.decoding import Decoding
from diptych.trainers.prompt_evaluation import aligned, beginning, evaluate_prefix, evaluate_prompts, keyword_prompts, keyword_rouge
from diptych.trainers.text_metrics import bleu, diversity, rouge


def test_bleu_takes_the_best_reference_and_the_whole_corpus():
    outputs = ["the cat sat on the mat", "a dog runs in the park today"]
    references = [["no match here at all", "the cat sat on the mat"], ["a dog runs in a park today"]]
    figures = bleu(outputs, references)
    single = sacrebleu.sentence_bleu(outputs[1], references[1]).score
    assert figures["bleu_max"] == pytest.approx((100 + single) / 2)
    assert single < figures["bleu_corpus"] < 100
    assert bleu(outputs, [["the cat sat on the mat"], ["a dog runs in the park today"]])["bleu_corpus"] == pytest.approx(100)


def test_rouge_has_recall_precision_and_f():
    figures = rouge(["a red cat"], [["a red cat sleeps on chairs"]])
    assert figures["rouge1_recall"] == pytest.approx(50)
    assert figures["rouge1_precision"] == pytest.approx(100)
    assert figures["rouge1_f"] == pytest.approx(200 / 3)
    assert figures["rouge2_recall"] == pytest.approx(40)
    assert figures["rougeL_precision"] == pytest.approx(100)
    assert rouge(["running cats"], [["run cat"]])["rouge1_f"] == pytest.approx(100), "the stemmer is on"
    assert rouge(["x y"], [["a b", "x y"]])["rougeL_f"] == pytest.approx(100), "the best reference counts"


def test_texts_without_references_are_refused():
    with pytest.raises(ValueError, match="at least one reference"):
        bleu(["a"], [[]])
    with pytest.raises(ValueError, match="2 texts with 1 lists"):
        rouge(["a", "b"], [["a"]])


def test_diversity_counts_words():
    figures = diversity(["a b a b", "c d", "a a a a"])
    assert figures["distinct_1"] == pytest.approx(100 * 4 / 10)
    assert figures["distinct_2"] == pytest.approx(100 * 4 / 7)
    assert figures["repeated_bigrams"] == pytest.approx(200 / 3)
    assert figures["repeated_trigrams"] == pytest.approx(100 / 3)


def test_keywords_are_aligned_as_the_keyword_generator_does():
    text = "a castle, on a hill, oil painting, 8k, detailed"
    assert beginning(text, 1) == "a castle,"
    assert beginning(text, 2) == "a castle, on a hill,"
    output = "a castle, on a hill, by night, 4k, sharp, more, and more"
    assert aligned(output, text, 1) == ("on a hill, by night, 4k, sharp", "on a hill, oil painting, 8k, detailed")
    assert aligned(output, text, 2) == ("by night, 4k, sharp", "oil painting, 8k, detailed")
    assert keyword_prompts(["a, b, c", "a, b, c, d"]) == ["a, b, c, d"]
    assert keyword_rouge([text], [text], 1) == pytest.approx(100)
    assert keyword_rouge(["a castle, x, y, z, w"], [text], 1) == 0
    # LCS "oil painting": 2 of 4 words on both sides, the given keywords not counted.
    assert keyword_rouge(["a castle, on a hill, oil painting, x, y"], [text], 2) == pytest.approx(50)


class Parrot:
    """Completes every prompt with the same words; draws never repeat under sampling."""

    def complete(self, prompts: list[str], decoding: Decoding) -> list[list[Completion]]:
        tail = " fog, fog, fog" if decoding.sample else " oil, 8k, x, y"
        return [[Completion((prompt if decoding.with_prompt else "") + tail, 4, True)] * decoding.num_samples for prompt in prompts]


def test_the_table_has_a_row_per_strategy_and_both_amounts_of_keywords():
    texts = ["a, b", "cat, oil, 8k, soft light", "dog, ink, oil, 8k"]
    evaluation = evaluate_prompts(Parrot(), texts)  # type: ignore[arg-type]
    (table,) = evaluation.tables
    assert table.columns[:3] == ["strategy", "one_keyword", "two_keywords"]
    assert [row[0] for row in table.rows] == ["greedy", "no-repeat-3", "no-repeat-3 + beam 3", "temperature 0.7", "top-k 50", "top-p 0.9"]
    greedy, top_p = table.rows[0], table.rows[-1]
    # One keyword: "oil, 8k, x" against "oil, 8k, soft light" (2 of 3 and 4 words) and "ink, oil, 8k" (2 of 3 and 3).
    assert greedy[1] == pytest.approx(100 * (4 / 7 + 4 / 6) / 2)
    # Two: "oil, 8k" against "8k, soft light" (1 of 2 and 3 words), and against itself.
    assert greedy[2] == pytest.approx(100 * (2 / 5 + 1) / 2)
    assert top_p[1] == 0
    assert evaluation.metrics["rouge_l_top_p_0_9_one_keyword"] == 0
    assert evaluation.metrics["ended"] == 100
    assert evaluation.metrics["distinct_1"] == greedy[3]
    assert evaluate_prompts(Parrot(), ["too, few"]).tables == []  # type: ignore[arg-type]


def test_texts_from_a_prefix_meet_their_own_references():
    texts = ["'No Finding': fog, fog, fog", "'No Finding': clear lungs", "'Edema': fluid"]
    figures = evaluate_prefix(Parrot(), texts, "'No Finding':", samples=3).metrics  # type: ignore[arg-type]
    assert figures["prefix_bleu_max"] == pytest.approx(100)
    assert evaluate_prefix(Parrot(), texts, "'Nothing':").metrics == {}  # type: ignore[arg-type]
