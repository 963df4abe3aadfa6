"""Tokenizers straight from their files, through the `tokenizers` package alone.

A read worker needs ids and nothing else: transformers and open_clip would bring torch into every one of them, seconds at its start and
half a gigabyte while it lives. What is loaded here gives the same ids as the tokenizer of `diptych.vocabulary`, which the tasks use.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_MERGES = 49152 - 256 - 2


def load_files(name: str) -> tuple[tokenizers.Tokenizer, dict[str, int]] | None:
    """(tokenizer, ids of its special tokens by role) of a folder or a hub name; None where it has no `tokenizer.json` with roles.

    Roles are `bos_token`, `eos_token`, `pad_token`, `cls_token` and `sep_token`.
    """
    import tokenizers

    found = {file: _find(name, file) for file in _FILES}
    special: dict[str, str] = {}
    for path in (found["special_tokens_map.json"], found["tokenizer_config.json"]):
        for role, token in (json.loads(path.read_text()) if path else {}).items():
            content = token.get("content") if isinstance(token, dict) else token
            if role in ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token") and isinstance(content, str):
                special[role] = content
    if found["tokenizer.json"] is None or not special:
        return None
    backend = tokenizers.Tokenizer.from_file(str(found["tokenizer.json"]))
    ids = {role: backend.token_to_id(token) for role, token in special.items()}
    return backend, {role: token for role, token in ids.items() if token is not None}


def _find(name: str, file: str) -> Path | None:
    """A file of a tokenizer's folder, of the hub's cache, or of the hub."""
    if os.path.isdir(name):
        path = Path(name, file)
        return path if path.is_file() else None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, HFValidationError):  # not there, or no network: transformers then says what it misses
        return None


def load_open_clip() -> tokenizers.Tokenizer | None:
    """open_clip's BPE, from the vocabulary file in its package; None where open_clip is not installed.

    Source: open_clip/tokenizer.py, SimpleTokenizer. Texts go through `clean_open_clip` first.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(next(iter(package.submodule_search_locations)), "bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : _CLIP_MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(first + second for first, second in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<start_of_text>", "<end_of_text>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    split = pre_tokenizers.Split(tokenizers.Regex(_CLIP_PATTERN), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.Sequence([decoders.BPEDecoder(suffix="</w>"), decoders.ByteLevel()])
    return backend


def clean_open_clip(text: str) -> str:
    """open_clip's cleaning: mend mojibake, unescape HTML, collapse white space, lower case."""
    # There is nothing to mend in plain ASCII, and most captions are.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        import ftfy

        text = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _byte_letters() -> list[str]:
    """A printable letter for every byte, in the order of GPT-2's `bytes_to_unicode`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]
