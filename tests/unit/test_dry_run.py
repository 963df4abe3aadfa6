"""`--dry-run` on the verbs that start long work: everything is checked, the plan is shown, and nothing is started or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support_models import save_vae
from support_pages import save_clip
from support_runs import make_shards

from diptych.cli import _application
from diptych.config import ConfigError

VERBS = {
    "train": ["coca", "data.shards=shards", "name=first"],
    "tune": ["coca", "--vary", "optim.lr=1e-4,1e-3", "data.shards=shards", "name=first"],
    "pack": ["photos.csv", "out"],
    "ingest": ["urls.csv", "out"],
    "embed": ["shards", "out", "--model", "clip"],
    "cache": ["latents", "shards", "out", "--model", "vae", "--size", "32"],
    "submit": ["train", "coca", "output=/shared/runs"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and models of every kind that the calls name."""
    from diptych.datasets.manifest import open_manifest

    made = tmp_path_factory.mktemp("dry")
    open_manifest(str(make_shards(made / "shards")))
    (made / "photos.csv").write_text("file_name,text\na.jpg,a red boat\n")
    (made / "urls.csv").write_text("url,caption\nhttp://127.0.0.1:1/a.jpg,a red boat\n")
    save_clip(made / "clip")
    save_vae(made / "vae")
    return made


def call(capsys: pytest.CaptureFixture[str], verb: str, arguments: list[str]) -> dict[str, Any]:
    """What `diptych VERB … --dry-run --json` prints as its last line."""
    # Options of `submit` stand before the verb.
    words = ["--dry-run", "--json", *arguments] if verb == "submit" else [*arguments, "--dry-run", "--json"]
    with pytest.raises(SystemExit) as ended:
        _application([verb])(args=[verb, *words], prog_name="diptych", standalone_mode=False)
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("verb", VERBS)
def test_the_plan_is_shown_and_nothing_is_written(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    plan = call(capsys, verb, VERBS[verb])
    assert sorted(folder.rglob("*")) == before
    text = json.dumps(plan)
    expected = {
        "train": ["cpus", "digest"],
        "tune": ["0.0001", "at_once"],
        "pack": ["a red boat", "file_name"],
        "ingest": ["urls.csv", "caption"],
        "embed": ["partitions", "first caption"],
        "cache": ["partitions", "latents"],
        "submit": ["python -m diptych.pipelines.train coca output=/shared/runs", "working_dir"],
    }
    assert all(part in text for part in expected[verb]), text


@pytest.mark.parametrize(
    ("verb", "arguments", "key"),
    [
        ("train", ["coca", "data.shards=shards", "train.steps=0"], "train.steps"),
        ("pack", ["missing.csv", "out"], "SOURCE"),
        ("ingest", ["urls.csv", "out", "--url-column", "link"], "url_column"),
        ("ingest", ["pages.txt", "out", "--pages"], "--dry-run"),
        ("embed", ["shards", "out", "--model", "clip", "--modality", "smell"], "modality"),
        ("cache", ["latents", "shards", "out", "--model", "vae", "--size", "33"], "--size"),
        ("submit", ["trian", "coca"], "VERB"),
    ],
)
def test_what_the_call_itself_would_refuse_is_refused(
    verb: str, arguments: list[str], key: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = ["--dry-run", *arguments] if verb == "submit" else [*arguments, "--dry-run"]
    with pytest.raises(ConfigError) as refused:
        _application([verb])(args=[verb, *words], prog_name="diptych", standalone_mode=False)
    assert refused.value.key == key
