"""Files by path or fsspec URL: shard lists, names, whole reads, atomic writes, sizes. Ranged reads live in `ranged.py`.

Everything above this module takes locations as strings and does not care where they lie. A listing is always sorted,
so that the same folder gives the same data set on every machine.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import multiprocessing
import os
import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from diptych.config import ConfigError
from diptych.datasets.ranged import (
    READ_RETRIES,
    PermanentReadError,
    ReadError,
    file_system,
    is_local,
    iter_ranges,
    local_path,
    read_range,
    read_ranges,
    with_retries,
)

__all__ = [
    "FileFacts",
    "PermanentReadError",
    "ReadError",
    "absolute",
    "exists",
    "file_system",
    "is_local",
    "iter_ranges",
    "join",
    "list_shards",
    "local_path",
    "locked",
    "parent",
    "read_bytes",
    "read_range",
    "read_ranges",
    "remove",
    "replace_file",
    "size",
    "stat",
    "stat_many",
    "sync_files",
    "temporary_path",
    "upload",
    "write_bytes",
]

ALLOWED_SHARDS = "a folder of .tar files, one .tar, a glob, or a brace pattern such as 's3://bucket/{00000..00099}.tar'"
_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")


@dataclass(frozen=True)
class FileFacts:
    """What a listing knows of a file."""

    size: int
    """Bytes; -1 where the server does not say."""
    stamp: str
    """Changes when the file is written again: modification time, ETag, or what the file system offers."""


def absolute(url: str) -> str:
    """`url` as an absolute path, or unchanged if it is remote."""
    return os.path.abspath(local_path(url)) if is_local(url) else url


def join(base: str, *names: str) -> str:
    """`base/name/…`, for paths and URLs."""
    if not base:
        return "/".join(names)
    return "/".join([base.rstrip("/"), *(name.strip("/") for name in names)])


def parent(url: str) -> str:
    """Folder of `url`; the working folder for a bare name."""
    head = url.rstrip("/").rpartition("/")[0]
    return head or ("/" if url.startswith("/") else ".")


def list_shards(location: str) -> list[str]:
    """Every tar of a folder, glob, brace pattern or single file, sorted.

    Raises `ConfigError` if there is none, or if a local tar that a brace pattern names is missing.
    """
    if not location:
        raise ConfigError("shards", location, ALLOWED_SHARDS, "Name the shards: `data.shards=FOLDER`, or the verb's SHARDS argument.")
    literal = is_local(location) and os.path.exists(local_path(location))
    patterns = [location] if literal else list(expand_braces(location))
    if len(patterns) == 1:
        return _list_one(absolute(patterns[0]), literal)
    shards = [shard for pattern in patterns for shard in _list_one(absolute(pattern), literal)]
    return sorted(set(shards))


def expand_braces(pattern: str) -> Iterator[str]:
    """Every string that `{a,b}` and `{000..012}` stand for; zero padding is kept, as in a shell."""
    found = _BRACES.search(pattern)
    if not found:
        yield pattern
        return
    head, body, tail = pattern[: found.start()], found.group(1), pattern[found.end() :]
    first, dots, last = body.partition("..")
    if dots and first.isdigit() and last.isdigit():
        low, high = int(first), int(last)
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        choices: Iterator[str] = (str(number).zfill(width) for number in range(low, high + 1))
    elif dots and "," not in body:
        raise ConfigError("shards", pattern, "braces such as {00000..00099} or {a,b}", "The ends of a range are whole numbers.")
    else:
        choices = iter(body.split(","))
    for choice in choices:
        yield from expand_braces(head + choice + tail)


def read_bytes(url: str, retries: int = READ_RETRIES) -> bytes:
    """The whole file. Raises `FileNotFoundError`, or `ReadError` when the repetitions are spent."""

    def once() -> bytes:
        if is_local(url):
            with open(local_path(url), "rb") as file:
                return file.read()
        fs, path = file_system(url)
        return fs.cat_file(path)

    return with_retries(once, url, 0, -1, retries)


def write_bytes(url: str, data: bytes | memoryview, durable: bool = True) -> None:
    """Write the whole file at once: a reader sees the old content or the new one, never a part.

    What is not `durable` may be lost, or left empty, by a power failure; it is written without waiting for the disk.
    """
    if not is_local(url):
        fs, path = file_system(url)
        fs.pipe_file(path, bytes(data))
        return
    path = local_path(url)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        if durable:
            replace_file(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def upload(path: str, url: str) -> None:
    """Copy a local file to a remote place, where it appears whole."""
    fs, target = file_system(url)
    with_retries(functools.partial(fs.put_file, path, target), url, 0, os.path.getsize(path), READ_RETRIES)


def remove(url: str) -> None:
    """Delete one file. Raises `FileNotFoundError`."""
    if is_local(url):
        os.unlink(local_path(url))
        return
    fs, path = file_system(url)
    fs.rm_file(path)


def temporary_path(path: str) -> str:
    """A name beside the local `path` that no listing of tars or Parquet files finds, for `replace_file`."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{os.getpid()}-{threading.get_ident() & 0xFFFF:x}-{uuid.uuid4().hex[:8]}.tmp")


def replace_file(temporary: str, path: str) -> None:
    """Put a finished local file in its place: content on the disk first, then the name, then the folder."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(os.path.dirname(path) or ".")


def sync_files(folder: str) -> None:
    """Put every file of a local folder on the disk, and the folder itself."""
    for entry in os.scandir(folder):
        _sync(entry.path)
    _sync(folder)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync of folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold the lock of a local folder: one process of this machine at a time; the folder is made if it is missing.

    Raises `RuntimeError` while a process that was spawned imports the caller's script: its parent, which runs that script, may hold the lock until it ends.
    """
    import fcntl

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "this script uses Diptych while a process that it started imports it; put what it does under `if __name__ == '__main__':`"
        )
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def exists(url: str) -> bool:
    """Whether there is a file or folder at `url`."""
    if is_local(url):
        return os.path.exists(local_path(url))
    fs, path = file_system(url)
    return fs.exists(path)


def size(url: str) -> int:
    """Bytes of the file. Raises `FileNotFoundError`."""
    return stat(url).size


def stat(url: str) -> FileFacts:
    """Size and stamp of one file. Raises `FileNotFoundError`."""
    if is_local(url):
        found = os.stat(local_path(url))
        return FileFacts(found.st_size, str(found.st_mtime_ns))
    fs, path = file_system(url)
    return with_retries(lambda: _facts(fs.info(path)), url, 0, -1, READ_RETRIES)


def stat_many(urls: Sequence[str], jobs: int = 16) -> list[FileFacts | None]:
    """`stat` of every file, None where there is none. An object store is listed once instead of asked file by file."""
    listed: dict[str, FileFacts] = {}
    folders = {parent(url) for url in urls if not is_local(url) and not _is_http(url)}
    for folder in sorted(folders):
        fs, path = file_system(folder)
        fs.invalidate_cache(path)
        if fs.exists(path):
            entries = with_retries(functools.partial(fs.ls, path, detail=True), folder, 0, -1, READ_RETRIES)
            listed |= {fs.unstrip_protocol(entry["name"]): _facts(entry) for entry in entries if entry["type"] == "file"}

    def one(url: str) -> FileFacts | None:
        if not is_local(url) and not _is_http(url):
            fs, path = file_system(url)
            return listed.get(fs.unstrip_protocol(path))
        try:
            return stat(url)
        except FileNotFoundError:
            return None

    if all(is_local(url) for url in urls):
        return [one(url) for url in urls]
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, urls))


def _list_one(location: str, literal: bool) -> list[str]:
    if location.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise ConfigError("shards", location, ALLOWED_SHARDS, "Members of a compressed tar cannot be read by range: decompress it first.")
    has_glob = not literal and glob.has_magic(location.partition("?")[0] if _is_http(location) else location)
    if location.endswith(".tar") and not has_glob:
        if is_local(location) and not os.path.isfile(location):
            raise ConfigError("shards", location, ALLOWED_SHARDS, "This file does not exist. Check the path.")
        return [location]
    names = _glob(location) if has_glob else _folder(location)
    shards = sorted(name for name in names if name.endswith(".tar"))
    if not shards:
        inside = ", ".join(sorted(name.rstrip("/").rpartition("/")[2] for name in names)[:5])
        found = f"It holds no .tar files, but {inside}." if inside else "It holds no .tar files."
        raise ConfigError("shards", location, ALLOWED_SHARDS, f"{found} `diptych pack` makes shards from a folder of images.")
    return shards


def _folder(location: str) -> list[str]:
    if is_local(location):
        if not os.path.isdir(location):
            raise ConfigError("shards", location, ALLOWED_SHARDS, "This folder does not exist. Check the path.")
        # A link to a tar that is gone stays in the list, so that it is complained about.
        return [entry.path for entry in os.scandir(location) if not entry.name.startswith(".") and not entry.is_dir()]
    # A web server answers a folder with its index only under the name with a slash.
    fs, path = file_system(location.rstrip("/") + "/" if _is_http(location) else location)
    fs.invalidate_cache(path)
    try:
        entries = with_retries(lambda: fs.ls(path, detail=False), location, 0, -1, READ_RETRIES)
    except FileNotFoundError:
        remedy = "Check the URL; a web server that lists no folders needs a brace pattern." if _is_http(location) else "Check the URL."
        raise ConfigError("shards", location, ALLOWED_SHARDS, f"Nothing is there. {remedy}") from None
    return [fs.unstrip_protocol(entry) for entry in entries]


def _glob(location: str) -> list[str]:
    if is_local(location):
        return glob.glob(location, recursive=True)
    fs, path = file_system(location)
    fs.invalidate_cache(path)
    return [fs.unstrip_protocol(entry) for entry in with_retries(lambda: fs.glob(path), location, 0, -1, READ_RETRIES)]


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _facts(entry: dict[str, Any]) -> FileFacts:
    stamp = next((entry[name] for name in ("ETag", "etag", "LastModified", "mtime", "updated", "last_modified") if entry.get(name)), "")
    length = entry.get("size")
    return FileFacts(-1 if length is None else int(length), str(stamp))
