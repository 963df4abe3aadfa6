"""The studio without a browser: which runs go together, who may reach it, and what its buttons do and refuse."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support_pictures import StripePainter

from diptych.config import ConfigError, load_recipe
from diptych.pipelines.studio import check_address, read_users, run
from diptych.pipelines.studio_models import StudioModels, StudioSpec, studio_spec
from diptych.trainers.picture_files import read_metadata

gradio = pytest.importorskip("gradio")

from diptych.pipelines.studio_actions import Actions, PaintForm, png_of, said  # noqa: E402

FORM = PaintForm(samples=2, steps=0, sampler="", seed=5, guidance=(1.0, 1.0))


@pytest.fixture
def actions(tmp_path: Path) -> Actions:
    models = StudioModels(StudioSpec())
    models.painter = StripePainter()
    return Actions(models, models.facts(), tmp_path / "pictures", "stripes")


def fake_run(folder: Path, task: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(load_recipe(task, "smoke").to_json())
    return str(folder)


def test_runs_are_sorted_by_what_they_do(tmp_path):
    names = {
        task: fake_run(tmp_path / task, task) for task in ("gpt2", "coca", "clip_vit", "stable_diffusion", "dalle2_prior", "dalle2_decoder")
    }
    spec = studio_spec([names["coca"], names["gpt2"], names["stable_diffusion"]])
    assert (spec.writer, spec.captioner, spec.prompter) == (names["gpt2"], names["coca"], "")
    assert spec.painter is not None
    assert spec.painter.runs == (names["stable_diffusion"],)
    for runs, message in (
        ([names["coca"], names["coca"]], "one run of each task"),
        ([names["dalle2_prior"], names["dalle2_decoder"]], "--clip"),
        ([names["dalle2_prior"]], "one run of stable_diffusion, or"),
        ([names["stable_diffusion"], names["dalle2_decoder"]], "one run of stable_diffusion, or"),
    ):
        with pytest.raises(ConfigError, match=message):
            studio_spec(runs)


def test_others_reach_it_with_a_password_alone(tmp_path):
    (tmp_path / "users").write_text("# people\nada:lovelace:1\nalan:turing\n")
    users = read_users(str(tmp_path / "users"))
    assert users == [("ada", "lovelace:1"), ("alan", "turing")]
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, [])
    check_address("0.0.0.0", users)
    for host in ("0.0.0.0", "192.168.1.5", "studio.example.org"):
        with pytest.raises(ConfigError, match="another address with --auth"):
            check_address(host, [])
    (tmp_path / "none").write_text("nobody\n")
    with pytest.raises(ConfigError, match="user:password"):
        run(["none"], auth=str(tmp_path / "none"))


def test_a_dream_fills_the_page_and_the_folder(actions):
    steps = list(actions.dream("a red boat\n\n a blue boat ", FORM))
    assert [len(shown) for shown, _ in steps] == [0, 2, 4]
    assert steps[0][1] == "0 of 4 pictures, seed 5"
    assert steps[-1][1].startswith("4 of 4 pictures in ")
    assert [line["seed"] for line in read_metadata(actions.folder)] == [5, 6, 7, 8]
    assert steps[-1][0][3][1] == "a blue boat · seed 8"
    shown = actions.shown()
    assert [text.split(" · ")[1] for _, text in shown] == ["seed 8", "seed 7", "seed 6", "seed 5"]
    assert actions.about(shown[0][0])["prompt"] == "a blue boat"
    with zipfile.ZipFile(actions.archive()) as file:
        assert sorted(Path(name).suffix for name in file.namelist()) == [".jsonl", *[".png"] * 4]


def test_what_is_drawn_is_painted_anew_and_nothing_else(actions):
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 4), np.uint8)
    layer = np.zeros((32, 32, 4), np.uint8)
    layer[:10] = 255
    list(actions.inpaint({"background": picture, "layers": [layer], "composite": None}, "red", FORM))
    from PIL import Image

    made = np.asarray(Image.open(actions.shown()[0][0]))
    np.testing.assert_array_equal(made[10:], picture[10:, :, :3])
    assert (made[:10] != picture[:10, :, :3]).any(axis=2).mean() > 0.9


def test_seeds_of_minus_one_differ_and_are_told(actions):
    form = PaintForm(1, 0, "", -1, ())
    seeds = {list(actions.dream("a red boat", form))[-1][1].rpartition(" ")[2] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: a.dream("", FORM), "1 to 8 lines"),
        (lambda a: a.dream("x\n" * 9, FORM), "1 to 8 lines"),
        (lambda a: a.dream("x", PaintForm(1, 0, "", -7, ())), "a whole number from 0"),
        (lambda a: a.dream("x", PaintForm(1, 0, "best", 1, ())), "stripes"),
        (lambda a: a.dream("nan", FORM), "NaN"),
        (lambda a: a.vary(b"", "", FORM), "a picture"),
        (lambda a: a.vary(b"no picture", "", FORM), "cannot be decoded"),
        (lambda a: a.inpaint(None, "", FORM), "draw over"),
        (lambda a: a.inpaint({"background": np.zeros((8, 8, 4), np.uint8), "layers": [np.zeros((8, 8, 4), np.uint8)]}, "", FORM), "nothing drawn"),
        (lambda a: a.read(b"", 3, True, True), "a picture"),
        (lambda a: a.write(" ", 5, "greedy", 0), "the beginning of a prompt"),
    ],
)  # fmt: skip
def test_mistakes_become_messages(actions, call, words):
    with pytest.raises(gradio.Error) as error:
        list(said(lambda: call(actions))())
    assert words in str(error.value.message)


def test_a_fault_of_ours_keeps_its_traceback(actions):
    with pytest.raises(ZeroDivisionError):
        list(said(lambda: (1 / 0 for _ in range(1)))())


def test_pictures_of_a_form_are_told_whole(actions):
    list(actions.vary(png_of(np.zeros((20, 30, 3), np.uint8)), "red", PaintForm(1, 7, "stripes", 3, (2.0,), 0.5)))
    (line,) = read_metadata(actions.folder)
    assert json.loads(json.dumps(line)) == line
    assert {"steps": 7, "sampler": "stripes", "seed": 3, "guidance": [2.0], "strength": 0.5, "mode": "variation"}.items() <= line.items()
