"""Ranged reads: exactly these bytes of that file, from a local path or an fsspec URL, whatever the network does.

This is the hot path of training. Locally a read is a `pread` on a cached descriptor; remotely it is one ranged GET.
Transient errors are repeated with exponential backoff; when the repetitions are spent, `ReadError` names the place, and
the attempt fails, so that a flaky network never changes which samples a run sees.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import fsspec

from diptych.config import ConfigError
from diptych.datasets.spare import SpareMemory

T = TypeVar("T")

READ_RETRIES = 5
"""Repetitions of a read after a transient error, unless the caller says otherwise (`data.read_retries`)."""
FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 10.0
STALL_SECONDS, SLOWEST_BYTES_PER_SECOND = 60, 1e6
"""A ranged GET may take this long, plus its bytes at this rate; a silent server would else hold a run for minutes."""
OPEN_FILES = 128
"""Descriptors that ranged reads keep open, per process."""
LOCAL_GAP, REMOTE_GAP = 1 << 16, 1 << 20
"""Bytes between two ranges that are cheaper to read than to skip."""

_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NETWORK_PACKAGES = ("aiohttp", "botocore", "urllib3", "requests", "google", "gcsfs", "azure", "http")


class ReadError(OSError):
    """A ranged read that failed for good: `url`, `offset` and `size` in bytes."""

    def __init__(self, url: str, offset: int, size: int, reason: str) -> None:
        super().__init__(errno.EIO, f"reading {size} bytes at offset {offset} of {url} failed: {reason}")
        self.url, self.offset, self.size, self.reason = url, offset, size, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.url, self.offset, self.size, self.reason))


class PermanentReadError(ReadError):
    """A ranged read that no repetition can mend, such as a range behind the end of the file."""


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> str:
    """`url` without `file://`."""
    return url.removeprefix("file://")


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path in it. Credentials and endpoints come from fsspec's configuration."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError("url", url, "a local path or an fsspec URL whose package is installed", str(error)) from None


def read_range(url: str, offset: int, size: int, retries: int = READ_RETRIES) -> bytes:
    """Exactly `size` bytes from `offset`. Safe to call from many threads.

    Raises `FileNotFoundError` and `PermissionError` at once, `PermanentReadError` behind the end of the file, and
    `ReadError` when a transient error outlasts `retries` repetitions.
    """
    if size <= 0:
        return b""
    read = _pread if is_local(url) else _ranged_get
    return with_retries(lambda: read(url, offset, size), url, offset, size, retries)


def read_into(url: str, offset: int, buffer: memoryview, retries: int = READ_RETRIES) -> None:
    """`read_range` of as many bytes as `buffer` has, into it. For those who read often: fresh memory costs as much as the read."""
    if is_local(url):
        with_retries(lambda: _pread_into(url, offset, buffer), url, offset, len(buffer), retries)
    else:
        buffer[:] = read_range(url, offset, len(buffer), retries)


def read_ranges(
    url: str, ranges: Sequence[tuple[int, int]], gap: int | None = None, retries: int = READ_RETRIES, most_bytes: int = 1 << 26
) -> list[bytes]:
    """The bytes of every (offset, size), in the order asked; otherwise as `iter_ranges`."""
    results: list[bytes] = [b""] * len(ranges)
    for index, data in iter_ranges(url, ranges, gap, retries, most_bytes):
        results[index] = data
    return results


def iter_ranges(
    url: str, ranges: Sequence[tuple[int, int]], gap: int | None = None, retries: int = READ_RETRIES, most_bytes: int = 1 << 26
) -> Iterator[tuple[int, bytes]]:
    """`(index, bytes)` of every (offset, size) by offset, one at a time, with close ranges read together.

    Two ranges are joined if at most `gap` bytes lie between them and the joined read stays under `most_bytes`.
    """
    gap = (LOCAL_GAP if is_local(url) else REMOTE_GAP) if gap is None else gap
    for start, end, members in _joined(ranges, gap, most_bytes):
        if len(members) == 1:
            yield members[0], read_range(url, start, end - start, retries)
            continue
        data = _read_whole(url, start, end - start, retries)
        for index in members:
            offset, length = ranges[index]
            yield index, bytes(data[offset - start : offset - start + length])
        del data  # before the next read, which may have its memory


def _joined(ranges: Sequence[tuple[int, int]], gap: int, most_bytes: int) -> Iterator[tuple[int, int, list[int]]]:
    """(start, end, indices into `ranges`) of what is read together."""
    members: list[int] = []
    start = end = 0
    for index in sorted(range(len(ranges)), key=lambda index: ranges[index]):
        offset, length = ranges[index]
        if members and (offset > end + gap or max(end, offset + length) - start > most_bytes):
            yield start, end, members
            members = []
        if not members:
            start = end = offset
        members.append(index)
        end = max(end, offset + length)
    if members:
        yield start, end, members


_joined_reads = SpareMemory()


def _read_whole(url: str, offset: int, size: int, retries: int) -> memoryview:
    """The bytes of a joined read."""
    if not is_local(url):
        return memoryview(read_range(url, offset, size, retries))
    data = _joined_reads.take(size).data
    read_into(url, offset, data, retries)
    return data


def with_retries(action: Callable[[], T], url: str, offset: int, size: int, retries: int) -> T:
    """`action()`, repeated with exponential backoff while it fails with a transient error."""
    delay = FIRST_DELAY_SECONDS
    for attempt in range(retries + 1):
        try:
            return action()
        except PermanentReadError:
            raise
        except Exception as error:
            if not is_transient(error):
                if _is_network(error) and not isinstance(error, OSError):
                    raise PermanentReadError(url, offset, size, f"{type(error).__name__}: {error}") from error
                raise
            if is_local(url):
                _files.drop(local_path(url))
            if attempt == retries:
                reason = f"{type(error).__name__}: {error}" + (f" (tried {retries + 1} times)" if retries else "")
                raise ReadError(url, offset, size, reason) from error
        time.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY_SECONDS)
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether a repetition may succeed: network and server errors, yes; a missing or forbidden file, no."""
    if isinstance(error, _PERMANENT) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 425, 429)
    return isinstance(error, OSError | TimeoutError | EOFError) or _is_network(error)


def _is_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES


class _File:
    """An open descriptor that closes when the last user lets go of it, so that eviction never cuts a read."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        found = os.fstat(self.descriptor)
        self.identity = (found.st_dev, found.st_ino)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _FileCache:
    """The `limit` descriptors used last."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()

    def get(self, path: str) -> _File:
        found = os.stat(path)
        with self._lock:
            file = self._files.get(path)
            # A shard that was replaced has a new inode; its old descriptor would still serve the old bytes.
            if file is None or file.identity != (found.st_dev, found.st_ino):
                file = self._files[path] = _File(path)
            self._files.move_to_end(path)
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
            return file

    def drop(self, path: str) -> None:
        with self._lock:
            self._files.pop(path, None)


_files = _FileCache(OPEN_FILES)


def _pread(url: str, offset: int, size: int) -> bytes:
    file = _files.get(local_path(url))
    data = os.pread(file.descriptor, size, offset)
    while len(data) < size:
        more = os.pread(file.descriptor, size - len(data), offset + len(data))
        if not more:
            raise _behind_end(url, offset, size, file)
        data += more
    return data


def _pread_into(url: str, offset: int, buffer: memoryview) -> None:
    file = _files.get(local_path(url))
    done = 0
    while done < len(buffer):
        more = os.preadv(file.descriptor, [buffer[done:]], offset + done)
        if not more:
            raise _behind_end(url, offset, len(buffer), file)
        done += more


def _behind_end(url: str, offset: int, size: int, file: _File) -> PermanentReadError:
    return PermanentReadError(url, offset, size, f"the file ends at {os.fstat(file.descriptor).st_size}")


def _ranged_get(url: str, offset: int, size: int) -> bytes:
    fs, path = file_system(url)
    # Asynchronous file systems take a deadline with every call.
    deadline = {"timeout": STALL_SECONDS + size / SLOWEST_BYTES_PER_SECOND} if fs.async_impl else {}
    data = fs.cat_file(path, start=offset, end=offset + size, **deadline)
    if len(data) > size:
        raise PermanentReadError(url, offset, size, "the server ignores the Range header; serve the shards from one that honours it")
    if len(data) < size:
        length = fs.info(path).get("size")
        if length is not None and length < offset + size:
            raise PermanentReadError(url, offset, size, f"the file ends at {length}")
        raise OSError(errno.EIO, f"received {len(data)} of {size} bytes")
    return data
