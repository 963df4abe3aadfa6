"""Building a manifest: only what changed is walked, and what was cut short, damaged or is built elsewhere too comes out the same."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support_manifest import kinds, sample, write_set, write_tar

from diptych.config import ConfigError
from diptych.datasets import manifest_build
from diptych.datasets.manifest import Manifest, build_manifest, open_manifest
from diptych.datasets.manifest_writer import ManifestWriter
from diptych.datasets.survey import survey_shard


def test_only_changed_shards_are_walked_again(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")
    first = open_manifest(folder)
    walked = []
    monkeypatch.setattr(manifest_build, "survey_shard", lambda url, name, *rest: walked.append(name) or survey_shard(url, name, *rest))
    assert open_manifest(folder).digest == first.digest
    assert walked == []
    write_tar(tmp_path / "set" / "00001.tar", sample("00001000", "changed") + sample("00001000", "again"))
    write_tar(tmp_path / "set" / "00003.tar", sample("00003000"))
    seen = []
    second = open_manifest(folder, progress=lambda done, total: seen.append((done, total)))
    assert sorted(walked) == ["00001.tar", "00003.tar"]
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert second.shard_starts.tolist() == [0, 8, 9, 17, 18]
    assert kinds(second) == [("00001.tar", "00001000", "duplicate_key")]
    walked.clear()
    os.unlink(tmp_path / "set" / "00000.tar")
    third = open_manifest(folder)
    assert walked == []
    assert third.shard_starts.tolist() == [0, 1, 9, 10]
    assert kinds(third) == kinds(second)
    fresh = build_manifest(folder, str(tmp_path / "fresh"))
    assert len(walked) == 3
    assert fresh.digest == third.digest
    assert fresh.rows(np.arange(10)).equals(third.rows(np.arange(10)))


def test_a_flipped_byte_is_found_though_the_size_stays(tmp_path):
    folder = write_set(tmp_path / "set")
    assert open_manifest(folder).faults == []
    path = tmp_path / "set" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"00001003.jpg") + 5] ^= 1
    path.write_bytes(data)
    manifest = open_manifest(folder)
    assert ("00001.tar", "00001002", "bad_header") in kinds(manifest)
    assert ("00001.tar", "00001003", "missing_member") in kinds(manifest)
    assert manifest.samples == 24


def test_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")
    walked = []

    def walk_two(url, name, *rest):
        if len(walked) == 2:
            raise KeyboardInterrupt
        walked.append(name)
        return survey_shard(url, name, *rest)

    monkeypatch.setattr(manifest_build, "survey_shard", walk_two)
    with pytest.raises(KeyboardInterrupt):
        open_manifest(folder, jobs=1)
    with pytest.raises(FileNotFoundError):
        Manifest.load(f"{folder}/.diptych")
    monkeypatch.setattr(manifest_build, "survey_shard", lambda url, name, *rest: walked.append(name) or survey_shard(url, name, *rest))
    assert open_manifest(folder, jobs=1).samples == 24
    assert walked == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(entry for entry in os.listdir(f"{folder}/.diptych") if not entry.startswith("v-")) == [".lock", "manifest.json"]


def test_an_interrupted_commit_leaves_the_old_manifest(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")
    before = open_manifest(folder).digest
    write_tar(tmp_path / "set" / "00003.tar", sample("00003000"))
    monkeypatch.setattr(ManifestWriter, "_write_tables", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        open_manifest(folder)
    assert Manifest.load(f"{folder}/.diptych").digest == before
    assert len([entry for entry in os.listdir(f"{folder}/.diptych") if entry.startswith("v-")]) == 1


@pytest.mark.parametrize("damage", ["cut_json", "cut_column", "no_column", "old_format"])
def test_a_damaged_manifest_is_refused_and_built_again(damage, tmp_path):
    folder = write_set(tmp_path / "set")
    manifest = open_manifest(folder)
    about = Path(manifest.folder, "manifest.json")
    column = Path(manifest.columns.folder, "member_offset.bin")
    if damage == "cut_json":
        about.write_bytes(about.read_bytes()[:50])
    elif damage == "old_format":
        about.write_text(about.read_text().replace('"format": 1', '"format": 0'))
    elif damage == "cut_column":
        os.truncate(column, 8)
    else:
        column.unlink()
    with pytest.raises(ConfigError, match="diptych index"):
        Manifest.load(manifest.folder)
    assert open_manifest(folder).digest == manifest.digest


def test_walks_in_processes_find_the_same(tmp_path, monkeypatch):
    folder = write_set(tmp_path / "set")
    (tmp_path / "set" / "00001.tar").write_bytes((tmp_path / "set" / "00001.tar").read_bytes()[:5000])
    expected = open_manifest(folder, str(tmp_path / "one"), jobs=1)
    monkeypatch.setattr(manifest_build, "PROCESS_BYTES", 0)
    manifest = open_manifest(folder, str(tmp_path / "two"), jobs=2)
    assert (manifest.digest, manifest.faults) == (expected.digest, expected.faults)
    assert len(manifest.faults) == 1


def test_a_script_without_a_guard_is_told_so(tmp_path):
    """The processes that walk the shards import it, and would wait for the lock that it holds."""
    folder = write_set(tmp_path / "set")
    script = tmp_path / "script.py"
    script.write_text(
        "from diptych.datasets import manifest_build\n"
        "manifest_build.PROCESS_BYTES = 0\n"
        "from diptych.datasets.manifest import open_manifest\n"
        f"open_manifest({folder!r}, jobs=2)\n"
    )
    ended = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "put what it does under `if __name__ == '__main__':`" in ended.stderr


def test_builders_of_one_folder_wait_for_each_other(tmp_path):
    folder = write_set(tmp_path / "set")
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda _: open_manifest(folder).digest, range(4)))
    assert len(set(digests)) == 1
