"""The command blocks of the README and docs/, run top to bottom per page, as a reader would: the cheap ones always, all of them as slow tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support_documentation import ALL_BLOCKS, ROOT, Block
from support_pages import make_models, prepare, run_block
from support_web import WebServer, web_server

PAGES = {how: sorted({block.page for block in ALL_BLOCKS if block.how == how}) for how in ("run", "slow")}


def names(pages: list[Path]) -> list[str]:
    """Test ids."""
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes the stand-ins for published weights when a page first asks for them."""
    return functools.cache(lambda: make_models(tmp_path_factory.mktemp("models")))


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as running:
        yield running


def run_in_order(page: Path, blocks: list[Block], folder: Path, models: Callable[[], Path], server: WebServer) -> list[str]:
    """Run all, so that one look shows every block that does not work; returns those, with what they said."""
    prepare(page, blocks, folder, models, server)
    answers = [run_block(block, folder) for block in blocks]
    for answer in answers:
        print(f"{answer.block.name}: status {answer.status} after {answer.seconds:.0f} s")
    return [f"{answer.block.name}\n{answer.block.text}{answer.output[-4000:]}" for answer in answers if answer.status]


@pytest.mark.parametrize("page", PAGES["run"], ids=names(PAGES["run"]))
def test_cheap_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, models: Callable[[], Path], server: WebServer) -> None:
    blocks = [block for block in ALL_BLOCKS if block.page == page and block.how == "run"]
    failed = run_in_order(page, blocks, tmp_path, models, server)
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("page", PAGES["slow"], ids=names(PAGES["slow"]))
def test_all_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, models: Callable[[], Path], server: WebServer) -> None:
    blocks = [block for block in ALL_BLOCKS if block.page == page and block.how != "parse"]
    failed = run_in_order(page, blocks, tmp_path, models, server)
    assert not failed, "\n".join(failed)
