"""Captions → token ids, and a tokenizer trained on the captions themselves.

Every row is start token, text, end token, padding; a text that is too long is cut so that the end token still stands.
The end token is an id of its own, so that a model learns where to stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diptych.config import ConfigError
from diptych.vocabulary import Vocabulary, load_vocabulary

PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unknown>"
"""Special tokens of a trained tokenizer, with the ids 0, 1, 2 and 3."""


class Tokenizer:
    """Encodes batches of texts with a `Vocabulary`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids int64 [B, length], mask bool [B, length]: True on start, text and end)."""
        vocabulary = self.vocabulary
        ids = np.full((len(texts), length), vocabulary.pad, np.int64)
        mask = np.zeros((len(texts), length), bool)
        for row, inner in enumerate(self._inner(texts, length)):
            filled = len(inner) + 2
            ids[row, :filled] = [vocabulary.start, *inner, vocabulary.end]
            mask[row, :filled] = True
        return ids, mask

    def _inner(self, texts: Sequence[str], length: int) -> Iterable[list[int]]:
        """Ids of each text without special tokens, at most `length` - 2 of them."""
        tokenizer = self.vocabulary.tokenizer
        if self.vocabulary.folder:
            found = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=length - 2) if texts else {"input_ids": []}
            return found["input_ids"]
        return (tokenizer.encode(text)[: length - 2] for text in texts)


@lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `open_clip`, of a hub name or of a folder; loaded once per process.

    Raises `ConfigError` where it has no start and end tokens, or is still to be trained.
    """
    vocabulary = load_vocabulary(name)
    if vocabulary.tokenizer is None:
        raise ConfigError(
            "task.tokenizer", name, "a tokenizer that is trained already", "`diptych train` trains it when the run is prepared."
        )
    return Tokenizer(vocabulary)


def train_tokenizer(
    captions: Iterable[str], vocabulary_size: int, folder: Path, kind: Literal["auto", "bpe", "word"] = "auto", lower_case: bool = False
) -> None:
    """Train a tokenizer of at most `vocabulary_size` ids on `captions` and save it for `AutoTokenizer.from_pretrained`.

    `bpe` is byte-level and encodes any text; `word` splits at spaces and punctuation and maps rare words to one id; `auto` is
    `word` below 512 ids, where bytes leave BPE no room. The same captions give the same tokenizer.
    """
    if kind == "auto":
        kind = "word" if vocabulary_size < 512 else "bpe"
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, START, END, UNKNOWN]
    trainer: Any
    if kind == "bpe":
        if vocabulary_size < len(special) + 256:
            raise ConfigError(
                "task.tokenizer", f"train:{vocabulary_size}", f"at least train:{len(special) + 256}: byte-level BPE needs every byte"
            )
        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        fast.post_processor = processors.ByteLevel(trim_offsets=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    else:
        fast = Fast(models.WordLevel(unk_token=UNKNOWN))
        fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordLevelTrainer(vocab_size=vocabulary_size, special_tokens=special, show_progress=False)
    if lower_case:
        fast.normalizer = normalizers.Lowercase()
    fast.train_from_iterator(captions, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=PAD, bos_token=START, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(str(folder))
