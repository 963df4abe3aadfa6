"""The grid picture of a sweep: each trial's newest samples at its place, with what it was trained with beneath."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_WIDTH, _LINE, _GAP = 288, 15, 8
"""Pixels: of a cell, of a line of its label, between cells."""


@dataclass(frozen=True)
class Cell:
    """A trial's place in the grid."""

    row: int
    column: int
    picture: Path | None
    """Its samples; None = it made none, and the cell says so."""
    label: list[str]
    """Lines beneath."""


def compose(cells: Sequence[Cell]) -> Image.Image:
    """One RGB picture of all cells; each row is as high as its highest picture."""
    from PIL import Image, ImageDraw

    pictures = [_fitted(cell.picture) for cell in cells]
    rows, columns = max(cell.row for cell in cells) + 1, max(cell.column for cell in cells) + 1
    lines = max(len(cell.label) for cell in cells)
    heights = [max([p.height for cell, p in zip(cells, pictures, strict=True) if cell.row == row] or [0]) for row in range(rows)]
    tops = [_GAP + sum(heights[:row]) + row * (lines * _LINE + 2 * _GAP) for row in range(rows + 1)]
    sheet = Image.new("RGB", (_GAP + columns * (_WIDTH + _GAP), tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for cell, picture in zip(cells, pictures, strict=True):
        left, top = _GAP + cell.column * (_WIDTH + _GAP), tops[cell.row]
        sheet.paste(picture, (left, top))
        for number, line in enumerate(cell.label):
            draw.text((left, top + heights[cell.row] + 2 + number * _LINE), line, fill="black")
    return sheet


def _fitted(path: Path | None) -> Image.Image:
    """The picture at a cell's width; an empty field for none."""
    from PIL import Image, ImageDraw

    if path is None:
        empty = Image.new("RGB", (_WIDTH, _WIDTH // 2), "#dddddd")
        ImageDraw.Draw(empty).text((_GAP, _GAP), "no pictures", fill="black")
        return empty
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    how = Image.Resampling.LANCZOS if picture.width > _WIDTH else Image.Resampling.NEAREST
    return picture.resize((_WIDTH, max(1, round(picture.height * _WIDTH / picture.width))), how)
