"""Width and height of an image from its first bytes, without decoding: JPEG, PNG, GIF, WebP, BMP.

The sizes are those stored, before any EXIF rotation. Formats: ITU T.81 B.2 (JPEG frame header), PNG 11.2.2, GIF89a 18,
RFC 9649 (WebP), BITMAPINFOHEADER.
"""

from __future__ import annotations

import struct

_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels; None if the bytes are of no known format, or end before the size."""
    try:
        size = _read(head)
    except (struct.error, IndexError):
        return None
    return size if size and min(size) > 0 else None


def _read(head: bytes) -> tuple[int, int] | None:
    if head[:2] == b"\xff\xd8":
        return _jpeg(head)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":
        return struct.unpack_from(">II", head, 16)
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return struct.unpack_from("<HH", head, 6)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _webp(head)
    if head[:2] == b"BM" and struct.unpack_from("<I", head, 14)[0] >= 40:
        width, height = struct.unpack_from("<ii", head, 18)
        return width, abs(height)
    return None


def _jpeg(head: bytes) -> tuple[int, int] | None:
    position = 2
    while True:
        while head[position] != 0xFF:
            position += 1
        while head[position] == 0xFF:
            position += 1
        marker = head[position]
        position += 1
        if marker in _FRAME_HEADERS:
            height, width = struct.unpack_from(">HH", head, position + 3)
            return width, height
        if marker == 0xDA:  # pixels start before any frame header
            return None
        if marker not in (0x01, *range(0xD0, 0xD9)):
            position += struct.unpack_from(">H", head, position)[0]


def _webp(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", head, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
