"""`ingest` without Ray: lists in every format, one shard by img2dataset, its second pass, commits that survive a kill, pages."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support_web import WebServer, picture, web_server

from diptych.batches import Fault
from diptych.config import ConfigError, build
from diptych.datasets import ingest, pages
from diptych.datasets.ingest import IngestOptions, read_outcome, recover, run_shard
from diptych.datasets.ingest_list import UrlList
from diptych.datasets.ingest_sets import SETS
from diptych.datasets.manifest import open_manifest

pytest.importorskip("img2dataset")


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server() as running:
        running.slow_seconds = 2.5
        yield running


def options(**changes: Any) -> IngestOptions:
    return build(IngestOptions, {"size": 32, "samples_per_shard": 10, "timeout_seconds": 1, "threads": 16} | changes)


def write_list(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in the format of the path's ending."""
    names = list(rows[0])
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    if kind == "txt":
        text = "\n".join(row["url"] for row in rows) + "\n"
    elif kind == "json":
        text = json.dumps(rows)
    elif kind == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows) + "\n"
    else:
        separator = "," if kind == "csv" else "\t"
        quote = '"{}"'.format
        text = "\n".join(separator.join(quote(row[name]) for name in names) for row in [dict(zip(names, names, strict=True)), *rows]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def mixed(server: WebServer, count: int = 10) -> list[dict[str, Any]]:
    kinds = ("image", "missing", "image", "redirect", "text", "small", "forbidden", "flaky", "slow", "image")
    return [{"url": f"{server.url}/{kinds[number % 10]}/{number}", "caption": f"thing {number}"} for number in range(count)]


def statuses(out: Path, shard: int = 0) -> dict[str, str]:
    rows = pq.read_table(out / f"{shard:05d}.parquet", columns=["key", "status"]).to_pylist()
    return {row["key"]: row["status"] for row in rows}


def members(out: Path, shard: int = 0) -> list[str]:
    with tarfile.open(out / f"{shard:05d}.tar") as tar:
        return sorted(tar.getnames())


def all_of(found: UrlList, out: Path, chosen: IngestOptions, retry: bool = False) -> list[ingest.ShardOutcome]:
    return [run_shard(job) for job in found.jobs(str(out), chosen, set(), retry)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "a.txt", "a.csv.gz", "a.jsonl.gz"])
def test_every_format_gives_the_same_shards(tmp_path: Path, server: WebServer, name: str) -> None:
    rows = [{"url": f"{server.url}/image/{number}", "caption": f"thing, {number}"} for number in range(13)]
    chosen = options()
    found = UrlList.open(write_list(tmp_path / name, rows), chosen, str(tmp_path / "scratch"))
    outcomes = all_of(found, tmp_path / "out", chosen)
    assert [(outcome.count, outcome.successes) for outcome in outcomes] == [(10, 10), (3, 3)]
    manifest = open_manifest(str(tmp_path / "out"))
    assert manifest.faults == []
    captions = manifest.column("caption").to_pylist()
    by_key = dict(zip(manifest.column("key").to_pylist(), captions, strict=True))
    expected = {f"{number:06d}": None if name == "a.txt" else f"thing, {number}" for number in range(13)}
    assert by_key == expected


def test_a_list_on_a_web_server_and_a_folder_of_lists(tmp_path: Path, server: WebServer) -> None:
    rows = [{"TEXT": f"thing {number}", "URL": f"{server.url}/image/{number}"} for number in range(3)]
    chosen = options()
    listed = Path(write_list(tmp_path / "list.csv", rows))
    server.files["/lists/list.csv"] = ("text/csv", listed.read_bytes(), {})
    found = UrlList.open(f"{server.url}/lists/list.csv", chosen, str(tmp_path / "scratch"))
    assert (found.url_column, found.caption_column) == ("URL", "TEXT")
    assert sum(outcome.successes for outcome in all_of(found, tmp_path / "remote", chosen)) == 3
    folder = tmp_path / "folder"
    folder.mkdir()
    for part in range(2):
        write_list(folder / f"part-{part}.parquet", rows)
    outcomes = all_of(UrlList.open(str(folder), chosen, ""), tmp_path / "parts", chosen)
    assert [(outcome.shard, outcome.count) for outcome in outcomes] == [(0, 3), (1, 3)]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"address": "x", "caption": "y"}], {}, "url_column"),
        ([{"url": "x", "words": "y"}], {"caption_column": "caption"}, "url, words"),
        ([{"url": "x", "caption": "y"}], {"save_columns": ("licence",)}, "licence"),
        ([{"url": "x", "status": "y"}], {"save_columns": ("status",)}, "status"),
    ],
)
def test_missing_columns_are_named(tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UrlList.open(write_list(tmp_path / "a.csv", rows), options(**changes), "")


def test_lists_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        UrlList.open(str(tmp_path / "nothing.csv"), options(), "")
    with pytest.raises(ConfigError, match="list-sets"):
        UrlList.open(str(tmp_path), options(), "")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ConfigError, match="readable parquet"):
        UrlList.open(str(tmp_path / "broken.parquet"), options(), "")


def test_faults_stand_in_the_parquet_and_the_second_pass_gets_what_came_back(tmp_path: Path, server: WebServer) -> None:
    chosen = options(min_image_size=20)
    found = UrlList.open(write_list(tmp_path / "a.csv", mixed(server)), chosen, "")
    out = tmp_path / "out"
    (first,) = all_of(found, out, chosen)
    assert (first.count, first.successes, first.failed_to_download, first.failed_to_resize) == (10, 4, 4, 2)
    before = statuses(out)
    taken = [key for key, status in before.items() if status == "success"]
    assert sorted(taken) == ["000000", "000002", "000003", "000009"]
    assert before["000006"] == "failed_to_download"  # forbidden by header
    jpeg_before = read_member(out, "000002.jpg")

    server.healed = True
    server.slow_seconds = 0
    asked = server.asked.copy()
    (second,) = all_of(found, out, chosen, retry=True)

    assert (second.count, second.successes, second.failed_to_download, second.failed_to_resize) == (10, 6, 2, 2)
    assert second.recovered == 2
    after = statuses(out)
    assert len(after) == 10
    assert {key for key in after if after[key] != before[key]} == {"000007", "000008"}
    assert members(out) == sorted(f"{key}.{ending}" for key in [*taken, "000007", "000008"] for ending in ("jpg", "json", "txt"))
    assert read_member(out, "000002.jpg") == jpeg_before
    assert json.loads(read_member(out, "000007.json"))["key"] == "000007"
    assert read_member(out, "000008.txt") == b"thing 8"
    assert {path for path in server.asked if server.asked[path] != asked[path]} == {"/missing/1", "/forbidden/6", "/flaky/7", "/slow/8"}
    manifest = open_manifest(str(out))
    assert manifest.faults == []
    assert manifest.samples == 6


def read_member(out: Path, name: str, shard: int = 0) -> bytes:
    with tarfile.open(out / f"{shard:05d}.tar") as tar:
        member = tar.extractfile(name)
        assert member is not None
        return member.read()


def test_headers_may_be_disregarded_only_on_request(tmp_path: Path, server: WebServer) -> None:
    chosen = options(disallowed_header_directives=())
    found = UrlList.open(write_list(tmp_path / "a.csv", [{"url": f"{server.url}/forbidden/1", "caption": "a"}]), chosen, "")
    assert [outcome.successes for outcome in all_of(found, tmp_path / "out", chosen)] == [1]


def test_hashes_are_verified(tmp_path: Path, server: WebServer) -> None:
    import hashlib

    good = hashlib.md5(picture(1)).hexdigest()
    rows = [{"url": f"{server.url}/image/{number}", "caption": "a", "md": good} for number in (1, 2)]
    chosen = options(compute_hash="md5", verify_hash_column="md")
    found = UrlList.open(write_list(tmp_path / "a.csv", rows), chosen, "")
    (outcome,) = all_of(found, tmp_path / "out", chosen)
    assert statuses(tmp_path / "out") == {"000000": "success", "000001": "failed_to_download"}
    assert outcome.status == {"success": 1, "hash mismatch": 1}


def test_a_kill_between_renames_is_finished_by_the_next_call(tmp_path: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(min_image_size=20)
    found = UrlList.open(write_list(tmp_path / "a.csv", mixed(server)), chosen, "")
    out = tmp_path / "out"
    all_of(found, out, chosen)
    server.healed = True
    replace, calls = os.replace, []

    def dies_after_one(source: Any, target: Any) -> None:
        if str(target).startswith(str(out / "0")):
            if calls:
                raise KeyboardInterrupt
            calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies_after_one)
        with pytest.raises(KeyboardInterrupt):
            all_of(found, out, chosen, retry=True)
    assert read_outcome(str(out), 0).successes == 4  # the tar is new, the statistics are not
    recover(str(out))
    assert read_outcome(str(out), 0).successes == 5
    assert not (out / "_tmp").exists()
    assert open_manifest(str(out)).faults == []


def test_a_shard_whose_rows_img2dataset_lost_is_an_error_and_leaves_nothing(
    tmp_path: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from img2dataset.writer import WebDatasetSampleWriter

    write = WebDatasetSampleWriter.write

    def loses_one(self: Any, img_str: Any, key: str, caption: Any, meta: Any) -> None:
        if key.endswith("3"):
            raise TypeError("not JSON serializable")  # img2dataset prints this and goes on
        write(self, img_str, key, caption, meta)

    monkeypatch.setattr(WebDatasetSampleWriter, "write", loses_one)
    chosen = options()
    rows = [{"url": f"{server.url}/image/{number}", "caption": "a"} for number in range(5)]
    found = UrlList.open(write_list(tmp_path / "a.csv", rows), chosen, "")
    with pytest.raises(RuntimeError, match="4 of 5 rows"):
        all_of(found, tmp_path / "out", chosen)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_tmp"]


def test_named_sets_are_calls_that_would_be_accepted() -> None:
    assert set(SETS) == {"mscoco", "sbucaptions", "cc3m", "laion400m", "laion5b", "diffusiondb"}
    for name, known in SETS.items():
        assert known.command(name).startswith("diptych pack" if name == "diffusiondb" else "diptych ingest")
        build(IngestOptions, known.options)


PAGE = """<html><head><base href="/art/"></head><body>
<img src="apple.jpg" alt="a  red
apple"><img src="data:image/gif;base64,R0" alt="tracker"><img data-src="/pear.jpg" title="a pear">
<figure><img src="http://other.example/plum.jpg" alt="DSC_1"><figcaption>Two <b>plums</b> &amp; a leaf</figcaption></figure>
<img srcset="s.jpg 100w, l.jpg 900w" src="s.jpg" alt="large"><img src="apple.jpg#top"><img src="bare.jpg">
<figure><img src="x.jpg" alt="kept"><figcaption> </figcaption></figure></body></html>"""


def test_images_of_a_page_have_captions_and_absolute_urls() -> None:
    found = pages.images_of(PAGE, "http://site.example/index.html")
    assert [(image.url, image.caption) for image in found] == [
        ("http://site.example/art/apple.jpg", "a red apple"),
        ("http://site.example/pear.jpg", "a pear"),
        ("http://other.example/plum.jpg", "Two plums & a leaf"),
        ("http://site.example/art/l.jpg", "large"),
        ("http://site.example/art/bare.jpg", ""),
        ("http://site.example/art/x.jpg", "kept"),
    ]
    assert pages.images_of('<meta name="ROBOTS" content="nofollow, NoImageIndex">' + PAGE, "http://site.example/") == []


def test_pages_are_read_politely_and_only_where_permitted(server: WebServer) -> None:
    html = b'<img src="/image/1" alt="one">'
    server.files["/robots.txt"] = ("text/plain", b"User-agent: *\nDisallow: /private/\nCrawl-delay: 1\n", {})
    for path in ("/a.html", "/b.html", "/private/c.html"):
        server.files[path] = ("text/html", html, {})
    server.files["/tagged.html"] = ("text/html", html, {"X-Robots-Tag": "noimageindex"})
    wanted = [f"{server.url}{path}" for path in ("/a.html", "/private/c.html", "/b.html", "/tagged.html", "/gone.html")]
    found = list(pages.read_pages([*wanted, "ftp://x/y"], delay_seconds=0.05))
    kinds = [item.kind if isinstance(item, Fault) else item.page.rpartition("/")[2] for item in found]
    assert kinds == ["a.html", "forbidden_page", "b.html", "forbidden_page", "unreadable_page", "bad_page"]
    assert server.asked["/private/c.html"] == 0
    times = dict(server.times)
    assert times["/b.html"] - times["/a.html"] >= 0.99


def test_a_host_that_hides_its_rules_is_left_alone(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/a.html"] = ("text/html", b'<img src="/image/1" alt="one">', {})
    (found,) = pages.read_pages([f"{server.url}/a.html"], delay_seconds=0)  # no robots.txt at all: permitted
    assert isinstance(found, pages.FoundImage)
    shutdown = f"http://127.0.0.1:{server.server_port + 1 if server.server_port < 65535 else 1}"
    (fault,) = pages.read_pages([f"{shutdown}/a.html"], delay_seconds=0)
    assert isinstance(fault, Fault)
    assert fault.kind == "forbidden_page"


def test_leftovers_of_a_killed_shard_are_removed(tmp_path: Path) -> None:
    (tmp_path / "_tmp" / "3.abc" / "made").mkdir(parents=True)
    (tmp_path / "_tmp" / "3.abc" / "made" / "00003.tar").write_bytes(b"half")
    recover(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
