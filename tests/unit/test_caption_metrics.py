"""Figures of captions and of retrieval: known answers, and no credit for collapsed features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.trainers.caption_metrics import caption_metrics, cider, exact_match
from diptych.trainers.retrieval import recall_at, retrieval_metrics


def test_perfect_captions_score_full_marks():
    captions = ["a red circle above a blue star", "two dogs run on a mat", "a green ring on a dark background"]
    figures = caption_metrics(captions, [[caption] for caption in captions])
    assert figures["bleu4"] == pytest.approx(100)
    assert figures["rouge_l"] == pytest.approx(100)
    assert figures["exact_match"] == 1
    assert figures.get("cider", 10) == pytest.approx(10)


def test_the_best_of_several_references_counts():
    references = [["a cat on a mat", "a cat sits on the mat"], ["a dog in the rain", "a wet dog"]]
    assert exact_match(["A cat sits  on the mat", "a dog"], references) == 0.5
    assert caption_metrics(["a cat sits on the mat", "a wet dog"], references)["rouge_l"] == pytest.approx(100)


def test_punctuation_and_case_do_not_separate_captions():
    assert exact_match(["Two dogs , running."], [["two dogs, running ."]]) == 1
    assert exact_match(["two dogs running"], [["two dogs, running"]]) == 0


def test_cider_weighs_rare_words_above_common_ones():
    if cider(["a b c d"], [["a b c d"]]) is None:
        pytest.skip("pycocoevalcap is not installed")
    truth = ["a picture of a zebra", "a picture of a truck", "a picture of a river"]
    references = [[caption] for caption in truth]
    wrong_filler = cider(["a photo of a zebra", *truth[1:]], references)
    wrong_noun = cider(["a picture of a truck", *truth[1:]], references)
    assert wrong_noun < wrong_filler < cider(truth, references)


def test_no_captions_are_refused():
    with pytest.raises(ValueError, match="at least one reference"):
        caption_metrics([], [])


def test_retrieval_of_matching_features_is_perfect_and_of_shuffled_ones_is_not():
    features = F.normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    tokens = torch.arange(60)[:, None]
    figures = retrieval_metrics(features, features, tokens)
    assert set(figures) == {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert all(value == 1 for value in figures.values())
    rolled = retrieval_metrics(features, features.roll(1, 0), tokens)
    assert rolled["image_to_text_r1"] == 0


def test_collapsed_features_score_chance():
    features = F.normalize(torch.ones(40, 4), dim=-1)
    found = recall_at(features, features, torch.arange(40))
    assert found == pytest.approx({1: 1 / 40, 5: 5 / 40, 10: 10 / 40})


def test_equal_captions_are_each_others_right_answer():
    image = torch.eye(4)
    text = torch.eye(4)[[1, 0, 2, 3]]
    assert recall_at(image, text, torch.tensor([0, 1, 2, 3]))[1] == 0.5
    assert recall_at(image, text, torch.tensor([7, 7, 2, 3]))[1] == 1.0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(0, 1000))
def test_recall_equals_a_plain_ranking(count, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, candidates = (F.normalize(torch.randn(count, 8, generator=generator), dim=-1) for _ in range(2))
    found = recall_at(queries, candidates, torch.arange(count), ks=(1, 3))
    ranks = [(queries[i] @ candidates.T).argsort(descending=True).tolist().index(i) for i in range(count)]
    assert found[1] == pytest.approx(sum(rank < 1 for rank in ranks) / count)
    assert found[3] == pytest.approx(sum(rank < 3 for rank in ranks) / count)
    assert found[1] <= found[3]
