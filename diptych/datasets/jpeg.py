"""What a JPEG says of itself before it is decoded: size, components, orientation, and whether it is whole.

OpenCV fills the missing part of a cut JPEG with grey and says nothing, Pillow refuses some cuts and not others. Here the
markers are walked to the end-of-image marker, so that both decoders refuse the same files. Sources: ITU T.81 annex B, EXIF 2.3 (tag 0x0112).
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
# Within a scan FF stands only before 00 (a data byte FF), a restart marker, another FF, or the marker that ends the scan.
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]").search


class JpegHeader(NamedTuple):
    """Facts of the first frame."""

    width: int
    height: int
    components: int
    orientation: int
    """EXIF orientation, 1 (upright) to 8."""


def read_header(data: bytes) -> JpegHeader:
    """The header of a whole JPEG. Raises `ValueError` if the bytes are no JPEG, or end before the end-of-image marker."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG: it does not start with FFD8")
    position, orientation, frame, kind = 2, 1, None, 0
    try:
        while True:
            marker, position = _marker(data, position)
            if marker == _END_OF_IMAGE:
                raise ValueError("no image: the end marker comes before any pixels")
            if marker in _ALONE:
                continue
            length = struct.unpack_from(">H", data, position)[0]
            if marker in _FRAMES and frame is None:
                frame, kind = struct.unpack_from(">HHB", data, position + 3), marker
            elif marker == _APP1 and data[position + 2 : position + 8] == b"Exif\0\0":
                orientation = _orientation(data[position + 8 : position + length])
            elif marker == _START_OF_SCAN:
                break
            position += length
        if not _is_one_whole_scan(data, position, kind, frame[2] if frame else 0):
            _check_whole(data, position)
    except (struct.error, IndexError):
        raise ValueError(f"truncated JPEG: the {len(data)} bytes end inside its header") from None
    if frame is None or not frame[0] or not frame[1]:
        raise ValueError("undecodable JPEG: no frame header with a size")
    return JpegHeader(frame[1], frame[0], frame[2], orientation)


def _marker(data: bytes, position: int) -> tuple[int, int]:
    """The next marker at or behind `position`, and where its segment starts."""
    while data[position] != 0xFF:
        position += 1
    while data[position] == 0xFF:
        position += 1
    return data[position], position + 1


def _is_one_whole_scan(data: bytes, position: int, kind: int, components: int) -> bool:
    """Whether the scan with its header at `position` is the only one and complete, as in nearly every picture, seen without a walk.

    A sequential picture with all its components in one scan has nothing behind it but the end marker, and no cut can leave these two
    bytes last, since coded data never contain them.
    """
    length, in_scan = struct.unpack_from(">HB", data, position)
    return kind in _SEQUENTIAL and in_scan == components and len(data) - 2 >= position + length and data.endswith(b"\xff\xd9")


def _check_whole(data: bytes, position: int) -> None:
    """Walk the scans from the first one's header at `position` to the end-of-image marker."""
    while True:
        found = _NEXT_MARKER(data, position)
        if found is None:
            raise ValueError(f"truncated JPEG: {len(data)} bytes without an end-of-image marker")
        marker, position = data[found.end() - 1], found.end()
        if marker == _END_OF_IMAGE:
            return
        if marker not in _ALONE:
            # Tables between the scans of a progressive JPEG may hold any bytes, so they are skipped by their length.
            position += struct.unpack_from(">H", data, position)[0]


def _orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        start = struct.unpack_from(order + "I", tiff, 4)[0]
        for entry in range(struct.unpack_from(order + "H", tiff, start)[0]):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * entry)
            if tag == 0x0112 and kind == 3:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # damaged metadata is no damage of the picture
    return 1
