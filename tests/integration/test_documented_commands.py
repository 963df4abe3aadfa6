"""The longer command blocks of the README and docs/, run top to bottom per page, as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support_documentation import ALL_BLOCKS, ROOT, Block

from diptych.pipelines import pack

PAGES_WITH_LONG_BLOCKS = sorted({block.page for block in ALL_BLOCKS if block.how == "slow"})


def test_there_are_long_blocks() -> None:
    assert PAGES_WITH_LONG_BLOCKS


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES_WITH_LONG_BLOCKS, ids=[str(page.relative_to(ROOT)) for page in PAGES_WITH_LONG_BLOCKS])
def test_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path) -> None:
    """Each block starts where the one before it ended, in a folder that holds `photos/` and `data/shards/`, as the pages assume."""
    make_photos(tmp_path / "photos", 120)
    pack.run(str(tmp_path / "photos"), str(tmp_path / "data" / "shards"))
    for block in (block for block in ALL_BLOCKS if block.page == page and block.how != "parse"):
        answer = run_block(block, tmp_path)
        assert answer.returncode == 0, f"{block.name}\n{answer.stdout}\n{answer.stderr}"


def make_photos(folder: Path, count: int) -> None:
    """Pictures with captions beside them, `00000.jpg` and `00000.txt`."""
    from diptych.datasets.scenes import render

    folder.mkdir()
    for index in range(count):
        image, caption = render(0, index, 96)
        image.save(folder / f"{index:05d}.jpg")
        (folder / f"{index:05d}.txt").write_text(caption)


def run_block(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """The block as a script, with the environment's programs on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
