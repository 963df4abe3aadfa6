"""Image bytes → the uint8 [H, W, 3] pixels that an `ImageNeed` asks for, where H and W are `ImageNeed.shape` of the upright picture.

A JPEG is decoded at reduced DCT scale when the target is smaller, by Pillow (`draft`) or OpenCV (`IMREAD_REDUCED_COLOR_*`);
every other format by Pillow. Orientation is applied, transparency laid on white, 16-bit scaled. Crops and flips are
functions of (seed, slot). A cut file, a decompression bomb or undecodable bytes are a `BadImageError`, with either decoder.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from diptych.batches import ImageNeed
from diptych.datasets import draws
from diptych.datasets.jpeg import read_header

MAX_PIXELS = 178_956_970
"""Larger pictures are refused as decompression bombs before they are decoded; Pillow's own limit."""
MAX_BYTES = 1 << 28
"""Encoded pictures that are longer are refused before they are read."""
# Pillow would also open what runs other programs (EPS) or fetches (plug-ins); a data set of pictures needs none of that.
_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
DRAWS = 4
"""Random numbers per sample: flip, area, horizontal and vertical position."""
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Decoder = Literal["pil", "opencv"]


class BadImageError(ValueError):
    """The bytes are no whole picture; the message says what was found."""


class Box(NamedTuple):
    """A rectangle in pixels of the upright picture at full scale."""

    left: float
    top: float
    right: float
    bottom: float


def choose_decoder(name: Literal["auto", "pil", "opencv"]) -> Decoder:
    """The decoder that `data.decoder` means here; `auto` is OpenCV where it is installed, which measures faster."""
    if name == "auto":
        return "opencv" if importlib.util.find_spec("cv2") else "pil"
    if name == "opencv" and not importlib.util.find_spec("cv2"):
        raise ValueError("data.decoder=opencv: OpenCV is not installed; `pip install opencv-python-headless`, or data.decoder=pil")
    return name


def image_draws(seed: int, slots: np.ndarray) -> np.ndarray:
    """float64 [B, 4] in [0, 1): what the crop and the flip at `slots` (int64 [B]) depend on."""
    counters = slots[:, None] * DRAWS + np.arange(DRAWS)
    return draws.uniform(draws.key_of(seed, "image"), counters)


def decode_image(data: bytes, need: ImageNeed, drawn: np.ndarray, decoder: Decoder = "pil") -> np.ndarray:
    """uint8 [H, W, 3] of one picture; `drawn` is its row of `image_draws`. Raises `BadImageError`."""
    if not data:
        raise BadImageError("empty file")
    try:
        pixels = _decode_jpeg(data, need, drawn, decoder) if data[:2] == b"\xff\xd8" else _decode_other(data, need, drawn, decoder)
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"decompression bomb: {error}") from None
    except ValueError as error:
        raise BadImageError(str(error)) from None
    except Exception as error:  # Decoders raise OSError, SyntaxError, struct.error, cv2.error, … on damaged bytes.
        raise BadImageError(f"undecodable image ({type(error).__name__}: {error})") from None
    return pixels[:, ::-1] if drawn[0] < need.flip else pixels


def decode_variants(data: bytes, need: ImageNeed, seed: int, row: int, crops: int, flips: bool, decoder: Decoder = "pil") -> np.ndarray:
    """uint8 [variants, H, W, 3] of one picture: `crops` of them, each followed by its mirror image if `flips`.

    Crop c of manifest row `row` is a function of (seed, row, c) alone. Raises `BadImageError`.
    """
    drawn = image_draws(seed, row * crops + np.arange(crops))
    upright = replace(need, flip=0.0)
    made = [decode_image(data, upright, drawn[crop], decoder) for crop in range(crops)]
    return np.stack([variant for pixels in made for variant in ((pixels, pixels[:, ::-1]) if flips else (pixels,))])


def crop_box(width: int, height: int, need: ImageNeed, drawn: np.ndarray) -> Box:
    """The part of an upright picture that the target shows; all of it for `pad` and `squash`."""
    if need.resize in ("pad", "squash"):
        return Box(0, 0, width, height)
    high, wide = need.shape(width, height)
    across, down = min(width, height * wide / high), min(height, width * high / wide)
    if need.resize == "center_crop":
        left, top = (width - across) // 2, (height - down) // 2
        return Box(left, top, left + across, top + down)
    scale = math.sqrt(need.min_scale + (1 - need.min_scale) * drawn[1])
    across, down = across * scale, down * scale
    left, top = (width - across) * drawn[2], (height - down) * drawn[3]
    return Box(left, top, left + across, top + down)


def _target(box: Box, need: ImageNeed, shape: tuple[int, int]) -> tuple[int, int]:
    """Width and height that the box is resized to; smaller than `shape` (height, width) on one side for `pad`."""
    if need.resize != "pad":
        return shape[1], shape[0]
    width, height = box.right - box.left, box.bottom - box.top
    scale = min(shape[1] / width, shape[0] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _reduction(box: Box, target: tuple[int, int]) -> int:
    """The largest of 8, 4, 2, 1 by which the picture can be reduced with the box still as large as the target."""
    width, height = box.right - box.left, box.bottom - box.top
    for factor in (8, 4, 2):
        if math.ceil(width / factor) >= target[0] and math.ceil(height / factor) >= target[1]:
            return factor
    return 1


def _decode_jpeg(data: bytes, need: ImageNeed, drawn: np.ndarray, decoder: Decoder) -> np.ndarray:
    header = read_header(data)
    _check_pixels(header.width, header.height)
    turned = header.orientation >= 5
    width, height = (header.height, header.width) if turned else (header.width, header.height)
    box = crop_box(width, height, need, drawn)
    factor = _reduction(box, _target(box, need, need.shape(width, height)))
    # OpenCV and Pillow disagree on inverted CMYK; Pillow's reading is the usual one.
    if decoder == "opencv" and header.components in (1, 3):
        return _fit_opencv(_upright_array(_imdecode(data, factor), header.orientation), (width, height), box, need)
    opened = Image.open(io.BytesIO(data), formats=("JPEG", "MPO"))
    opened.draft("RGB" if header.components == 3 else None, (max(1, header.width // factor), max(1, header.height // factor)))
    # All bytes at once: otherwise Pillow gives libjpeg 64 kB at a time, each behind a copy of what the last piece left.
    opened.decodermaxblock = len(data)
    picture = _upright(to_rgb(opened), header.orientation)
    return _fit(picture, (width, height), box, need, decoder)


def _decode_other(data: bytes, need: ImageNeed, drawn: np.ndarray, decoder: Decoder) -> np.ndarray:
    picture = open_picture(data)
    orientation = picture.getexif().get(0x0112, 1)
    picture = _upright(to_rgb(picture), orientation)
    return _fit(picture, picture.size, crop_box(*picture.size, need, drawn), need, decoder)


def open_picture(data: bytes) -> Image.Image:
    """A picture of a usual format, opened and not yet decoded. Raises `BadImageError` for a cut container or a bomb, or
    what Pillow raises for bytes of no such format.
    """
    _check_container(data)
    formats = ("JPEG", "MPO") if data[:2] == b"\xff\xd8" else _heif_formats() if data[4:8] == b"ftyp" else _FORMATS
    picture: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    _check_pixels(*picture.size)
    return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB: transparency on white, 16 bits scaled to 8, CMYK and palettes converted."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        picture.load()
        return picture
    if picture.mode.startswith("I"):
        # Pillow clips 16-bit greys at 255 instead of scaling them.
        values = np.asarray(picture).astype(np.float32)
        picture = Image.fromarray(np.clip(values * (255 / 65535) + 0.5, 0, 255).astype(np.uint8))
    elif picture.mode == "F":
        raise BadImageError("pixels are floating-point numbers without a known range")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return picture.convert("RGB")


def _fit(picture: Image.Image, full: tuple[int, int], box: Box, need: ImageNeed, decoder: Decoder) -> np.ndarray:
    if decoder == "opencv":
        return _fit_opencv(np.asarray(picture), full, box, need)
    shape = need.shape(*full)
    target = _target(box, need, shape)
    across, down = picture.width / full[0], picture.height / full[1]
    scaled = (box.left * across, box.top * down, box.right * across, box.bottom * down)
    if scaled != (0, 0, *picture.size) or target != picture.size:
        picture = picture.resize(target, Image.Resampling.BICUBIC, box=scaled)
    return _on_white(np.asarray(picture), shape)


def _fit_opencv(pixels: np.ndarray, full: tuple[int, int], box: Box, need: ImageNeed) -> np.ndarray:
    shape = need.shape(*full)
    target = _target(box, need, shape)
    height, width = pixels.shape[:2]
    across, down = width / full[0], height / full[1]
    left, top = int(box.left * across), int(box.top * down)
    right, bottom = max(left + 1, min(width, round(box.right * across))), max(top + 1, min(height, round(box.bottom * down)))
    pixels = pixels[top:bottom, left:right]
    if pixels.shape[:2] != target[::-1]:
        cv2 = _cv2()
        smaller = target[0] <= pixels.shape[1] and target[1] <= pixels.shape[0]
        pixels = cv2.resize(pixels, target, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
    return _on_white(pixels, shape)


def _on_white(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    height, width = pixels.shape[:2]
    if (height, width) == shape:
        return pixels
    sheet = np.full((*shape, 3), 255, np.uint8)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    sheet[top : top + height, left : left + width] = pixels
    return sheet


def _imdecode(data: bytes, factor: int) -> np.ndarray:
    cv2 = _cv2()
    reduced = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), reduced[factor] | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise BadImageError("undecodable JPEG")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _upright_array(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels if orientation == 1 else np.ascontiguousarray(pixels)


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else picture


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(f"decompression bomb: {width} × {height} pixels, at most {MAX_PIXELS} are decoded")


def _check_container(data: bytes) -> None:
    """Refuse cut PNG and WebP files, of which decoders show what is there."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        position = 8
        while data[position + 4 : position + 8] != b"IEND":
            position += 12 + int.from_bytes(data[position : position + 4], "big")
            if position + 12 > len(data):
                raise BadImageError(f"truncated PNG: {len(data)} bytes without an end chunk")
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        expected = 8 + int.from_bytes(data[4:8], "little")
        if len(data) < expected:
            raise BadImageError(f"truncated WebP: {len(data)} of {expected} bytes")


@functools.cache
def _heif_formats() -> tuple[str, ...]:
    """Formats in ISO containers, as far as they are installed."""
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in ("HEIF", "AVIF") if name in Image.OPEN)


@functools.cache
def _cv2() -> Any:
    import cv2

    # One read worker is one core; OpenCV's own threads would only compete with the other workers.
    cv2.setNumThreads(1)
    return cv2
