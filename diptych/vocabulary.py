"""Tokenizers by name, for both planes: how many ids there are, which ones are special, and ids back to text.

The data plane turns captions into ids with it (`datasets/tokens.py`), the training plane sizes models by it and reads back
what they generate. A tokenizer is named as in `batches.TokenNeed`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diptych.config import ConfigError
from diptych.token_files import load_files

_TRAINED_PAD, _TRAINED_START, _TRAINED_END = 0, 1, 2


@dataclass(frozen=True)
class Vocabulary:
    """Size and special ids of a tokenizer."""

    size: int
    """Number of ids: every id is below it."""
    pad: int
    """The end token's id, where a tokenizer has no pad token of its own."""
    start: int
    end: int
    folder: str = ""
    """Folder or hub name of a Hugging Face tokenizer; empty for open_clip's BPE and for one that is not trained yet."""
    load: Callable[[], Any] | None = field(default=None, compare=False)
    """Loads the tokenizer; None for one that is not trained yet."""

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first asked for: with transformers that takes a second, and training may never ask. None before it is trained."""
        return self.load() if self.load is not None else None

    def decode(self, tokens: list[int]) -> str:
        """Ids of one text → its words: everything between the start token and the end token."""
        if self.tokenizer is None:
            raise ValueError("task.tokenizer is train:<size> and not trained yet; name the run's tokenizer folder")
        tokens = tokens[: tokens.index(self.end)] if self.end in tokens else tokens
        return " ".join(self.tokenizer.decode([token for token in tokens if token not in (self.pad, self.start)]).split())

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without start and end tokens and however long."""
        if self.tokenizer is None:
            raise ValueError("task.tokenizer is train:<size> and not trained yet; name the run's tokenizer folder")
        if not self.folder:
            return list(self.tokenizer.encode(text))
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of `open_clip`, of a tokenizer's folder or hub name (`org/repo`, or `org/repo/folder`), or of `train:<size>` before it is trained.

    A tokenizer that `train:<size>` asks for has at most that many ids; pad, start and end are 0, 1 and 2.
    """
    if name.startswith("train:"):
        return Vocabulary(int(name.removeprefix("train:")), _TRAINED_PAD, _TRAINED_START, _TRAINED_END)
    if name == "open_clip":
        from diptych.clip_library import open_clip

        bpe = open_clip.SimpleTokenizer()
        return Vocabulary(bpe.vocab_size, 0, bpe.sot_token_id, bpe.eot_token_id, load=lambda: bpe)
    if os.path.isdir(name) and (found := load_files(name)) is not None:
        backend, special = found
        # A role that the files leave out may still be one of the tokenizer's class, which transformers knows.
        if {"pad_token", "bos_token", "eos_token"} <= special.keys():
            roles = (special["pad_token"], special["bos_token"], special["eos_token"])
            return Vocabulary(backend.get_vocab_size(), *roles, name, functools.partial(_tokenizer, name))
    tokenizer = _tokenizer(name)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if start is None or end is None:
        raise ConfigError("task.tokenizer", name, "a tokenizer with start and end tokens", "Set bos_token and eos_token in its files.")
    # GPT-2 has no pad token; padding is masked wherever it matters, so the end token serves.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    return Vocabulary(len(tokenizer), pad, start, end, name, lambda: tokenizer)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    # `org/repo/tokenizer` is a folder inside a repository of the hub.
    parts = name.split("/") if not os.path.isdir(name) else [name]
    inside = {"subfolder": "/".join(parts[2:])} if len(parts) > 2 and parts[0] not in ("", ".", "..", "~") else {}
    return AutoTokenizer.from_pretrained("/".join(parts[:2]) if inside else name, **inside)
