"""Captions become ids that end, and a tokenizer trained here is one that transformers loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.config import ConfigError
from diptych.datasets.tokens import load_tokenizer, train_tokenizer
from diptych.vocabulary import load_vocabulary

CAPTIONS = ["a red circle above two blue squares", "a green star left of a yellow triangle"]


def test_open_clip_ids_are_open_clips_own() -> None:
    import open_clip

    texts = ["a cat", "", "naïve café " * 60, "4k, don't &amp;amp; I'LL  ① ½ 日本 🎨", "mojibake: schÃ¶n \x1b[31mred", "tab\tand\u200bmore"]
    ids, mask = load_tokenizer("open_clip").encode(texts, 20)
    np.testing.assert_array_equal(ids, open_clip.get_tokenizer("ViT-B-32")(texts, context_length=20).numpy())
    assert mask.sum(1).tolist()[:3] == [4, 2, 20]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bpe")
    train_tokenizer(CAPTIONS, 512, folder)
    return str(folder)


@given(text=st.text(max_size=40), length=st.integers(2, 50))
@settings(deadline=None, max_examples=60)
def test_every_row_starts_and_ends_and_the_rest_is_padding(bpe: str, text: str, length: int) -> None:
    tokenizer = load_tokenizer(bpe)
    vocabulary = tokenizer.vocabulary
    ids, mask = tokenizer.encode([text], length)
    assert ids.shape == mask.shape == (1, length)
    row = ids[0][mask[0]]
    assert row[0] == vocabulary.start
    assert row[-1] == vocabulary.end
    assert (ids[0][~mask[0]] == vocabulary.pad).all()
    assert vocabulary.end != vocabulary.pad


def test_special_tokens_in_a_text_do_not_end_it(bpe: str) -> None:
    tokenizer = load_tokenizer(bpe)
    plain, marked = (tokenizer.encode([text], 20)[0][0].tolist() for text in ("a red circle", "<start>a red<end> circle<end>"))
    assert plain == marked
    assert plain.count(tokenizer.vocabulary.end) == 1
    assert tokenizer.lengths(["a red circle", ""]) == [plain.index(tokenizer.vocabulary.end) + 1, 2]


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp")), max_size=20))
@settings(deadline=None, max_examples=60)
def test_bytes_survive_the_round_trip(bpe: str, text: str) -> None:
    tokenizer = load_tokenizer(bpe)
    ids, _ = tokenizer.encode([text], 200)
    assert tokenizer.vocabulary.decode(ids[0].tolist()) == " ".join(text.split())


def test_a_small_vocabulary_is_of_words_and_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer(CAPTIONS, 64, tmp_path / "a")
    train_tokenizer(CAPTIONS, 64, tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_text() == (tmp_path / "b/tokenizer.json").read_text()
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "a"))
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert len(loaded) == 4 + len(set(" ".join(CAPTIONS).split()))


def test_a_tokenizer_that_is_not_trained_yet_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train:512.*trained"):
        load_tokenizer("train:512")


def test_bpe_without_room_for_its_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least train:260"):
        train_tokenizer(CAPTIONS, 100, tmp_path, kind="bpe")


@pytest.mark.parametrize("size", [64, 512])
def test_ids_are_those_that_the_tasks_know(tmp_path: Path, size: int) -> None:
    train_tokenizer(CAPTIONS, size, tmp_path)
    light, full = load_tokenizer(str(tmp_path)).vocabulary, load_vocabulary(str(tmp_path))
    assert (light.size, light.pad, light.start, light.end) == (full.size, full.pad, full.start, full.end)
    ids, mask = load_tokenizer(str(tmp_path)).encode(CAPTIONS, 40)
    for row, kept, text in zip(ids, mask, CAPTIONS, strict=True):
        assert row[kept][1:-1].tolist() == full.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert light.decode(row.tolist()) == full.decode(row.tolist()) == text


def test_a_read_worker_needs_no_torch_for_ids(tmp_path: Path) -> None:
    train_tokenizer(CAPTIONS, 64, tmp_path)
    code = (
        "import sys; from diptych.datasets.tokens import load_tokenizer;"
        f"[load_tokenizer(name).encode(['a red circle'], 8) for name in ('open_clip', {str(tmp_path)!r})];"
        "print([name for name in ('torch', 'transformers', 'open_clip') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("size", [64, 512])
def test_a_task_counts_ids_without_transformers(tmp_path: Path, size: int) -> None:
    """It takes a second to import in every training worker, which may never decode a text."""
    train_tokenizer(CAPTIONS, size, tmp_path)
    code = "import sys; from diptych.vocabulary import load_vocabulary; found = load_vocabulary(sys.argv[1]); "
    code += "print('transformers' in sys.modules, found.size, found.pad, found.start, found.end); print(found.decode([found.start, 5, 6, found.end]))"
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout.splitlines()
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(str(tmp_path))
    numbers = [len(whole), whole.pad_token_id, whole.bos_token_id, whole.eos_token_id]
    assert answer[0].split() == ["False", *map(str, numbers)]
    assert answer[1:] == [" ".join(whole.decode([5, 6]).split())]


def test_a_role_that_only_the_tokenizers_class_knows_is_found(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(str(tmp_path / "whole"))
    vocabulary = load_vocabulary(str(tmp_path / "whole"))
    assert (vocabulary.size, vocabulary.pad, vocabulary.start, vocabulary.end) == (7, 0, 2, 3)
