"""Files by path and URL: listings, ranged reads, and a web server and an object store that misbehave."""

from __future__ import annotations

import functools
import http.server
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from diptych.config import ConfigError
from diptych.datasets import ranged, storage
from diptych.datasets.manifest import open_manifest

CONTENT = bytes(os.urandom(1 << 20))
FAULTS = ("drop", "reset", "503", "429", "short")


class FlakyHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder with Range support, and fails each ranged read as the test's plan says, once."""

    protocol_version = "HTTP/1.1"
    plan: dict[int, str]
    requests: list[str]

    def do_GET(self):
        wanted = self.headers.get("Range")
        if wanted is None:
            super().do_GET()
            return
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        if not os.path.exists(self.translate_path(self.path)):
            self.send_error(404)
            return
        with open(self.translate_path(self.path), "rb") as file:
            file.seek(first)
            data = file.read(last - first + 1)
            size = os.fstat(file.fileno()).st_size
        self.requests.append(wanted)
        fault = self.plan.pop(first, "")
        if first >= size:
            self.send_error(416)
        elif fault.isdigit():
            self.send_error(int(fault))
        elif fault == "drop":
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for stream in (self.rfile, self.wfile, self.connection):
                stream.close()
        elif fault == "stall":
            time.sleep(5)
            self.close_connection = True
        else:
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "short" else data)
            self.close_connection = fault == "short"

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        """Broken connections are the point of these tests."""


@pytest.fixture
def web(tmp_path, monkeypatch):
    """(URL of a served folder, the plan of faults by offset, the list of ranges asked for, the folder)."""
    monkeypatch.setattr(ranged, "FIRST_DELAY_SECONDS", 0.01)
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(CONTENT)
    handler = type("Handler", (FlakyHandler,), {"plan": {}, "requests": []})
    server = Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.plan, handler.requests, folder
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_one_network_error_at_18_offsets_changes_no_byte(web):
    url, plan, requests, _ = web
    offsets = [57_003 * index for index in range(18)]
    plan |= {offset: FAULTS[index % len(FAULTS)] for index, offset in enumerate(offsets)}
    exact = [storage.read_range(f"{url}/00000.tar", offset, 3_001) == CONTENT[offset : offset + 3_001] for offset in offsets]
    assert exact == [True] * 18
    assert not plan
    assert len(requests) >= 36  # each offset was asked for again


def test_a_stalled_server_is_asked_again(web, monkeypatch):
    monkeypatch.setattr(ranged, "STALL_SECONDS", 1)
    url, plan, requests, _ = web
    plan[100] = "stall"
    assert storage.read_range(f"{url}/00000.tar", 100, 10) == CONTENT[100:110]
    assert len(requests) == 2


def test_errors_are_healed_under_many_threads(web):
    url, plan, _, _ = web
    offsets = list(range(0, 1_000_000, 13_001))
    plan |= {offset: FAULTS[index % len(FAULTS)] for index, offset in enumerate(offsets[::2])}
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda offset: storage.read_range(f"{url}/00000.tar", offset, 500), offsets))
    assert parts == [CONTENT[offset : offset + 500] for offset in offsets]


def test_reads_into_memory_of_the_callers_give_the_same_bytes(web, tmp_path):
    url, plan, _, _ = web
    plan[500] = "503"
    (tmp_path / "local.tar").write_bytes(CONTENT)
    for place in (str(tmp_path / "local.tar"), f"{url}/00000.tar"):
        buffer = memoryview(bytearray(3_000))
        ranged.read_into(place, 500, buffer)
        assert bytes(buffer) == CONTENT[500:3_500]
        with pytest.raises(ranged.PermanentReadError, match="the file ends at 1048576"):
            ranged.read_into(place, len(CONTENT) - 10, buffer)


def test_spent_retries_name_the_place(web):
    url, plan, _, _ = web
    plan[7] = "503"
    with pytest.raises(storage.ReadError) as caught:
        storage.read_range(f"{url}/00000.tar", 7, 11, retries=0)
    error = caught.value
    assert (error.url, error.offset, error.size) == (f"{url}/00000.tar", 7, 11)
    assert isinstance(error, OSError)
    again = pickle.loads(pickle.dumps(error))
    assert (again.url, again.offset, again.size, str(again)) == (error.url, 7, 11, str(error))


def test_a_dead_server_is_a_read_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(storage.ReadError, match="offset 0"):
        storage.read_range(f"http://127.0.0.1:{port}/00000.tar", 0, 10, retries=1)


def test_what_no_repetition_can_mend_fails_at_once(web, monkeypatch):
    url, plan, requests, _ = web
    monkeypatch.setattr(ranged.time, "sleep", lambda _: pytest.fail("waited for a repetition"))
    with pytest.raises(FileNotFoundError):
        storage.read_range(f"{url}/missing.tar", 0, 10)
    with pytest.raises(storage.PermanentReadError, match=f"ends at {len(CONTENT)}"):
        storage.read_range(f"{url}/00000.tar", len(CONTENT) - 5, 10)
    with pytest.raises(storage.PermanentReadError, match="416"):
        storage.read_range(f"{url}/00000.tar", len(CONTENT), 10)
    plan[50] = "403"
    with pytest.raises(storage.PermanentReadError, match="403"):
        storage.read_range(f"{url}/00000.tar", 50, 10)
    assert len(requests) == 3


def test_a_server_without_ranges_is_refused(tmp_path):
    (tmp_path / "00000.tar").write_bytes(CONTENT)
    handler = functools.partial(
        type("Plain", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=str(tmp_path)
    )
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(storage.PermanentReadError, match="Range"):
            storage.read_range(f"http://127.0.0.1:{server.server_address[1]}/00000.tar", 10, 10)
        server.shutdown()


def test_web_folders_and_patterns(web):
    url, _, _, folder = web
    for name in ("00001.tar", "00002.tar", "notes.txt"):
        (folder / name).write_bytes(b"x")
    tars = [f"{url}/0000{index}.tar" for index in range(3)]
    assert storage.list_shards(url) == tars
    assert storage.list_shards(f"{url}/{{00000..00002}}.tar") == tars
    assert storage.list_shards(f"{url}/00001.tar") == tars[1:2]
    facts = storage.stat_many([*tars, f"{url}/missing.tar"])
    assert [fact and fact.size for fact in facts] == [len(CONTENT), 1, 1, None]
    with pytest.raises(ConfigError, match="brace pattern"):
        storage.list_shards(f"{url}/nowhere")


def test_a_manifest_over_a_failing_web_server_equals_the_local_one(web, tmp_path, monkeypatch):
    url, plan, requests, folder = web
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for index in range(40):
                for ext in ("jpg", "txt"):
                    info = tarfile.TarInfo(f"{shard:05d}{index:03d}.{ext}")
                    info.size = 700
                    archive.addfile(info, io.BytesIO(b"x" * 700))
    local = open_manifest(str(folder), str(tmp_path / "local"))
    monkeypatch.setattr("diptych.datasets.tar.REMOTE_WINDOW", 40_000)
    monkeypatch.chdir(tmp_path)
    plan |= {0: "503", 39_936: "drop", 79_872: "short"}
    remote = open_manifest(url)
    assert not plan
    assert (remote.digest, remote.faults, remote.samples) == (local.digest, [], 120)
    assert remote.folder.startswith(str(tmp_path / ".diptych" / "manifests"))
    asked = len(requests)
    assert open_manifest(url).digest == local.digest
    assert len(requests) == asked  # nothing was walked again


@pytest.fixture(scope="module")
def bucket():
    """URL of a bucket on moto's S3 server."""
    pytest.importorskip("s3fs", reason="extra `s3` is not installed")
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    import fsspec
    import s3fs

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.filesystem("s3").mkdir("shards")
    yield "s3://shards"
    s3fs.S3FileSystem.clear_instance_cache()
    patch.undo()
    server.stop()


def test_object_store(bucket, tmp_path):
    for name in ("set/00000.tar", "set/00001.tar", "set/00001.parquet"):
        storage.write_bytes(f"{bucket}/{name}", CONTENT[: 1 << 16])
    (tmp_path / "2").write_bytes(b"third")
    storage.upload(str(tmp_path / "2"), f"{bucket}/set/00002.tar")
    tars = [f"{bucket}/set/0000{index}.tar" for index in range(3)]
    assert storage.list_shards(f"{bucket}/set") == tars
    assert storage.list_shards(f"{bucket}/set/*1.tar") == tars[1:2]
    assert storage.list_shards(f"{bucket}/set/{{00000..00002}}.tar") == tars
    assert [fact and fact.size for fact in storage.stat_many([tars[0], f"{bucket}/set/9.tar", tars[2]])] == [1 << 16, None, 5]
    assert storage.read_range(tars[1], 1000, 77) == CONTENT[1000:1077]
    assert storage.read_bytes(tars[2]) == b"third"
    before = storage.stat(tars[2])
    storage.write_bytes(tars[2], b"other")
    assert storage.stat_many([tars[2]])[0].stamp != before.stamp
    with pytest.raises(storage.PermanentReadError):
        storage.read_range(tars[2], 3, 10)
    with pytest.raises(FileNotFoundError):
        storage.read_range(f"{bucket}/set/missing.tar", 0, 1)
    with pytest.raises(ConfigError, match="missing"):
        storage.list_shards(f"{bucket}/missing")
    storage.remove(tars[2])
    assert not storage.exists(tars[2])


def test_ranges_are_coalesced_and_come_in_order(tmp_path, monkeypatch):
    path = str(tmp_path / "a.tar")
    storage.write_bytes(path, CONTENT)
    reads = []
    alone, into = ranged._pread, ranged._pread_into
    monkeypatch.setattr(ranged, "_pread", lambda url, offset, size: reads.append((offset, size)) or alone(url, offset, size))
    monkeypatch.setattr(ranged, "_pread_into", lambda url, offset, buffer: reads.append((offset, len(buffer))) or into(url, offset, buffer))
    ranges = [(5000, 10), (0, 100), (90, 60), (5000, 10), (200, 0), (900_000, 5)]
    assert storage.read_ranges(path, ranges, gap=1000) == [CONTENT[offset : offset + size] for offset, size in ranges]
    assert reads == [(0, 200), (5000, 10), (900_000, 5)]
    reads.clear()
    storage.read_ranges(path, [(0, 100), (100, 100)], gap=1000, most_bytes=150)
    assert len(reads) == 2
    # Two that are read in turn have memory of their own.
    pairs = [storage.iter_ranges(path, [(start, 50), (start + 50, 50)]) for start in (0, 7000)]
    found = [[next(pair)[1] for pair in pairs] for _ in range(2)]
    assert found == [[CONTENT[start + add : start + add + 50] for start in (0, 7000)] for add in (0, 50)]


def test_local_reads_follow_a_replaced_file(tmp_path):
    path = str(tmp_path / "a.tar")
    storage.write_bytes(path, b"old content")
    assert storage.read_range(path, 0, 3) == b"old"
    storage.write_bytes(path, b"new content")
    assert storage.read_range(path, 0, 3) == b"new"
    with pytest.raises(storage.PermanentReadError, match="ends at 11"):
        storage.read_range(path, 8, 10)


def test_descriptors_are_bounded_and_shared_by_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(ranged, "_files", ranged._FileCache(4))
    paths = [str(tmp_path / f"{index}.tar") for index in range(20)]
    for index, path in enumerate(paths):
        storage.write_bytes(path, bytes([index]) * 100)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda index: storage.read_range(paths[index % 20], index % 50, 50), range(2000)))
    assert all(part == bytes([index % 20]) * 50 for index, part in enumerate(parts))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    storage.write_bytes(str(path), b"old")
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_local_lists(tmp_path):
    for name in ("b.tar", "a.tar", ".hidden.tar", "c.txt", "x{0..1}.tar"):
        (tmp_path / name).write_bytes(b"")
    folder = str(tmp_path)
    assert [os.path.basename(shard) for shard in storage.list_shards(folder)] == ["a.tar", "b.tar", "x{0..1}.tar"]
    assert storage.list_shards(f"file://{folder}/[a]*.tar") == [f"{folder}/a.tar"]
    assert storage.list_shards(f"{folder}/{{b,a}}.tar") == [f"{folder}/a.tar", f"{folder}/b.tar"]
    assert storage.list_shards(f"{folder}/x{{0..1}}.tar") == [f"{folder}/x{{0..1}}.tar"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("nowhere", "does not exist"),
        ("nowhere.tar", "does not exist"),
        ("empty", "no .tar files"),
        ("a.tar.gz", "decompress"),
        ("{0..1}.tar", "does not exist"),
        ("*.tar", "no .tar files"),
        ("{a..c}.tar", "whole numbers"),
        ("", "Name the shards"),
    ],
)
def test_wrong_locations_are_refused_with_a_remedy(name, remedy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=remedy):
        storage.list_shards(str(tmp_path / name) if name else "")


def test_braces_expand_as_in_a_shell():
    assert list(storage.expand_braces("{008..011}-{a,b}")) == [f"{number:03d}-{letter}" for number in range(8, 12) for letter in "ab"]
    assert list(storage.expand_braces("{8..10}")) == ["8", "9", "10"]
    assert list(storage.expand_braces("plain{x}")) == ["plain{x}"]
