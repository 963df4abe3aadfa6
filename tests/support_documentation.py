"""Command blocks of the README and of docs/: where they stand, and how each is to be tested.

A block is fenced as `console`, `bash` or `sh`. A comment in the line before it says how it is tested: none = run as it stands, `slow` = run
by `make test-all`, `parse` = only checked (installing, clusters, published weights).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"(?:<!-- test: (?P<how>[a-z]+) -->\s*\n)?^```(?P<language>console|bash|sh)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block of commands."""

    page: Path
    line: int
    how: str
    """`run`, `slow` or `parse`."""
    text: str
    """Without prompts and continuation lines."""

    @property
    def name(self) -> str:
        """Page and line, for test ids."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Each command as words; comments and empty lines are left out."""
        return [words for line in self.text.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """Every command block of a page, from top to bottom."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        lines = [line.strip().removeprefix("$ ") for line in match["text"].replace("\\\n", " ").splitlines()]
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(page, line, match["how"] or "run", "\n".join(filter(None, lines)) + "\n"))
    return found


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
