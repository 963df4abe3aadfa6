"""Aspect buckets: which shapes there are, which one a picture takes, what of it reaches the model, and how a share becomes micro-batches."""

from __future__ import annotations

import importlib.util
import io
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diptych.batches import FIELDS, AspectBuckets, ImageNeed, Needs, check_batch
from diptych.config import DataConfig
from diptych.datasets.images import decode_image, decode_variants
from diptych.datasets.manifest import build_manifest
from diptych.datasets.reader import SampleSource, read_rows
from diptych.datasets.shards import ShardWriter
from diptych.trainers.micro_batches import split

DECODERS = ["pil", *(["opencv"] if importlib.util.find_spec("cv2") else [])]
STILL = np.zeros(4)


@st.composite
def bucket_sets(draw: st.DrawFn) -> tuple[AspectBuckets, int, float]:
    """Buckets with their step and their largest aspect."""
    step = draw(st.sampled_from([8, 16, 32, 64]))
    size, most = step * draw(st.integers(1, 16)), draw(st.floats(1, 4))
    return AspectBuckets.of(size, step, most), step, most


@given(bucket_sets())
def test_shapes_are_multiples_of_the_step_of_about_one_area(found: tuple[AspectBuckets, int, float]) -> None:
    buckets, step, most = found
    shapes = set(buckets.shapes)
    assert (buckets.size, buckets.size) in shapes
    assert len(buckets.shapes) == len(shapes) <= 2 * buckets.size // step - 1
    assert {(width, height) for height, width in shapes} == shapes
    for height, width in shapes:
        assert height % step == width % step == 0
        assert max(height, width) <= most * min(height, width)
        # No step more would fit along the longer side.
        assert height * width <= buckets.size**2 < (max(height, width) + step) * min(height, width)


@given(bucket_sets(), st.integers(1, 5000), st.integers(1, 5000))
def test_a_picture_takes_the_shape_nearest_to_its_aspect(found: tuple[AspectBuckets, int, float], width: int, height: int) -> None:
    buckets = found[0]

    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log(width / height) - math.log(shape[1] / shape[0]))

    chosen = buckets.shapes[buckets.nearest(width, height)]
    assert distance(chosen) <= min(map(distance, buckets.shapes)) + 1e-9
    assert [buckets.nearest(wide, high) for high, wide in buckets.shapes] == list(range(len(buckets.shapes)))


def test_the_shapes_of_stable_diffusion_are_kohyas_up_to_an_aspect_of_two() -> None:
    assert AspectBuckets.of(512, 64, 2.0).shapes == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))


def picture(width: int, height: int, kind: str = "PNG", **options: Any) -> bytes:
    """Red rises from left to right, green from top to bottom."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.stack([*np.meshgrid(across, down), np.full((height, width), 90.0)], axis=-1)
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(160, 96), (1000, 600), (1920, 1080), (100, 150), (640, 640)])
def test_a_picture_reaches_its_shape_uncropped_but_for_the_buckets_rounding(decoder: Any, kind: str, width: int, height: int) -> None:
    buckets = AspectBuckets.of(128, 16, 2.0)
    found = decode_image(picture(width, height, kind), ImageNeed(128, buckets=buckets), STILL, decoder)
    high, wide = buckets.shapes[buckets.nearest(width, height)]
    assert found.shape == (high, wide, 3)
    # What the nearest shape leaves out of the aspect is cut, half at each end; a pixel and the code's rounding besides.
    kept_across, kept_down = min(1, height * wide / high / width), min(1, width * high / wide / height)
    assert min(kept_across, kept_down) > 0.85
    for channel, kept, ends in ((0, kept_across, found[:, [0, -1], 0].mean(axis=0)), (1, kept_down, found[[0, -1], :, 1].mean(axis=1))):
        expected = 255 * (1 - kept) / 2
        assert ends == pytest.approx([expected, 255 - expected], abs=6), "red green"[4 * channel :]


def test_a_square_crop_of_the_same_picture_loses_what_the_bucket_keeps() -> None:
    square = decode_image(picture(160, 96), ImageNeed(128), STILL)
    assert square[:, 0, 0].mean() > 40


@pytest.mark.parametrize("resize", ["random_crop", "pad", "squash"])
def test_every_way_to_resize_fills_the_bucket(resize: Any) -> None:
    buckets = AspectBuckets.of(64, 8, 2.0)
    need = ImageNeed(64, resize, flip=1.0, min_scale=0.5, buckets=buckets)
    data, shape = picture(150, 100), buckets.shapes[buckets.nearest(150, 100)]
    found = decode_image(data, need, np.array([0.5, 0.5, 0.5, 0.5]))
    assert found.shape == (*shape, 3)
    assert found[:, 8:16, 0].mean() > found[:, -16:-8, 0].mean(), "mirrored"
    assert decode_variants(data, need, 0, 0, 2, True).shape == (4, *shape, 3)


def test_the_bucket_is_that_of_the_upright_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buckets = AspectBuckets.of(64, 8, 2.0)
    for decoder in DECODERS:
        found = decode_image(picture(150, 90, "JPEG", exif=exif), ImageNeed(64, buckets=buckets), STILL, decoder)
        assert found.shape[0] > found.shape[1]


SIZES = [(60, 40), (40, 60), (50, 50), (90, 45), (61, 40)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    folder = str(tmp_path_factory.mktemp("shards"))
    rows = [{"png": picture(*SIZES[number % 5]), "txt": f"number {number}"} for number in range(12)]
    rows[7]["png"] = rows[7]["png"][:-20]
    ShardWriter(folder, samples_per_shard=5).write_all(rows)
    return SampleSource.of(build_manifest(folder), None, DataConfig())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_read_comes_apart_into_micro_batches_of_one_shape(source: SampleSource, count: int) -> None:
    buckets = AspectBuckets.of(32, 4, 2.0)
    need = ImageNeed(32, flip=0.5, buckets=buckets)
    rows = np.arange(12)
    read = read_rows(source, rows, rows + 100, Needs(image=need), seed=3)
    assert [index for index, _ in read.faults] == [7]
    arrays = {"weight": np.ones(12, np.float32)} | read.arrays
    check_batch(arrays, Needs(image=need))
    parts = split(arrays, count, buckets)
    assert sorted(np.concatenate([part["row"] for part in parts]).tolist()) == rows.tolist()
    assert max(len(part["row"]) for part in parts) <= 12 // count
    for part in parts:
        (bucket,) = set(part["bucket"].tolist())
        assert part["image"].shape[1:] == (*buckets.shapes[bucket], 3)
        for row, image in zip(part["row"].tolist(), part["image"], strict=True):
            if row != 7:
                alone = read_rows(source, rows[row : row + 1], rows[row : row + 1] + 100, Needs(image=need), seed=3)
                assert np.array_equal(split(alone.arrays | {"weight": np.ones(1, np.float32)}, 1, buckets)[0]["image"][0], image)
                assert buckets.nearest(*SIZES[row % 5]) == bucket


def test_without_buckets_micro_batches_are_equal_and_in_order() -> None:
    arrays = {"weight": np.ones(6, np.float32), "slot": np.arange(6)}
    assert [part["slot"].tolist() for part in split(arrays, 3)] == [[0, 1], [2, 3], [4, 5]]


@given(st.data())
def test_rows_of_the_square_give_back_what_was_put_in(data: st.DataObject) -> None:
    buckets, factor = AspectBuckets.of(32, 4, 4.0), 4
    chosen = data.draw(st.lists(st.integers(0, len(buckets.shapes) - 1), min_size=1, max_size=9))
    latents, rows = [], np.zeros((len(chosen), 3, 32 // factor, 32 // factor), np.float16)
    for index, bucket in enumerate(chosen):
        height, width = buckets.shapes[bucket]
        latents.append(np.random.default_rng(index).normal(size=(3, height // factor, width // factor)).astype(np.float16))
        rows[index].reshape(-1)[: latents[-1].size] = latents[-1].reshape(-1)
    arrays = {"weight": np.ones(len(chosen), np.float32), "slot": np.arange(len(chosen)), "bucket": np.array(chosen), "latent_mean": rows}
    assert set(arrays) <= set(FIELDS)
    for part in split(arrays, 1, buckets):
        for slot, latent in zip(part["slot"].tolist(), part["latent_mean"], strict=True):
            assert np.array_equal(latent, latents[slot])
