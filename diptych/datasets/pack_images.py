"""Any picture file → the bytes that a shard stores: upright, sRGB, opaque, resized with its aspect kept.

JPEG, PNG, WebP, HEIC/AVIF, TIFF, GIF (first frame), BMP and PPM; transparency is laid on white, CMYK, 16-bit and greyscale
become 8-bit RGB, EXIF orientation is applied and a colour profile converted.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from typing import Literal, NamedTuple

from PIL import Image, ImageCms, ImageOps

from diptych.datasets.images import BadImageError, open_picture, to_rgb

Resize = Literal["none", "border", "center_crop", "longest"]
RESIZES: tuple[Resize, ...] = ("none", "border", "center_crop", "longest")
_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


class Packed(NamedTuple):
    """Encoded picture with its size now and before, in pixels."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def pack_image(data: bytes, resize: Resize, size: int, image_format: str = "jpg", quality: int = 95) -> Packed:
    """Decode `data`, set it upright, resize it and encode it as `image_format` (`jpg`, `png`, `webp`).

    A picture that needs no change keeps its own bytes, so packing loses nothing that it need not. Raises `BadImageError`.
    """
    if not data:
        raise BadImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings (bombs below its limit, odd EXIF) are no faults
            return _pack(data, resize, size, image_format, quality)
    except BadImageError:
        raise
    except Exception as error:  # Decoders raise OSError, SyntaxError, struct.error, ZeroDivisionError, … on damaged bytes.
        raise BadImageError(f"undecodable image ({type(error).__name__}: {error})") from None


def _pack(data: bytes, resize: Resize, size: int, image_format: str, quality: int) -> Packed:
    picture = open_picture(data)
    source_format, mode, profile = picture.format, picture.mode, picture.info.get("icc_profile")
    turned = picture.getexif().get(0x0112, 1) != 1
    original = (picture.height, picture.width) if turned and picture.getexif().get(0x0112, 1) >= 5 else (picture.width, picture.height)
    if source_format == "JPEG" and resize != "none":
        picture.draft(None, _draft_size(picture.size, resize, size))
    picture.load()
    upright = ImageOps.exif_transpose(picture) if turned else picture
    target = _target(original, resize, size)
    kept = target == original and source_format == _FORMATS[image_format] and mode == "RGB" and not turned and not profile
    if kept and getattr(picture, "n_frames", 1) == 1:
        return Packed(data, *original, *original)
    image = _fit(_to_rgb(upright, profile), resize, target)
    out = io.BytesIO()
    image.save(out, _FORMATS[image_format], **({"quality": quality} if image_format != "png" else {}))
    return Packed(out.getvalue(), *image.size, *original)


def _to_rgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    if profile and picture.mode in ("RGB", "CMYK"):
        # A broken profile says nothing about the pixels: they are taken as they are.
        with contextlib.suppress(ImageCms.PyCMSError, OSError):
            picture = ImageCms.profileToProfile(picture, io.BytesIO(profile), _srgb(), outputMode="RGB") or picture
    picture.info.pop("icc_profile", None)
    return to_rgb(picture)


def _target(original: tuple[int, int], resize: Resize, size: int) -> tuple[int, int]:
    if resize == "none":
        return original
    if resize == "longest":
        scale = min(1.0, size / max(original))
        return max(1, round(original[0] * scale)), max(1, round(original[1] * scale))
    return size, size


def _fit(image: Image.Image, resize: Resize, target: tuple[int, int]) -> Image.Image:
    if resize == "center_crop":
        return ImageOps.fit(image, target, Image.Resampling.LANCZOS)
    scale = min(target[0] / image.width, target[1] / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale))) if resize == "border" else target
    image = image if image.size == inner else image.resize(inner, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if inner != target:
        canvas = Image.new("RGB", target, "white")
        canvas.paste(image, ((target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2))
        return canvas
    return image


def _draft_size(original: tuple[int, int], resize: Resize, size: int) -> tuple[int, int]:
    """Smallest size that a reduced JPEG decode may return without costing sharpness: twice the target."""
    side = max(original) if resize in ("border", "longest") else min(original)
    scale = min(1.0, 2 * size / side)
    return max(1, int(original[0] * scale)), max(1, int(original[1] * scale))


@functools.cache
def _srgb() -> ImageCms.core.CmsProfile:
    return ImageCms.createProfile("sRGB")
