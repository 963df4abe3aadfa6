"""Captions → token ids, and a tokenizer trained on the captions themselves.

Every row is start token, text, end token, padding; a text that is too long is cut so that the end token still stands.
The end token is an id of its own, so that a model learns where to stop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diptych.config import ConfigError
from diptych.token_files import clean_open_clip, load_files, load_open_clip
from diptych.vocabulary import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    import tokenizers

PAD, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unknown>"
"""Special tokens of a trained tokenizer, with the ids 0, 1, 2 and 3."""


class Tokenizer:
    """Encodes batches of texts; `vocabulary` counts its ids and reads them back."""

    def __init__(self, backend: tokenizers.Tokenizer, vocabulary: Vocabulary, clean: Callable[[str], str] | None = None) -> None:
        self.backend, self.vocabulary, self._clean = backend, vocabulary, clean

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids int64 [B, length], mask bool [B, length]: True on start, text and end)."""
        vocabulary = self.vocabulary
        ids = np.full((len(texts), length), vocabulary.pad, np.int64)
        filled = np.zeros(len(texts), np.int64)
        for row, inner in enumerate(self._inner(texts)):
            inner = inner[: length - 2]
            filled[row] = len(inner) + 2
            ids[row, : filled[row]] = [vocabulary.start, *inner, vocabulary.end]
        return ids, np.arange(length) < filled[:, None]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, start and end included, before any cut."""
        return [len(inner) + 2 for inner in self._inner(texts)]

    def _inner(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Ids of each text alone. A start or end token that stands in the text is left out: it would end the text in its middle."""
        cleaned = [self._clean(text) for text in texts] if self._clean else list(texts)
        special = {self.vocabulary.start, self.vocabulary.end}
        for encoding in self.backend.encode_batch(cleaned, add_special_tokens=False):
            yield encoding.ids if special.isdisjoint(encoding.ids) else [token for token in encoding.ids if token not in special]


@lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `open_clip`, of a hub name or of a folder; loaded once per process, without torch where its files allow it.

    Raises `ConfigError` where it has no start and end tokens, or is still to be trained.
    """
    # Threads inside a read worker only compete with the other workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if name.startswith("train:"):
        raise ConfigError(
            "task.tokenizer", name, "a tokenizer that is trained already", "`diptych train` trains it when the run is prepared."
        )
    if name == "open_clip" and (clip := load_open_clip()) is not None:
        size = clip.get_vocab_size()
        return Tokenizer(clip, Vocabulary(size, 0, size - 2, size - 1, load=lambda: clip), clean_open_clip)
    found = load_files(name)
    if found is not None:
        backend, special = found
        start, end = special.get("bos_token", special.get("cls_token")), special.get("eos_token", special.get("sep_token"))
        if start is not None and end is not None:
            pad = special.get("pad_token", end)
            return Tokenizer(backend, Vocabulary(backend.get_vocab_size(), pad, start, end, name, lambda: backend))
    # An older layout, which transformers has to convert; or nothing, which it says best.
    vocabulary = load_vocabulary(name)
    return Tokenizer(vocabulary.tokenizer.backend_tokenizer, vocabulary)


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
