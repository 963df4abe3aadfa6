"""Command blocks of the README and of docs/: where they stand, and how each is tested.

A block is fenced as `console`, `bash` or `sh`. A comment in the line before it says how it is tested: none = run as it stands, `slow` = run
by `make test-all`, `parse (WORD)` = only held against the command line, for the reason that `NOT_RUN` gives for the word. The blocks of a page
are run from top to bottom in one folder; `support_pages.py` says what the folder holds and what stands in for names that cannot be reached.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "environment": "makes or changes the environment that the tests themselves run in",
    "suite": "is the whole demo, suite or set of benchmarks; test_demo.py runs the first, CI the second",
    "page": "serves a page until it is stopped; test_mlflow_browser.py and test_studio_browser.py open it",
    "cluster": "needs a cloud account or a running cluster; test_submit.py and test_cluster.py have one of their own",
}
"""Why a block is not run."""
_BLOCK = re.compile(
    r"(?:<!-- test: (?P<how>[a-z]+)(?: \((?P<reason>[a-z]+)\))? -->\s*\n)?^```(?P<language>console|bash|sh)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
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
    reason: str = ""
    """Of a block that is not run, a word of `NOT_RUN`."""

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
        found.append(Block(page, line, match["how"] or "run", "\n".join(filter(None, lines)) + "\n", match["reason"] or ""))
    return found


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]
