"""`inspect`: the page counts what is there, shows it without a request to anywhere, and no caption becomes markup."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diptych.datasets.inspect import bars
from diptych.datasets.shards import ShardWriter
from diptych.pipelines import inspect


@pytest.fixture
def shards(tmp_path: Path) -> str:
    def jpeg(width: int, height: int) -> bytes:
        stream = BytesIO()
        Image.new("RGB", (width, height), (width % 255, 9, 9)).save(stream, "JPEG")
        return stream.getvalue()

    captions = ["a <script>alert(1)</script> cat", "a dog", "a dog", None, "ein Bär"]
    samples = [{"jpg": jpeg(10 + index, 20)} | ({"txt": text} if text else {}) for index, text in enumerate(captions)]
    samples.append({"jpg": b"no picture", "txt": "broken"})
    ShardWriter(str(tmp_path / "shards"), 4).write_all(samples)
    return str(tmp_path / "shards")


def test_the_page_shows_what_is_there(shards: str, tmp_path: Path) -> None:
    result = inspect.run(shards, str(tmp_path / "look.html"))
    assert result["samples_in"] == 6
    assert result["facts"]["captions"] == 5
    assert result["facts"]["distinct_captions"] == 4
    assert result["facts"]["unknown_sizes"] == 1
    assert result["repeated_captions"] == [("a dog", 2)]
    assert dict(result["words"])["a"] == 3
    assert dict(result["extensions"]) == {"jpg": 6, "json": 6, "txt": 5}
    assert dict(result["histograms"]["shorter side, pixels"]) == {str(side): 1 for side in range(10, 15)}
    page = (tmp_path / "look.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5
    assert "undecodable" in page or "picture" in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "ein Bär" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page


def test_the_same_seed_shows_the_same_samples(shards: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 5)):
        inspect.run(shards, str(tmp_path / name), pictures=2, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_an_empty_data_set_has_a_page_too(tmp_path: Path) -> None:
    ShardWriter(str(tmp_path / "shards"), 10).write_shard(0, [{"status": "failed_to_download"}])
    result = inspect.run(str(tmp_path / "shards"), str(tmp_path / "look.html"))
    assert result["samples_in"] == 0
    assert "failed downloads" in (tmp_path / "look.html").read_text()


@given(
    st.lists(st.one_of(st.integers(-(2**40), 2**40), st.floats(allow_nan=True, allow_infinity=True, width=32)), max_size=200), st.booleans()
)
def test_every_value_is_in_one_bar(values: list[float], whole: bool) -> None:
    array = np.array([int(value) for value in values if abs(value) < 2**62] if whole else values, np.int64 if whole else np.float64)
    assert sum(count for _, count in bars(array)) == int(np.isfinite(array).sum())
