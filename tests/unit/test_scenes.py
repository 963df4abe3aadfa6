"""Generated scenes: reproducible, told apart by their captions, and truly showing what the caption says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.datasets import scenes


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 50), index=st.integers(0, scenes.CAPTIONS * 2), size=st.sampled_from([32, 64, 96]))
def test_a_scene_depends_on_seed_and_index_alone(seed: int, index: int, size: int) -> None:
    image, caption = scenes.render(seed, index, size)
    scenes.render(seed + 1, index + 1, size)
    again, same = scenes.render(seed, index, size)
    assert (image.mode, image.size) == ("RGB", (size, size))
    assert np.array_equal(np.asarray(image), np.asarray(again))
    assert caption == same == scenes.describe(seed, index).caption


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 5), index=st.integers(0, scenes.CAPTIONS - 1))
def test_the_first_object_is_read_back_from_the_caption(seed: int, index: int) -> None:
    scene = scenes.describe(seed, index)
    assert scenes.parse_first_object(scene.caption) == scene.first
    assert scene.first != scene.second


def test_no_two_scenes_share_a_caption() -> None:
    captions = {scenes.describe(3, index).caption for index in range(20_000)}
    assert len(captions) == 20_000


@pytest.mark.parametrize("text", ["", "two red circles", "a crimson circle", "a red", "banana red circle"])
def test_a_text_without_a_first_object_gives_none(text: str) -> None:
    assert scenes.parse_first_object(text) is None


def test_other_seeds_give_other_scenes() -> None:
    assert [scenes.describe(0, i) for i in range(5)] != [scenes.describe(1, i) for i in range(5)]


@pytest.mark.parametrize("index", range(24))
def test_the_picture_shows_the_first_object_where_the_caption_says(index: int) -> None:
    scene = scenes.describe(1, index)
    if scene.first[0] == scene.second[0]:
        pytest.skip("both kinds have one colour")
    pixels = np.asarray(scenes.render(1, index, 96)[0], float)
    centres = []
    for colour in (scene.first[0], scene.second[0]):
        target = np.array(scenes.COLOURS[colour], float)
        hit = np.linalg.norm(pixels - target, axis=2) < 45
        assert hit.sum() > 60, f"{colour} is hardly to be seen: {scene.caption}"
        centres.append(np.argwhere(hit).mean(axis=0))
    (first_y, first_x), (second_y, second_x) = centres
    seen = {"above": second_y - first_y, "below": first_y - second_y, "left of": second_x - first_x, "right of": first_x - second_x}
    assert max(seen, key=lambda relation: seen[relation]) == scene.relation
