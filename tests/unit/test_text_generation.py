"""Generation: token for token what transformers' `generate` gives, draws by number, stops that a reader sees."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from diptych.config import ConfigError, apply_overrides
from diptych.trainers.completion import Completer
from diptych.trainers.decoding import STRATEGIES, Decoding
from diptych.trainers.gpt2_steps import GPT2Steps
from diptych.trainers.text_generation import Prompts, generate, truncate

END = 0


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    """A random GPT-2 sharp enough to have an opinion, with few enough tokens to end now and then."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def prompts(padded: bool, count: int = 12, length: int = 7) -> Prompts:
    """Random prompts, of unequal lengths if `padded`."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 24, (count, length), generator=generator)
    lengths = torch.arange(count) % length + 1 if padded else torch.full((count,), length)
    mask = torch.arange(length) >= length - lengths[:, None]
    return Prompts(tokens * mask, mask, torch.arange(count))


CASES = [
    {},
    {"no_repeat_ngram": 2},
    {"repetition_penalty": 1.3},
    {"num_beams": 3},
    {"num_beams": 3, "no_repeat_ngram": 3, "num_samples": 2},
    {"num_beams": 4, "length_penalty": 0.3, "num_samples": 4},
    {"num_beams": 2, "length_penalty": 2.0, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_generate_of_transformers(model, case, padded):
    if padded and "repetition_penalty" in case:
        pytest.skip("transformers punishes the padding token as if it were text")
    given, decoding = prompts(padded), Decoding(max_new_tokens=25, **case)
    ours = generate(GPT2Steps(model), given, END, decoding)
    peer = model.generate(
        given.tokens, attention_mask=given.mask.long(), max_new_tokens=25, do_sample=False, pad_token_id=END, num_beams=decoding.num_beams,
        num_return_sequences=decoding.num_samples, no_repeat_ngram_size=decoding.no_repeat_ngram,
        repetition_penalty=decoding.repetition_penalty, length_penalty=decoding.length_penalty,
    )[:, 7:]  # fmt: skip
    expected = [row[: row.index(END)] if END in row else row for row in peer.tolist()]
    received = [one.tokens for texts in ours for one in texts]
    assert received == expected
    ended = [one.ended for texts in ours for one in texts]
    assert ended == [END in row for row in peer.tolist()]
    assert any(ended)


@pytest.mark.parametrize(("case", "warpers"), [
    ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    ({"top_k": 5}, [TopKLogitsWarper(5)]),
    ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    ({"temperature": 1.5, "top_k": 9, "top_p": 0.6}, [TemperatureLogitsWarper(1.5), TopKLogitsWarper(9), TopPLogitsWarper(0.6)]),
])  # fmt: skip
def test_truncated_distributions_equal_those_of_transformers(case, warpers):
    scores = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) * 2
    expected = scores
    for warper in warpers:
        expected = warper(None, expected)
    torch.testing.assert_close(truncate(scores, Decoding(sample=True, **case)), expected)


def test_draws_follow_the_distribution(model):
    given = Prompts(torch.full((4000, 1), 5), torch.ones(4000, 1, dtype=torch.bool), torch.arange(4000))
    first = [
        one.tokens[0] if one.tokens else END for (one,) in generate(GPT2Steps(model), given, END, Decoding(sample=True, max_new_tokens=1))
    ]
    with torch.no_grad():
        expected = model(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    counted = torch.bincount(torch.tensor(first), minlength=24) / 4000
    assert (counted - expected).abs().max() < 0.03


def test_a_text_depends_on_seed_and_number_alone(model):
    given, decoding = prompts(padded=False), Decoding(sample=True, num_samples=3, max_new_tokens=20)
    whole = generate(GPT2Steps(model), given, END, decoding)
    rows = torch.tensor([7, 2])
    assert generate(GPT2Steps(model), given.take(rows), END, decoding) == [whole[7], whole[2]]
    other = generate(GPT2Steps(model), given, END, decoding.model_copy(update={"seed": 1}))
    assert other != whole
    assert len({tuple(one.tokens) for one in whole[0]}) == 3


def test_greedy_with_cache_equals_greedy_without(model):
    given = prompts(padded=False, count=3)
    for row, (text,) in zip(given.tokens, generate(GPT2Steps(model), given, END, Decoding(max_new_tokens=15)), strict=True):
        tokens = row[None]
        for token in text.tokens:
            with torch.no_grad():
                assert model(tokens).logits[0, -1].argmax() == token
            tokens = torch.cat([tokens, torch.tensor([[token]])], 1)


@pytest.fixture(scope="module")
def completer(model) -> Completer:
    """Letters as tokens: what comes out is gibberish whose commas count."""
    letters = ["<end>", *"abcdefghijklmnopqrstu", ",", " "]
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    return Completer(GPT2Steps(model), fast, positions=64, device=torch.device("cpu"))


def test_texts_come_back_in_the_order_of_their_prompts(completer):
    given = ["abc", "a", "abcdefgh", "bc", "ba,"]
    decoding = Decoding(max_new_tokens=12)
    together = completer.complete(given, decoding, batch_size=2)
    assert [texts[0].text[: len(prompt)] for texts, prompt in zip(together, given, strict=True)] == given
    assert [texts[0].text for texts in together] == [completer.complete([prompt], decoding)[0][0].text for prompt in given]
    bare = completer.complete(given, decoding.model_copy(update={"with_prompt": False}))
    assert [prompt + texts[0].text for prompt, texts in zip(given, bare, strict=True)] == [texts[0].text.strip() for texts in together]


def test_parts_of_a_file_get_the_texts_of_the_whole(completer):
    given = ["abc", "abd", "abe", "abf"]
    decoding = Decoding(max_new_tokens=12, sample=True, num_samples=2)
    whole = completer.complete(given, decoding)
    assert completer.complete(given[2:], decoding, numbers=[2, 3]) == whole[2:]


def test_texts_stop_at_the_number_of_keywords(completer):
    given = ["a,b", "ab", "q,"]
    decoding = Decoding(max_new_tokens=60, sample=True, temperature=30, num_samples=40)
    free = completer.complete(given, decoding)
    cut = completer.complete(given, decoding.model_copy(update={"keywords": 3}))
    pairs = [(one, other) for texts, others in zip(free, cut, strict=True) for one, other in zip(texts, others, strict=True)]
    assert sum(one.text.count(",") > 2 for one, _ in pairs) > 10
    for one, other in pairs:
        assert other.text == ",".join(one.text.split(",")[:3])
        assert other.tokens <= one.tokens
    enough = completer.complete(["a, b, c, d, e"], decoding.model_copy(update={"keywords": 3}))
    assert {one.text for one in enough[0]} == {"a, b, c, d, e"}


def test_texts_stop_before_a_string(completer):
    free = completer.complete(["abc"], Decoding(max_new_tokens=40, with_prompt=False))[0][0].text
    needle = free[10:12]
    cut = completer.complete(["abc"], Decoding(max_new_tokens=40, with_prompt=False, stop=needle))[0][0]
    assert cut.text == free[: free.index(needle)].strip()
    assert cut.tokens <= 12


def test_texts_stop_at_the_models_positions(completer):
    (long,), (short,) = completer.complete(["ab" * 31, "a"], Decoding(max_new_tokens=500, sample=True, temperature=0.5))
    assert len(long.text) <= 64
    assert long.tokens <= 2
    assert short.tokens <= 63
    crowd = completer.complete(["ab" * 31] + ["a"] * 30, Decoding(max_new_tokens=500, sample=True, temperature=0.5))
    assert len(crowd[0][0].text) <= 64
    assert max(texts[0].tokens for texts in crowd) > 20


def test_wrong_prompts_are_named(completer):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        completer.complete(["a", " "], Decoding())
    with pytest.raises(ValueError, match="prompt 1 holds <end>, which ends a text"):
        completer.complete(["a", "ab<end>c"], Decoding())
    with pytest.raises(ValueError, match="prompt 0 has 80 tokens, the model holds 64"):
        completer.complete(["a" * 80], Decoding())


def test_contradictions_are_refused():
    assert list(STRATEGIES) == ["greedy", "no-repeat-3", "no-repeat-3 + beam 3", "temperature 0.7", "top-k 50", "top-p 0.9"]
    for override, key in (("temperature=0.5", "temperature"), ("num_samples=2", "num_samples"), ("top_k=3", "top_k")):
        with pytest.raises(ConfigError, match=key):
            apply_overrides(Decoding(), [override])
    with pytest.raises(ConfigError, match="num_beams"):
        apply_overrides(Decoding(), ["num_beams=2", "sample=true"])
