"""From the columns of a row to its captions: which column, how many, through which template, cleaned how."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Sequence
from typing import Any

from diptych.config import ConfigError

IMAGE_COLUMNS = (
    "file_name",
    "image",
    "file",
    "image_path",
    "filename",
    "filepath",
    "path",
    "img",
    "image_name",
    "image_file",
    "imgId",
    "image_id",
    "url",
)
"""Columns taken for the image, the first that is there; `url` and ids are looked up as files beside the table."""
CAPTION_COLUMNS = (
    "text",
    "caption",
    "captions",
    "prompt",
    "additional_feature",
    "label_text",
    "description",
    "sentence",
    "sentences",
    "raw",
)
"""Columns taken for the caption, the first that is there."""


def choose_column(kind: str, asked: str, columns: Sequence[str], guesses: Sequence[str]) -> str:
    """The column asked for, or the first guess that is there, or empty. Raises `ConfigError` if the one asked for is missing."""
    if asked:
        if asked not in columns:
            raise ConfigError(f"--{kind}-column", asked, f"a column of the source: {', '.join(columns)}")
        return asked
    lowered = {column.lower(): column for column in columns}
    return next((lowered[guess.lower()] for guess in guesses if guess.lower() in lowered), "")


def check_template(template: str, columns: Sequence[str]) -> None:
    """Raise `ConfigError` if `template` names a column that the source lacks or is no format string."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError("--template", template, "text with {column} fields, such as '{label}:{text}'", str(error)) from None
    for name in names:
        if name not in columns:
            raise ConfigError("--template", template, f"fields among the columns {', '.join(columns)}", f"There is no column {name!r}.")


def apply_template(template: str, fields: dict[str, Any]) -> str:
    """`template` with each `{column}` replaced by its value, taken literally (no attribute access, no format codes)."""
    return "".join(
        literal + ("" if name is None or fields.get(name) is None else str(fields[name]).strip())
        for literal, name, _, _ in string.Formatter().parse(template)
    ).strip()


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in one cell: a string, a list of strings, or a list written as text (as csv exports have it)."""
    if value is None or isinstance(value, float):  # NaN stands for an empty cell
        return ()
    if isinstance(value, str) and value.startswith("[") and value.rstrip().endswith("]"):
        try:
            listed = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            listed = value
        value = listed if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed) else value
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        items = value if isinstance(value, list | tuple) else value.tolist()
        return tuple(text for item in items for text in captions_of(item.get("raw") if isinstance(item, dict) else item))
    text = str(value).strip()
    return (text,) if text else ()


def clean_keywords(text: str) -> str:
    """A prompt as a tidy list of keywords: `_` and repeated spaces → one space, `4 k` → `4k`, no spaces around `-`,
    `, ` between keywords, no comma at the ends. Source: the keyword generator on Stable-Diffusion-Prompts.
    """
    text = re.sub(r"\s+", " ", text.replace("_", " "))
    text = re.sub(r"\b(\d+) k\b", r"\1k", text)
    text = re.sub(r" *- *", "-", text)
    text = re.sub(r" *,[ ,]*", ", ", text)
    return text.strip(" ,")
