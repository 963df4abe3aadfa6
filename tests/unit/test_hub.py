"""`pack --push-to-hub`, against a stand-in of the hub's API: what arrives is whole, readable and private unless asked otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support_hub import Hub, hub

from diptych.config import ConfigError
from diptych.datasets.hub import stage
from diptych.datasets.manifest import open_manifest
from diptych.pipelines import pack


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text(f"shade ä {number}")
    return folder


def call(photos: Path, out: Path, server: Hub, *options: str, token: str = "hf_test") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "diptych.pipelines.pack", str(photos), str(out), "--samples-per-shard", "3", "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_shards_and_card_arrive(photos: Path, tmp_path: Path) -> None:
    with hub() as server:
        answer = call(photos, tmp_path / "out", server, "--push-to-hub", "me/shades")
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout.splitlines()[-1])["pushed"].endswith("me/shades")
        assert server.repositories["me/shades"]["type"] == "dataset"
        assert private(server.repositories["me/shades"])
        files = server.files["me/shades"]
    assert set(files) == {"README.md", "data/00000.tar", "data/00001.tar"}
    for name in ("00000", "00001"):
        assert files[f"data/{name}.tar"] == (tmp_path / "out" / f"{name}.tar").read_bytes()
    card = files["README.md"].decode()
    assert "| samples | 5 |" in card
    assert 'data_files: "data/**/*.tar"' in card
    assert open_manifest(str(tmp_path / "out")).digest in card
    assert not list((tmp_path / "out").glob(".hub-*"))


def private(request: dict[str, Any]) -> bool:
    return request.get("private") is True or request.get("visibility") == "private"


def test_an_imagefolder_is_read_by_hugging_face_datasets(photos: Path, tmp_path: Path) -> None:
    with hub() as server:
        answer = call(
            photos, tmp_path / "out", server, "--push-to-hub", "me/shades", "--hub-layout", "imagefolder", "--no-private"
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        assert not private(server.repositories["me/shades"])
        files = server.files["me/shades"]
    copy = tmp_path / "downloaded"
    for name, content in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    import datasets

    rows = datasets.load_dataset("imagefolder", data_dir=str(copy), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(row["text"] for row in rows) == [f"shade ä {number}" for number in range(5)]
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        stored = tar.extractfile("000000.jpg")
        assert stored is not None
        assert files["images/0000/000000000.jpg"] == stored.read()


def test_a_hub_that_refuses_costs_no_shards(photos: Path, tmp_path: Path) -> None:
    with hub() as server:
        answer = call(photos, tmp_path / "out", server, "--push-to-hub", "me/shades", token="wrong")
        assert answer.returncode == 1
        assert "hf auth login" in answer.stderr
        assert server.files == {}
        assert open_manifest(str(tmp_path / "out")).samples == 5
        wrong = call(photos, tmp_path / "out", server, "--push-to-hub", "no spaces allowed/x")
        assert wrong.returncode == 2
        assert "org/name" in wrong.stderr


def test_nothing_is_pushed_unless_asked(photos: Path, tmp_path: Path) -> None:
    with hub() as server:
        assert call(photos, tmp_path / "out", server).returncode == 0
        assert server.repositories == {}


def test_layouts_that_do_not_fit_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\n")
    pack.run(str(tmp_path / "prompts.txt"), str(tmp_path / "out"), jobs=1)
    manifest = open_manifest(str(tmp_path / "out"))
    for layout in ("imagefolder", "zip"):
        (tmp_path / layout).mkdir()
        with pytest.raises(ConfigError, match="webdataset"):
            stage(manifest, tmp_path / layout, layout, "me/x")  # type: ignore[arg-type]
