"""What a model must know of its tokenizer: how many ids there are, which ones are special, and ids back to text.

Captions are turned into ids by the data plane; here ids are only counted, generated and read back. The tokenizer is
named as in `batches.TokenNeed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diptych.config import ConfigError

_TRAINED_PAD, _TRAINED_START, _TRAINED_END = 0, 1, 2


@dataclass(frozen=True)
class Vocabulary:
    """Size and special ids of a tokenizer."""

    size: int
    """Number of ids: every id is below it."""
    pad: int
    start: int
    end: int
    folder: str = ""
    """Folder or hub name of a Hugging Face tokenizer; empty for open_clip's BPE and for one that is not trained yet."""
    tokenizer: Any = None

    def decode(self, tokens: list[int]) -> str:
        """Ids of one text → its words: everything between the start token and the end token."""
        if self.tokenizer is None:
            raise ValueError("task.tokenizer is train:<size> and not trained yet; name the run's tokenizer folder")
        tokens = tokens[: tokens.index(self.end)] if self.end in tokens else tokens
        return " ".join(self.tokenizer.decode([token for token in tokens if token not in (self.pad, self.start)]).split())


def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of `open_clip`, of a tokenizer's folder or hub name, or of `train:<size>` before it is trained.

    A tokenizer that `train:<size>` asks for has at most that many ids; pad, start and end are 0, 1 and 2.
    """
    if name.startswith("train:"):
        return Vocabulary(int(name.removeprefix("train:")), _TRAINED_PAD, _TRAINED_START, _TRAINED_END)
    if name == "open_clip":
        from open_clip.tokenizer import SimpleTokenizer

        bpe = SimpleTokenizer()
        return Vocabulary(bpe.vocab_size, 0, bpe.sot_token_id, bpe.eot_token_id, tokenizer=bpe)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if start is None or end is None or tokenizer.pad_token_id is None:
        raise ConfigError(
            "task.tokenizer", name, "a tokenizer with start, end and pad tokens", "Set bos_token, eos_token and pad_token in its files."
        )
    return Vocabulary(len(tokenizer), tokenizer.pad_token_id, start, end, name, tokenizer)
