"""What every painter shares: counted noise, modes, clamping, kept pixels, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diptych.config import ConfigError, apply_overrides
from diptych.trainers.pictures import (
    PaintError,
    PictureRequest,
    PictureSettings,
    check_requests,
    keep_pixels,
    seeded_noise,
    stage_guidance,
    to_uint8,
)

IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
MASK = np.arange(64).reshape(8, 8) % 3 == 0
ALL = frozenset(("text", "variation", "inpaint"))


def test_noise_belongs_to_the_seed_whatever_the_batch():
    requests = [PictureRequest(seed=seed) for seed in (5, 9, 5)]
    noise = seeded_noise(requests, "start", (4, 3))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(seeded_noise(requests[1:2], "start", (4, 3))[0], noise[1])
    assert not torch.equal(seeded_noise(requests, "other", (4, 3)), noise)


def test_the_mode_follows_from_what_is_given():
    assert [PictureRequest("a").mode, PictureRequest("a", 0, IMAGE).mode, PictureRequest("", 0, IMAGE, MASK).mode] == [
        "text",
        "variation",
        "inpaint",
    ]


def test_pixels_are_clamped_before_they_become_bytes():
    pixels = torch.tensor([-3.0, 0.0, 0.5, 1.0, 1.7]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(pixels, [PictureRequest()])[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_nan_is_no_picture_and_the_seeds_are_named():
    pixels = torch.zeros(3, 3, 2, 2)
    pixels[1, 0, 0, 0] = torch.nan
    with pytest.raises(PaintError, match=r"seeds \[7\]"):
        to_uint8(pixels, [PictureRequest(seed=seed) for seed in (6, 7, 8)])


def test_kept_pixels_are_the_images_own():
    painted = np.full((2, 8, 8, 3), 200, np.uint8)
    kept = keep_pixels(painted, [PictureRequest("", 0, IMAGE, MASK), PictureRequest()])
    assert np.array_equal(kept[0][MASK], IMAGE[MASK])
    assert (kept[0][~MASK] == 200).all()
    assert (kept[1] == 200).all()


@pytest.mark.parametrize(
    ("request_", "modes", "key"),
    [
        (PictureRequest("", 0, IMAGE), frozenset(["text"]), "--mask/--init-image"),
        (PictureRequest("", 0, None, MASK), ALL, "--mask"),
        (PictureRequest("", 0, IMAGE, MASK[:4]), ALL, "--mask"),
        (PictureRequest("", 0, IMAGE, MASK.astype(np.float32)), ALL, "--mask"),
        (PictureRequest("", 0, IMAGE[:, :4], None), ALL, "--init-image"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(request_, modes, key):
    with pytest.raises(ConfigError) as caught:
        check_requests([request_], modes, (8, 8))
    assert caught.value.key == key


def test_guidance_is_one_number_or_one_for_each_stage():
    stages = ("prior", "decoder")
    assert stage_guidance(PictureSettings(), stages, (3.0, 2.0)) == (3.0, 2.0)
    assert stage_guidance(apply_overrides(PictureSettings(), ["guidance=1.5"]), stages, (3.0, 2.0)) == (1.5, 1.5)
    assert stage_guidance(apply_overrides(PictureSettings(), ["guidance=1,4"]), stages, (3.0, 2.0)) == (1.0, 4.0)
    with pytest.raises(ConfigError, match="prior, decoder"):
        stage_guidance(PictureSettings(guidance=(1, 2, 3)), stages, (3.0, 2.0))
