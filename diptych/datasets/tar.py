"""Our own walk over the headers of a tar: every readable member, and every damaged place, by name.

Python's `tarfile`, and so webdataset and Ray, end silently at a cut, a flipped header byte or a zeroed header, and
return half of the samples. Here each of those is a `Fault`, and the walk goes on at the next block whose checksum
holds. Formats: v7, ustar with prefix, GNU (long names, base-256 sizes), PAX local and global (POSIX.1-2001; GNU tar
manual, "Basic Tar Format"). Member data is never read, except extended headers.

Fault kinds: `cut_member`, `cut_header`, `no_end_marker`, `bad_header`, `zeroed_header`, `trailing_data`, `not_a_file`,
`unsafe_name`, `empty_shard`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from diptych.batches import Fault
from diptych.datasets import storage
from diptych.datasets.tar_header import CHECKSUM, Header, HeaderError, is_extended, parse_header, parse_records

BLOCK = 512
ZERO = bytes(BLOCK)
EXTENSION_LIMIT = 1 << 20
"""Bytes of the largest extended header that is believed; names are shorter, and a larger one is damage or an attack."""
LONG_NAME = "GNU.longname"
LOCAL_WINDOW, REMOTE_WINDOW = 1 << 18, 1 << 23
"""Bytes per read of a walk: small enough to skip large members locally, large enough to hide a server's latency."""

_UPWARDS = re.compile(r"(^|[/\\])\.\.([/\\]|$)").search
_OTHER_TYPES = {
    "1": "a hard link",
    "2": "a symbolic link",
    "3": "a character device",
    "4": "a block device",
    "6": "a pipe",
    "S": "a sparse file",
}


class Entry(NamedTuple):
    """A regular member that is wholly there."""

    name: str
    offset: int
    """First byte of its data in the tar."""
    size: int
    """Bytes of data."""
    header: int
    """First byte of the header that names it (of its extended header, if it has one)."""


class Source:
    """A seekable tar, read in windows so that a walk costs few reads. Not for use by several threads."""

    def __init__(self, url: str, size: int | None = None, retries: int = storage.READ_RETRIES) -> None:
        self.url, self.retries = url, retries
        self.size = storage.size(url) if size is None else size
        self._window = LOCAL_WINDOW if storage.is_local(url) else REMOTE_WINDOW
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only at the end of the file."""
        start = offset - self._start
        if start < 0 or start + size > len(self._data):
            end = min(self.size, offset + max(size, self._window))
            if offset >= end:
                return b""
            self._data, self._start, start = storage.read_range(self.url, offset, end - offset, self.retries), offset, 0
        return self._data[start : start + size]


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member: the key keeps the path and every dot but the last, so `a.1.jpg` and `a.2.jpg` differ.

    The extension is lower case; it is empty where there is none, as in `README` or `.hidden`.
    """
    key, dot, extension = name.rpartition(".")
    if not dot or "/" in extension or not key or key.endswith("/"):
        return name, ""
    return key, extension.lower()


def walk(source: Source, shard: str = "") -> Iterator[Entry | Fault]:
    """Every member and every fault of the tar, in the order of the file. Raises `ReadError` where it cannot be read."""
    return _Walk(source, shard).run()


class _Walk:
    def __init__(self, source: Source, shard: str) -> None:
        self.source, self.shard = source, shard
        self.position = 0
        self.last_name = ""
        self.everywhere: dict[str, bytes] = {}  # global PAX records
        self.pending: dict[str, bytes] = {}  # records of extended headers, for the next member
        self.pending_start = -1
        self.misnamed = -1  # header of a member whose extended header is damaged
        self.endings = (b"", b"")  # how this writer ends the checksum field, and the last other ending met

    def run(self) -> Iterator[Entry | Fault]:
        read, size = self.source.read, self.source.size
        while True:
            block = read(self.position, BLOCK)
            if len(block) < BLOCK:
                yield self._end(len(block))
                return
            if block == ZERO:
                yield from self._zero_block()
                if self.position < 0:
                    return
                continue
            try:
                header = parse_header(block)
                if header.ending != self.endings[0]:
                    yield from self._ending(header)
                start, data = self.position, self.position + BLOCK
                if header.type in "xgXLK":
                    if data + header.size > size and header.size <= EXTENSION_LIMIT:
                        yield self._fault("cut_header", f"the file ends inside an extended header at offset {start}")
                        return
                    self._extend(header, data)
                    self.position = data + _padded(header.size)
                    continue
                name, length = self._name_and_size(header)
            except HeaderError as error:
                yield self._resynchronise(block, str(error))
                if self.position < 0:
                    return
                continue
            self.position = data + _padded(length)
            if header.type not in "07\0":
                yield from self._other(header, name, data)
            elif data + length > size:
                yield self._fault("cut_member", f"{name} has {length} bytes, the file ends after {size - data} of them", name)
                return
            elif start != self.misnamed:
                yield from self._file(Entry(name, data, length, start if self.pending_start < 0 else self.pending_start))
            self._forget()

    def _file(self, entry: Entry) -> Iterator[Entry | Fault]:
        name = entry.name
        reason = _unsafe(name)
        if reason:
            yield self._fault("unsafe_name", f"{name!r} {reason}", name)
        elif self.pending and any(keyword.startswith("GNU.sparse") for keyword in self.pending):
            yield self._fault("not_a_file", f"{name!r} is {_OTHER_TYPES['S']}", name)
        elif not name.endswith("/"):
            self.last_name = name
            yield entry

    def _other(self, header: Header, name: str, data: int) -> Iterator[Fault]:
        if header.type in "12346":
            self.position = data  # links and devices carry no data, whatever their size field says
        if header.type not in "5V":  # folders and volume labels are no samples
            what = _OTHER_TYPES.get(header.type, f"of the unknown type {header.type!r}")
            yield self._fault("not_a_file", f"{name!r} is {what}", name)

    def _end(self, rest: int) -> Fault:
        if self.source.size == 0:
            return self._fault("empty_shard", "the file has no bytes")
        if rest:
            return self._fault("cut_header", f"the file ends {rest} bytes into a header at offset {self.position}")
        if self.pending_start >= 0:
            return self._fault("cut_header", f"the file ends between the extended header at offset {self.pending_start} and its member")
        after = f"after {_printable(self.last_name)}" if self.last_name else "before the first member"
        return self._fault("no_end_marker", f"the file ends {after} without the blocks of zeros that end a tar")

    def _zero_block(self) -> Iterator[Fault]:
        start, after = self.position, self.position + BLOCK
        self.position = self._find_header(after)
        data = self._find_data(after)
        if self.position >= 0:
            detail = f"a block of zeros at offset {start} stands where a header should; "
            detail += self._leave_out_next() if self._names_next(start) else f"the next header is at {self.position}"
            yield self._fault("zeroed_header", detail)
        elif data == after:
            yield self._fault("zeroed_header", f"a block of zeros at offset {start} stands before data without a header")
        elif data > after:
            yield self._fault("trailing_data", f"data without a header at offset {data}, after the end of the tar")
        elif self.pending_start >= 0:
            yield self._fault("zeroed_header", f"the tar ends between the extended header at offset {self.pending_start} and its member")
        elif start == 0:
            yield self._fault("empty_shard", "the tar has no members")
        self._forget()

    def _resynchronise(self, block: bytes, reason: str) -> Fault:
        start, self.position = self.position, self._find_header(self.position + BLOCK)
        detail = f"{reason} at offset {start}; "
        if self.position < 0:
            detail += f"no header in the remaining {self.source.size - start} bytes"
        elif self._names_next(start, block):
            detail += self._leave_out_next()
        else:
            detail += f"the next header is at {self.position}"
        self._forget()
        return self._fault("bad_header", detail)

    def _names_next(self, start: int, block: bytes = b"") -> bool:
        """Whether the damaged header at `start` gave the next member its name: that one then holds a shortened name only."""
        content = self.source.read(start + BLOCK, BLOCK).rstrip(b"\0")
        try:
            records = parse_records(content)
            if content:
                return "path" in records or "size" in records
        except HeaderError:
            pass
        short = parse_header(self.source.read(self.position, BLOCK)).name
        return is_extended(block) or b" path=" in content or (len(short) >= 99 and content.startswith(short[:99]))

    def _leave_out_next(self) -> str:
        self.misnamed = self.position
        victim = parse_header(self.source.read(self.position, BLOCK)).name.decode("utf-8", "backslashreplace")
        return f"it was an extended header, so {victim} behind it may be misnamed and is left out"

    def _ending(self, header: Header) -> Iterator[Fault]:
        usual, other = self.endings
        if header.ending.strip(b"\0 "):
            yield self._fault("bad_header", f"the checksum holds, but its field ends in {header.ending!r}, at offset {self.position}")
        elif not usual or header.ending == other:
            self.endings = (header.ending, b"")
        else:
            self.endings = (usual, header.ending)
            detail = f"the checksum holds, but its field ends in {header.ending!r}, its neighbours' in {usual!r}, at offset {self.position}"
            yield self._fault("bad_header", detail)

    def _extend(self, header: Header, data: int) -> None:
        if header.size > EXTENSION_LIMIT:
            raise HeaderError(f"an extended header of {header.size} bytes")
        if self.pending_start < 0:
            self.pending_start = self.position
        content = self.source.read(data, header.size)
        if header.type == "g":
            self.everywhere |= parse_records(content)
        elif header.type in "xX":
            self.pending |= parse_records(content)
        elif header.type == "L":
            self.pending["path"] = self.pending[LONG_NAME] = content.partition(b"\0")[0]
            if len(self.pending["path"]) not in (len(content), len(content) - 1):
                raise HeaderError("a long name cut by a NUL byte")

    def _name_and_size(self, header: Header) -> tuple[str, int]:
        if not self.pending and not self.everywhere:
            return header.name.decode("utf-8", "surrogateescape"), header.size
        # Nothing but this repetition guards a GNU long name.
        if not self.pending.get(LONG_NAME, header.name).startswith(header.name[:99]):
            raise HeaderError("a long name that is not that of its header")
        raw = self.pending.get("path") or self.everywhere.get("path") or header.name
        length = self.pending.get("size") or self.everywhere.get("size")
        if length is None:
            return raw.decode("utf-8", "surrogateescape"), header.size
        if not length.isdigit():
            raise HeaderError(f"an extended header with the size {length!r}")
        return raw.decode("utf-8", "surrogateescape"), int(length)

    def _forget(self) -> None:
        if self.pending_start >= 0:
            self.pending, self.pending_start = {}, -1

    def _find_header(self, start: int) -> int:
        read, position = self.source.read, start
        while len(block := read(position, BLOCK)) == BLOCK:
            if block[0] and CHECKSUM(block[148:156]):
                try:
                    parse_header(block)
                    return position
                except HeaderError:
                    pass
            position += BLOCK
        return -1

    def _find_data(self, start: int) -> int:
        read, position = self.source.read, start
        while block := read(position, BLOCK):
            if block != ZERO[: len(block)]:
                return position
            position += BLOCK
        return -1

    def _fault(self, kind: str, detail: str, name: str | None = None) -> Fault:
        key, _ = split_name(self.last_name if name is None else name)
        return Fault(self.shard, _printable(key), kind, _printable(detail))


def _unsafe(name: str) -> str:
    if not name.strip("/"):
        return "is an empty name"
    if name[0] == "/":
        return "is an absolute path"
    if ".." in name and _UPWARDS(name):
        return "leads out of its folder"
    if "\0" in name:
        return "holds a NUL byte"
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            return "is not valid UTF-8"
    return ""


def _printable(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK
