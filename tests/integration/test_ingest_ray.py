"""`ingest` on Ray beside img2dataset itself: the same counts and samples; killed and run again, the same set."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support_web import WebServer, web_server

from diptych.datasets.manifest import open_manifest
from diptych.pipelines import ingest

pytest.importorskip("img2dataset")

URLS = 300
OPTIONS: dict[str, Any] = {"size": 32, "samples_per_shard": 50, "timeout_seconds": 2, "threads": 32, "min_image_size": 20}
PEER = """
import sys
from img2dataset import download
if __name__ == "__main__":
    download(url_list=sys.argv[1], output_folder=sys.argv[2], input_format="csv", url_col="url", caption_col="caption",
             output_format="webdataset", image_size=32, number_sample_per_shard=50, timeout=2, thread_count=32, min_image_size=20,
             processes_count=1)
"""


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as running:
        running.slow_seconds = 6
        yield running


def write_list(path: Path, server: WebServer, count: int = URLS) -> str:
    """A list with every kind of answer, and repeats."""
    random = np.random.default_rng(0)
    kinds = ["missing", "redirect", "text", "small", "forbidden", "flaky", "slow"]
    lines = ["url,caption"]
    for number in range(count):
        kind = kinds[number // 10 % len(kinds)] if number % 10 == 3 else "image"
        number = int(random.integers(number)) if number % 17 == 5 else number
        lines.append(f'{server.url}/{kind}/{number},"thing {number}, in a row"')
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def samples(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Key → status, stored bytes and caption, of every row of every shard."""
    found: dict[str, tuple[Any, ...]] = {}
    for table in sorted(folder.glob("*.parquet")):
        with tarfile.open(table.with_suffix(".tar")) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        rows = pq.read_table(table, columns=["key", "status", "url", "caption", "sha256"]).to_pylist()
        assert not {row["key"] for row in rows} & found.keys()
        for row in rows:
            key = row["key"]
            content = (contents.get(f"{key}.jpg"), contents.get(f"{key}.txt"))
            found[key] = (row["status"], row["url"], row["caption"], row["sha256"], *content)
        assert len(contents) == 3 * sum(row["status"] == "success" for row in rows)
    return found


@pytest.mark.parametrize("count", [URLS, pytest.param(1000, marks=pytest.mark.slow)])
def test_counts_equal_img2datasets_own_and_both_are_read_alike(ray_session: Any, server: WebServer, tmp_path: Path, count: int) -> None:
    urls = write_list(tmp_path / "urls.csv", server, count)
    (tmp_path / "peer.py").write_text(PEER)
    peer = subprocess.Popen(
        [sys.executable, "peer.py", urls, "peer"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"WANDB_MODE": "disabled"},
    )
    result = ingest.run(urls, str(tmp_path / "ours"), OPTIONS, jobs=2)
    assert peer.wait(timeout=200) == 0

    theirs, ours = samples(tmp_path / "peer"), samples(tmp_path / "ours")
    assert ours == theirs
    counts = Counter(status for status, *_ in ours.values())
    assert (result["samples_in"], result["samples_out"]) == (count, counts["success"])
    assert (result["failed_to_download"], result["failed_to_resize"]) == (counts["failed_to_download"], counts["failed_to_resize"])
    assert result["faults"] == []
    assert set(result["status"]) == status_of(tmp_path / "peer")
    manifests = [open_manifest(str(tmp_path / name)) for name in ("peer", "ours")]
    assert [manifest.faults for manifest in manifests] == [[], []]
    assert manifests[0].samples == manifests[1].samples == counts["success"]
    assert manifests[0].failed_downloads == manifests[1].failed_downloads == counts["failed_to_download"]
    for column in ("key", "caption"):
        values = [dict(zip(each.column("key").to_pylist(), each.column(column).to_pylist(), strict=True)) for each in manifests]
        assert values[0] == values[1]


def status_of(folder: Path) -> set[str]:
    return {status for path in folder.glob("*_stats.json") for status in json.loads(path.read_text())["status_dict"]}


def test_the_second_pass_gets_what_came_back(ray_session: Any, server: WebServer, tmp_path: Path) -> None:
    urls, out = write_list(tmp_path / "urls.csv", server), tmp_path / "out"
    first = ingest.run(urls, str(out), OPTIONS, jobs=2)
    before = samples(out)
    server.healed = True
    server.slow_seconds = 0
    second = ingest.run(urls, str(out), OPTIONS, jobs=2, retry_failed=True)
    after = samples(out)
    came_back = {key for key, (status, url, *_) in before.items() if status != "success" and ("/flaky/" in url or "/slow/" in url)}
    assert len(came_back) >= 5
    assert {key for key in after if after[key] != before[key]} == came_back
    assert second["recovered"] == len(came_back)
    assert second["samples_out"] == first["samples_out"] + len(came_back)
    assert second["shards_skipped"] == first["shards"]
    assert open_manifest(str(out)).faults == []


def test_a_shard_that_cannot_be_made_is_a_fault_and_the_rest_goes_on(ray_session: Any, server: WebServer, tmp_path: Path) -> None:
    urls, out = write_list(tmp_path / "urls.csv", server, 150), tmp_path / "out"
    server.slow_seconds = 0
    ingest.run(urls, str(out), OPTIONS, jobs=2)
    for ending in (".tar", ".parquet", "_stats.json"):
        (out / f"00001{ending}").unlink()
    (out / "00001.tar").mkdir()  # a folder stands where the tar must go
    result = ingest.run(urls, str(out), OPTIONS, jobs=2, shard_retries=1)
    assert [(fault["shard"], fault["kind"]) for fault in result["faults"]] == [("00001.tar", "failed_shard")]
    assert "tried 2 times" in result["faults"][0]["detail"]
    assert result["shards"] == 2
    (out / "00001.tar").rmdir()
    again = ingest.run(urls, str(out), OPTIONS, jobs=2)
    assert (again["shards"], again["samples_in"], again["faults"]) == (3, 150, [])
    assert not (out / "_tmp").exists()


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_is_the_same_set(ray_session: Any, server: WebServer, tmp_path: Path) -> None:
    urls = write_list(tmp_path / "urls.csv", server)
    server.slow_seconds = 0
    ingest.run(urls, str(tmp_path / "whole"), OPTIONS, jobs=2)
    server.delay_seconds = 0.3
    out = tmp_path / "killed"
    flags = [
        "--size",
        "32",
        "--samples-per-shard",
        "50",
        "--timeout-seconds",
        "2",
        "--threads",
        "32",
        "--min-image-size",
        "20",
        "--jobs",
        "1",
    ]
    command = [sys.executable, "-m", "diptych.pipelines.ingest", urls, str(out), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(list(out.glob("*_stats.json"))) < 2:
        assert time.monotonic() < deadline, "the call made no shard in time"
        assert process.poll() is None, "the call ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    time.sleep(3)  # its Ray ends with it
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*_stats.json")}
    assert 2 <= len(done) < 6
    server.delay_seconds = 0
    result = ingest.run(urls, str(out), OPTIONS, jobs=2)
    assert result["shards_skipped"] == len(done)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert samples(out) == samples(tmp_path / "whole")
    assert {path.name for path in out.iterdir() if not path.name[0].isdigit()} == {"ingest.json"}


def test_pages_become_a_list_and_then_shards(ray_session: Any, server: WebServer, tmp_path: Path) -> None:
    server.files["/robots.txt"] = ("text/plain", b"User-agent: *\nDisallow: /hidden\n", {})
    for page in range(2):
        html = "".join(f'<img src="/image/{page * 10 + number}" alt="thing {page * 10 + number}">' for number in range(4))
        server.files[f"/page{page}.html"] = ("text/html", html.encode(), {})
    pages = tmp_path / "pages.txt"
    pages.write_text(f"{server.url}/page0.html\n{server.url}/hidden.html\n{server.url}/page1.html\n")
    out = tmp_path / "out"
    listed, faults = ingest.list_from_pages(str(pages), str(out), delay_seconds=0.01)
    assert [fault["kind"] for fault in faults] == ["forbidden_page"]
    result = ingest.run(listed, str(out), {"size": 32})
    assert (result["samples_in"], result["samples_out"]) == (8, 8)
    assert sorted(open_manifest(str(out)).column("caption").to_pylist()) == sorted(f"thing {n}" for n in (0, 1, 2, 3, 10, 11, 12, 13))
