"""`--dry-run` on the verbs that start work: everything is checked, the plan is shown, and nothing is started, written or downloaded."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_models import save_vae
from support_pages import MAKERS, save_clip
from support_runs import make_shards

from diptych.cli import _application, available_verbs
from diptych.config import ConfigError, apply_overrides, load_recipe

CALLS = {
    "train": (
        ["coca", "data.shards=shards", "task.tokenizer=train:300", "name=first"],
        ['"cpus"', '"digest"', "train:300", '"first caption"'],
    ),
    "tune": (["coca", "--vary", "optim.lr=1e-4,1e-3", "data.shards=shards", "name=first"], ["0.0001", "at_once"]),
    "pack": (["photos.csv", "out"], ["a red boat", "file_name"]),
    "ingest": (["urls.csv", "out"], ["urls.csv", "caption"]),
    "embed": (["shards", "out", "--model", "clip", "--keep", "keep.parquet"], ["partitions", "first caption", '"samples": 45']),
    "cache": (["latents", "shards", "out", "--model", "vae", "--size", "32"], ["partitions", "latents"]),
    "submit": (["train", "coca", "output=/shared/runs"], ["python -m diptych.pipelines.train coca output=/shared/runs", "working_dir"]),
    "demo": (["--out", "out", "--samples", "400"], ['"samples": 400', "first caption", "report.html", '"coca"', '"prior"']),
    "evaluate": (["runs/gpt2", "--samples", "3"], ["step_00000002", '"samples": 3', "first caption", "evaluation"]),
    "evaluate --shards": (["runs/gpt2", "--shards", "shards"], ['"samples": 90', "on-shards"]),
    "evaluate --clip": (["runs/painter", "--clip", "clip", "--pictures", "4", "steps=2"], ["model_log.csv", '"pictures": 4', "painter"]),
    "generate": (
        ["runs/gpt2", "--prompt", "a red boat", "max_new_tokens=5"],
        ["a red boat", '"max_new_tokens": 5', "step_00000002", "the screen"],
    ),
    "generate --images": (["runs/coca", "--images", "boat.png", "--out", "texts.csv"], ["boat.png", "texts.csv", '"samples_in": 1']),
    "generate --shards": (
        ["runs/painter", "--prompts-from", "runs/gpt2", "--prompt", "a boat", "--samples-per-prompt", "3", "--shards", "made", "steps=2"],
        ["what runs/gpt2 makes of 'a boat'", '"samples_in": 3', '"writes": "made"', '"steps": 2'],
    ),
    "dedup": (["shards", "out", "--embeddings", "embeddings"], ['"samples_in": 90', '"joined": 90', "keep.parquet", '"threshold": 0.95']),
    "filter": (["shards", "out.parquet", "--where", "width > 2"], ['"samples_out": 90', "first kept", "out.parquet"]),
    "reorder": (["embeddings", "shards", "out"], ['"rows": 90', '"stands_in_out": "nothing"', "img_emb", "first shard"]),
    "export": (["runs/gpt2", "out"], ["step_00000002", '"weights": "averaged"', '"replaces": false']),
    "studio": (["runs/gpt2", "runs/coca"], ["http://127.0.0.1", "gpt2", "coca", "step_00000002"]),
}
"""Verb, and which of its works → (arguments, what the plan says)."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models and runs of every kind that the calls name; the shards are not indexed."""
    from support_pages import _embeddings

    from diptych.datasets.keep import write_keep
    from diptych.datasets.manifest import open_manifest
    from diptych.pipelines.local import train_here

    folder = tmp_path_factory.mktemp("dry")
    shards = make_shards(folder / "shards")
    manifest = open_manifest(str(shards))
    write_keep(str(folder / "keep.parquet"), manifest, np.arange(45))
    _embeddings(shards, folder / "embeddings")
    for task, name in (("gpt2", "gpt2"), ("coca", "coca"), ("stable_diffusion", "painter")):
        changes = [f"data.shards={shards}", "train.steps=2", "validation.samples=8", "optim.ema_decay=0.5"]
        train_here(apply_overrides(load_recipe(task, "smoke"), changes), folder / "runs" / name)
    shutil.rmtree(shards / ".diptych")
    (folder / "photos.csv").write_text("file_name,text\na.jpg,a red boat\n")
    (folder / "urls.csv").write_text("url,caption\nhttp://127.0.0.1:1/a.jpg,a red boat\n")
    MAKERS["boat.png"](folder, None, None)
    save_clip(folder / "clip")
    save_vae(folder / "vae")
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same as the working folder, with every place for temporary files, caches and settings inside it."""
    for name in ("HOME", "TMPDIR", "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        (made / "places" / name).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(name, str(made / "places" / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(made)
    yield made
    tempfile.tempdir = None


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: path → (size, time of the last change)."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()} | {
        str(path): (0, 0) for path in folder.rglob("*") if path.is_dir()
    }


def invoke(verb: str, arguments: list[str], *flags: str) -> None:
    """`diptych VERB … --dry-run`."""
    # Options of `submit` stand before the verb that it sends.
    words = ["--dry-run", *flags, *arguments] if verb == "submit" else [*arguments, "--dry-run", *flags]
    _application([verb])(args=[verb, *words], prog_name="diptych", standalone_mode=False)


def takes_dry_run(verb: str) -> bool:
    """Whether the verb has the option."""
    tree = ast.parse(Path(str(find_spec(f"diptych.pipelines.{verb}").origin)).read_text())  # type: ignore[union-attr]
    (command,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command"]
    return "dry_run" in [each.arg for each in (*command.args.args, *command.args.kwonlyargs)]


def test_every_verb_that_starts_work_has_the_option() -> None:
    informs = {"index", "inspect", "keep", "report", "recipes", "runs", "doctor"}
    assert {verb for verb in available_verbs() if takes_dry_run(verb)} == set(available_verbs()) - informs
    assert {name.split()[0] for name in CALLS} == set(available_verbs()) - informs


@pytest.mark.parametrize("name", CALLS)
def test_the_plan_is_shown_and_nothing_is_written(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb, (arguments, expected) = name.split(maxsplit=1)[0], CALLS[name]
    before, offline = tree(folder), os.environ["HF_HUB_OFFLINE"]
    with pytest.raises(SystemExit) as ended:
        invoke(verb, arguments, "--json")
    assert ended.value.code == 0
    assert tree(folder) == before
    assert os.environ["HF_HUB_OFFLINE"] == offline
    output = capsys.readouterr()
    text = output.out.splitlines()[-1]
    plan: dict[str, Any] = json.loads(text)
    assert all(part in text for part in expected), text
    assert "would " in output.err
    assert all(key in output.err for key in plan if plan[key] not in ({}, [])), "people see what programs see"


def test_indexed_shards_are_not_walked_again(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from diptych.datasets import manifest_build
    from diptych.datasets.manifest import open_manifest

    arguments, _ = CALLS["filter"]
    open_manifest("shards")
    try:
        monkeypatch.setattr(manifest_build, "survey_shard", None)
        with pytest.raises(SystemExit) as ended:
            invoke("filter", arguments)
        assert ended.value.code == 0
    finally:
        shutil.rmtree("shards/.diptych")


@pytest.mark.parametrize(
    ("verb", "arguments", "key"),
    [
        ("train", ["gpt2", "data.shards=shards", "task.tokenizer=some/tokenizer"], "task.tokenizer"),
        ("cache", ["text-states", "shards", "out", "--model", "some/pipeline"], "--model"),
        ("pack", ["some/pictures", "out"], "SOURCE"),
    ],
)
def test_no_hub_is_asked(verb: str, arguments: list[str], key: str, folder: Path) -> None:
    """What is only there counts as missing, and people are told why."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "diptych", verb, *arguments, "--dry-run"]
        answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        hub.setblocking(False)
        with pytest.raises(BlockingIOError):
            hub.accept()
    assert answer.returncode == 2, answer.stderr
    assert f"{key}: received" in answer.stderr
    assert "a dry run downloads nothing" in answer.stderr


@pytest.mark.parametrize(
    ("verb", "arguments", "key"),
    [
        ("train", ["coca", "data.shards=shards", "train.steps=0"], "train.steps"),
        ("pack", ["missing.csv", "out"], "SOURCE"),
        ("pack", ["photos.csv", "shards"], "OUT"),
        ("ingest", ["urls.csv", "out", "--url-column", "link"], "url_column"),
        ("ingest", ["pages.txt", "out", "--pages"], "--dry-run"),
        ("embed", ["shards", "out", "--model", "clip", "--modality", "smell"], "modality"),
        ("embed", ["shards", "embeddings", "--model", "clip"], "OUT"),
        ("cache", ["latents", "shards", "out", "--model", "vae", "--size", "33"], "--size"),
        ("submit", ["trian", "coca"], "VERB"),
        ("demo", ["--out", "runs"], "--out"),
        ("evaluate", ["runs/nothing"], "RUN"),
        ("evaluate", ["runs/gpt2", "--checkpoint", "step_9"], "checkpoint"),
        ("generate", ["runs/gpt2", "--out", "texts.doc"], "--out"),
        ("generate", ["runs/painter", "--prompt", "a boat", "stepz=3"], "stepz"),
        ("dedup", ["shards", "out"], "--embeddings"),
        ("filter", ["shards", "out.parquet", "--where", "widht > 2"], "--where"),
        ("export", ["runs/gpt2", "shards"], "OUT"),
        ("studio", ["runs/gpt2", "--host", "0.0.0.0"], "--host"),
    ],
)
def test_what_the_call_itself_would_refuse_is_refused(verb: str, arguments: list[str], key: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        invoke(verb, arguments)
    assert refused.value.key == key
