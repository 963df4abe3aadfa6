"""Pictures as files and as shards: names, metadata, seeds, masks, faults and resumption, with a painter that needs no weights."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from support_pictures import StripePainter

from diptych.config import ConfigError
from diptych.datasets.manifest import open_manifest
from diptych.pipelines import generate_pictures, pack
from diptych.pipelines.generate_pictures import PictureCall, paint
from diptych.pipelines.paint_worker import PaintSpec, PaintWorker, read_source
from diptych.trainers.picture_files import read_about, read_metadata, save_picture

ABOUT = {"model": "stripes", "checkpoint": "step_1"}


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def test_files_carry_what_makes_them_again(tmp_path):
    call = PictureCall(("a red boat", "zwei grüne Bäume"), 2, seed=40, settings=("steps=3", "guidance=2,1"), out=str(tmp_path / "out"))
    result = paint(StripePainter, call, ABOUT)
    assert (result["samples_in"], result["samples_out"], result["faults"]) == (4, 4, [])
    assert [row["seed"] for row in result["texts"]] == [40, 41, 42, 43]
    lines = read_metadata(tmp_path / "out")
    assert len(lines) == len(list((tmp_path / "out").glob("*.png"))) == 4
    for line in lines:
        about = read_about(tmp_path / "out" / line["file_name"])
        assert {"file_name": line["file_name"]} | about == line
        assert about["guidance"] == [2.0, 1.0]
        assert about["model"] == "stripes"
    again = paint(StripePainter, PictureCall(("zwei grüne Bäume",), seed=43, settings=call.settings, out=str(tmp_path / "again")), ABOUT)
    one, other = (np.asarray(Image.open(result["texts"][index]["file"])) for result, index in ((result, 3), (again, 0)))
    np.testing.assert_array_equal(one, other)
    assert pack.run(str(tmp_path / "out"), str(tmp_path / "shards"), jobs=1)["samples_out"] == 4, "the folder is a source for pack"


def test_no_name_is_overwritten(tmp_path):
    call = PictureCall(("a red boat",), out=str(tmp_path))
    first, second = (paint(StripePainter, call, ABOUT)["texts"][0]["file"] for _ in range(2))
    assert first != second
    assert len(read_metadata(tmp_path)) == 2
    assert Path(first).read_bytes() == Path(second).read_bytes()


def test_a_name_is_safe_whatever_the_prompt(tmp_path):
    for prompt in ("../../etc/passwd", "a/b\\c:*?", "x" * 400, "", "日本"):
        path = save_picture(tmp_path, np.zeros((4, 4, 3), np.uint8), {"number": 0, "prompt": prompt, "seed": 1})
        assert path.parent == tmp_path
        assert len(path.name) < 90
    assert read_metadata(tmp_path)[4]["prompt"] == "日本"


def pairs(shards: Path) -> list[tuple[str, str, int]]:
    """(key, caption, seed) of every sample, as webdataset reads them."""
    found = []
    for tar in sorted(shards.glob("*.tar")):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            picture = Image.open(io.BytesIO(sample["jpg"]))
            assert picture.size == (32, 32)
            found.append((sample["__key__"], sample["txt"].decode(), json.loads(sample["json"])["seed"]))
    return found


def test_killed_half_way_and_resumed_each_prompt_is_made_once(tmp_path):
    prompts = tuple(f"a {colour} boat, number {index}" for index, colour in enumerate(["red", "blue", "green", "pink"] * 5))
    call = PictureCall(prompts, seed=7, shards=str(tmp_path / "pairs"), samples_per_shard=6, batch_size=2)
    log = tmp_path / "log"

    class Killed(StripePainter):
        def paint(self, requests, settings):
            if any("number 9" in request.prompt for request in requests):
                raise KeyboardInterrupt
            return super().paint(requests, settings)

    with pytest.raises(KeyboardInterrupt):
        paint(functools.partial(Killed, str(log)), call, ABOUT)
    assert len(list((tmp_path / "pairs").glob("*.tar"))) == 1
    result = paint(functools.partial(StripePainter, str(log)), call, ABOUT)
    assert (result["samples_in"], result["samples_out"], len(result["texts"])) == (20, 20, 14)
    found = pairs(tmp_path / "pairs")
    assert [caption for _, caption, _ in found] == list(prompts)
    assert [seed for _, _, seed in found] == list(range(7, 27))
    assert open_manifest(str(tmp_path / "pairs")).samples == 20
    before = log.read_text()
    assert paint(functools.partial(StripePainter, str(log)), call, ABOUT)["samples_out"] == 20
    assert log.read_text() == before, "a finished call paints nothing"
    whole = tmp_path / "whole"
    paint(StripePainter, PictureCall(prompts, seed=7, shards=str(whole), samples_per_shard=6), ABOUT)
    for tar in whole.glob("*.tar"):
        assert tar.read_bytes() == (tmp_path / "pairs" / tar.name).read_bytes(), "resumed or not, the same bytes"


def test_a_folder_of_shards_belongs_to_one_call(tmp_path):
    call = PictureCall(("a red boat",), shards=str(tmp_path))
    paint(StripePainter, call, ABOUT)
    for changed, about in (
        (PictureCall(("a blue boat",), shards=str(tmp_path)), ABOUT),
        (PictureCall(("a red boat",), seed=1, shards=str(tmp_path)), ABOUT),
        (PictureCall(("a red boat",), settings=("steps=9",), shards=str(tmp_path)), ABOUT),
        (call, ABOUT | {"checkpoint": "step_2"}),
    ):
        with pytest.raises(ConfigError, match="It was begun with"):
            paint(StripePainter, changed, about)


def test_what_cannot_be_painted_is_a_fault_and_the_rest_is_made(tmp_path):
    prompts = ("a red boat", "nan", "a blue boat")
    files = paint(StripePainter, PictureCall(prompts, out=str(tmp_path / "files")), ABOUT)
    assert files["samples_out"] == 2
    assert [(fault["key"], fault["kind"]) for fault in files["faults"]] == [("prompt 1, seed 1", "unpaintable")]
    assert "NaN" in files["faults"][0]["detail"]
    shards = paint(StripePainter, PictureCall(prompts, shards=str(tmp_path / "pairs")), ABOUT)
    assert (shards["samples_in"], shards["samples_out"]) == (3, 2)
    assert [key for key, _, _ in pairs(tmp_path / "pairs")] == ["00000000", "00000002"], "a gap, as with failed downloads"


def test_a_mask_keeps_white_and_inverted_black(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :10] = 255
    (tmp_path / "in.png").write_bytes(png(picture))
    (tmp_path / "mask.png").write_bytes(png(mask))
    for invert in (False, True):
        call = PictureCall(
            ("red",), init_image=str(tmp_path / "in.png"), mask=str(tmp_path / "mask.png"), invert_mask=invert, out=str(tmp_path / "out")
        )
        made = np.asarray(Image.open(paint(StripePainter, call, ABOUT)["texts"][0]["file"]))
        kept = (mask > 0) ^ invert
        np.testing.assert_array_equal(made[kept], picture[kept])
        assert (made[~kept] != picture[~kept]).any(axis=1).mean() > 0.9


def test_sources_are_fitted_alike_and_refused_clearly():
    picture, mask = np.zeros((40, 64, 3), np.uint8), np.zeros((40, 64), np.uint8)
    picture[:, 12:32], mask[:, 12:32] = 255, 255
    fitted, keep = read_source(png(picture), png(mask), (20, 20))
    np.testing.assert_array_equal(fitted[..., 0] > 128, keep)
    assert keep[:, :10].all()
    assert not keep[:, 10:].any()
    for arguments, message in (
        ((png(picture), png(mask[:30]), (20, 20)), "64 × 30 pixels.*64 × 40, the size of the picture"),
        ((b"", png(mask), (20, 20)), "a mask beside --init-image"),
        ((b"no picture", b"", (20, 20)), "--init-image.*cannot be decoded"),
        ((png(picture), b"no picture", (20, 20)), "--mask.*cannot be decoded"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_source(*arguments)


def test_wrong_calls_are_refused_before_a_model_is_opened(tmp_path):
    def opened() -> StripePainter:
        raise AssertionError("opened")

    (tmp_path / "m.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    for call, message in (
        (PictureCall(), "a prompt, a file of them, or --init-image"),
        (PictureCall(("a",), 0), "1 or more"),
        (PictureCall(("a",), mask=str(tmp_path / "m.png")), "a mask beside --init-image"),
        (PictureCall(("a",), init_image=str(tmp_path / "none.png")), "a picture's file"),
        (PictureCall(("a",), settings=("stepz=3",)), "Did you mean steps"),
        (PictureCall(("a",), out="x", shards="y"), "Give one of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            paint(opened, call, ABOUT)


def test_what_the_painter_refuses_reaches_the_caller(tmp_path):
    for settings, message in ((("sampler=best",), "stripes"), (("guidance=1,2,3",), "one for each of prior, decoder")):
        with pytest.raises(ConfigError, match=message):
            paint(StripePainter, PictureCall(("a",), settings=settings, out=str(tmp_path)), ABOUT)


def test_seeds_of_a_prompt_differ_and_guidance_scales(tmp_path):
    worker = PaintWorker(PaintSpec(StripePainter, generate_pictures.apply_overrides(_settings(), ["guidance=1"]), str(tmp_path)))
    jobs = PictureCall(("a red boat",), 2, seed=3).jobs()
    first, second = (made.image for made in worker.paint(jobs))
    assert (first != second).mean() > 0.5
    alone = next(iter(worker.paint(jobs[1:]))).image
    np.testing.assert_array_equal(alone, second)


def _settings():
    from diptych.trainers.pictures import PictureSettings

    return PictureSettings()
