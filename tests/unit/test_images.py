"""Pictures of every kind become the same uint8 RGB squares with both decoders, and what is cut or too large is refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diptych.batches import ImageNeed
from diptych.datasets import images
from diptych.datasets.images import BadImageError, decode_image, image_draws
from diptych.datasets.jpeg import read_header

DECODERS = ("pil", "opencv")
STILL = np.zeros(images.DRAWS)


def smooth(width: int, height: int) -> np.ndarray:
    """A picture without sharp edges, whose corners have different colours."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return (255 * np.stack([x, y, (x + y) / 2], axis=-1)).astype(np.uint8)


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def noisy_jpeg(width: int = 96, height: int = 80, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return encode(Image.fromarray(pixels), "JPEG", quality=90, **options)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("size", [31, 64, 100, 256])
@pytest.mark.parametrize(("width", "height"), [(256, 256), (400, 300), (129, 515)])
def test_center_crop_shows_the_middle_at_any_scale(decoder: str, size: int, width: int, height: int) -> None:
    pixels = smooth(width, height)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    expected = Image.fromarray(pixels[top : top + side, left : left + side]).resize((size, size), Image.Resampling.BOX)
    found = decode_image(encode(Image.fromarray(pixels), "JPEG", quality=95), ImageNeed(size), STILL, decoder)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - np.asarray(expected)).mean() < 3


@pytest.mark.parametrize("decoder", DECODERS)
def test_pad_keeps_all_on_white_and_squash_fills(decoder: str) -> None:
    data = encode(Image.new("RGB", (100, 50), (10, 20, 30)), "PNG")
    padded = decode_image(data, ImageNeed(64, "pad"), STILL, decoder)
    assert (padded[:16] == 255).all()
    assert (padded[48:] == 255).all()
    assert np.abs(padded[17:47].astype(int) - (10, 20, 30)).max() <= 1
    assert np.abs(decode_image(data, ImageNeed(64, "squash"), STILL, decoder).astype(int) - (10, 20, 30)).max() <= 1


def test_the_reduced_scale_never_falls_below_the_target() -> None:
    for width in range(1, 300, 7):
        box = images.Box(0, 0, width, width + 20)
        for target in (8, 32, 64):
            factor = images._reduction(box, (target, target))
            assert factor == 1 or -(-width // factor) >= target
            assert factor == 8 or -(-width // (2 * factor)) < target


def test_crops_and_flips_are_functions_of_seed_and_slot() -> None:
    data = noisy_jpeg()
    need = ImageNeed(32, "random_crop", flip=0.5, min_scale=0.3)
    slots = np.arange(200)
    drawn = image_draws(0, slots)
    assert np.array_equal(drawn[50:60], image_draws(0, slots[50:60]))
    assert not np.array_equal(drawn, image_draws(1, slots))
    assert 0.4 < (drawn[:, 0] < 0.5).mean() < 0.6
    assert np.array_equal(decode_image(data, need, drawn[3]), decode_image(data, need, image_draws(0, np.array([3]))[0]))
    assert len({decode_image(data, need, row).tobytes() for row in drawn[:10]}) == 10
    flipped, plain = np.array([0.0, 0.5, 0.5, 0.5]), np.array([0.9, 0.5, 0.5, 0.5])
    assert np.array_equal(decode_image(data, need, flipped), decode_image(data, need, plain)[:, ::-1])


def test_random_crops_stay_inside_and_keep_their_share_of_the_area() -> None:
    need = ImageNeed(32, "random_crop", min_scale=0.25)
    for row in image_draws(0, np.arange(500)):
        box = images.crop_box(120, 80, need, row)
        assert 0 <= box.left <= box.right <= 120 + 1e-9
        assert 0 <= box.top <= box.bottom <= 80 + 1e-9
        assert 0.25 * 80**2 - 1e-6 <= (box.right - box.left) * (box.bottom - box.top) <= 80**2 + 1e-6


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(decoder: str, orientation: int) -> None:
    upright = smooth(64, 64)
    # What a camera stores so that the viewer, turning it, sees it upright.
    stored = Image.fromarray(upright)
    inverse = {2: 0, 3: 1, 4: 5, 5: 4, 6: 2, 7: 6, 8: 3}
    if orientation != 1:
        names = [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270,
                 Image.Transpose.TRANSPOSE, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSVERSE]  # fmt: skip
        stored = stored.transpose(names[inverse[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "WEBP"):
        found = decode_image(encode(stored, kind, exif=exif, **({"quality": 95} if kind != "PNG" else {})), ImageNeed(64), STILL, decoder)
        assert np.abs(found.astype(int) - upright).mean() < 3, kind


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_mode_becomes_rgb(decoder: str) -> None:
    grey = Image.fromarray(smooth(64, 64)[:, :, 0])
    for kind in ("JPEG", "PNG"):
        found = decode_image(encode(grey, kind), ImageNeed(64), STILL, decoder)
        assert np.abs(found.astype(int) - np.asarray(grey)[:, :, None]).mean() < 2, kind
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.abs(decode_image(encode(deep, "PNG"), ImageNeed(64), STILL, decoder).astype(int) - np.asarray(grey)[:, :, None]).max() <= 1
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert (decode_image(encode(clear, "PNG"), ImageNeed(64), STILL, decoder) == 255).all()
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert (decode_image(encode(palette, "PNG", transparency=palette.getpixel((0, 0))), ImageNeed(64), STILL, decoder) == 255).all()
    print_colours = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    found = decode_image(encode(print_colours, "JPEG"), ImageNeed(64), STILL, decoder)
    assert np.abs(found.astype(int) - (0, 255, 255)).max() <= 3
    for kind in ("WEBP", "GIF", "BMP", "TIFF"):
        assert decode_image(encode(Image.fromarray(smooth(70, 64)), kind), ImageNeed(32), STILL, decoder).shape == (32, 32, 3)


@pytest.mark.parametrize("decoder", DECODERS)
def test_pictures_of_phones_are_read_where_their_decoder_is_installed(decoder: str) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    data = encode(Image.fromarray(smooth(64, 64)), "HEIF", quality=95)
    assert np.abs(decode_image(data, ImageNeed(64), STILL, decoder).astype(int) - smooth(64, 64)).mean() < 4


def test_formats_that_run_other_programs_are_refused() -> None:
    data = encode(Image.new("RGB", (8, 8)), "EPS")
    with pytest.raises(BadImageError):
        decode_image(data, ImageNeed(8), STILL)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
def test_a_jpeg_cut_anywhere_is_refused_by_both_decoders(options: dict) -> None:
    data = noisy_jpeg(**options)
    for decoder in DECODERS:
        decode_image(data, ImageNeed(16), STILL, decoder)
        for cut in [*range(0, 700, 13), *range(700, len(data), 97), len(data) - 2, len(data) - 1]:
            with pytest.raises(BadImageError):
                decode_image(data[:cut], ImageNeed(16), STILL, decoder)


def test_an_end_marker_inside_a_thumbnail_does_not_hide_a_cut() -> None:
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00" + noisy_jpeg(16, 16)
    data = noisy_jpeg(exif=exif)
    assert read_header(data).width == 96
    end = data.index(b"\xff\xd9") + 2
    with pytest.raises(BadImageError, match="truncated"):
        decode_image(data[:end], ImageNeed(16), STILL)
    # Bytes behind the end of the picture are not part of it.
    assert np.array_equal(decode_image(data + b"\x00rubbish", ImageNeed(16), STILL), decode_image(data, ImageNeed(16), STILL))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_other_formats_that_are_cut_are_refused(kind: str) -> None:
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), kind)
    for cut in [*range(0, len(data) - 1, max(1, len(data) // 60)), len(data) - 1]:
        with pytest.raises(BadImageError):
            decode_image(data[:cut], ImageNeed(16), STILL)


@pytest.mark.parametrize("decoder", DECODERS)
def test_decompression_bombs_are_refused_before_they_are_decoded(decoder: str) -> None:
    jpeg = bytearray(noisy_jpeg())
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadImageError, match="bomb"):
        decode_image(bytes(jpeg), ImageNeed(16), STILL, decoder)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    with pytest.raises(BadImageError, match="bomb"):
        decode_image(png, ImageNeed(16), STILL, decoder)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\xff\xd8" + bytes(500), b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"]
)
def test_rubbish_is_refused_with_a_reason(decoder: str, data: bytes) -> None:
    with pytest.raises(BadImageError, match=r"\w"):
        decode_image(data, ImageNeed(16), STILL, decoder)


def test_random_damage_never_escapes_as_another_error() -> None:
    data = noisy_jpeg(progressive=True)
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 3):
            damaged[place] = random.integers(0, 256)
        for decoder in DECODERS:
            try:
                assert decode_image(bytes(damaged), ImageNeed(16), STILL, decoder).shape == (16, 16, 3)
            except BadImageError as error:
                assert str(error)


def test_the_decoder_is_chosen_once_and_an_absent_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.choose_decoder("auto") == "opencv"
    assert images.choose_decoder("pil") == "pil"
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    assert images.choose_decoder("auto") == "pil"
    with pytest.raises(ValueError, match=r"data\.decoder"):
        images.choose_decoder("opencv")
