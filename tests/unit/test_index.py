"""`diptych index` as people and programs call it: the fault matrix by shard and key, and the exit status."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

POMOLOGICAL = Path(__file__).parents[3] / "shared" / "data" / "pomological"


def index(*arguments, cwd=None):
    command = [sys.executable, "-m", "diptych.pipelines.index", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def shard(keys, layout=tarfile.PAX_FORMAT):
    """A tar of one picture and one caption per key."""
    picture, buffer = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (24, 16)).save(picture, "JPEG")
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as archive:
        for key in keys:
            for ext, data in (("jpg", picture.getvalue()), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_every_tar_fault_is_found_by_shard_and_key(tmp_path):
    long = "k" * 150
    shards = {f"{place:02d}": [f"{place:02d}-{letter}" for letter in "abcd"] for place in range(8)}
    tars = {name: bytearray(shard(keys, tarfile.USTAR_FORMAT)) for name, keys in shards.items()}
    second = tars["00"].index(b"00-b.jpg")  # header of the second sample
    last = tars["07"].index(b"07-d.txt")
    del tars["00"][second + 512 + 100 :]  # cut inside a member
    del tars["01"][second:]  # cut at a boundary
    del tars["02"][second + 100 :]  # cut inside a header
    tars["03"][second + 150] ^= 1  # a flipped byte
    tars["04"][second : second + 512] = bytes(512)  # a zeroed header
    tars["05"] = bytearray(shard(["05-a", "05-b", "05-a"]))  # a repeated key
    tars["06"] = bytearray(shard(["06.a.1", "06.a.2"]))  # keys with several dots
    del tars["07"][last : last + 1024]  # a missing member
    tars["08"] = bytearray()  # an empty file
    tars["09"] = bytearray(shard([f"{long}pax"]))
    tars["10"] = bytearray(shard([f"{long}gnu"], tarfile.GNU_FORMAT))
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, data in tars.items():
        (folder / f"{name}.tar").write_bytes(data)
    result = index(folder, "--json")
    assert result.returncode == 1, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert list(printed) == ["shards", "samples", "failed_downloads", "digest", "faults"]
    assert printed["shards"] == 11
    assert all(list(fault) == ["shard", "key", "kind", "detail"] for fault in printed["faults"])
    found = {(fault["shard"], fault["key"], fault["kind"]) for fault in printed["faults"]}
    assert found == {
        ("00.tar", "00-b", "cut_member"),
        ("01.tar", "01-a", "no_end_marker"),
        ("02.tar", "02-a", "cut_header"),
        ("03.tar", "03-a", "bad_header"),
        ("03.tar", "03-b", "missing_member"),
        ("04.tar", "04-a", "zeroed_header"),
        ("04.tar", "04-b", "missing_member"),
        ("05.tar", "05-a", "duplicate_key"),
        ("06.tar", "06.a.1", "dotted_key"),
        ("06.tar", "06.a.2", "dotted_key"),
        ("07.tar", "07-d", "missing_member"),
        ("08.tar", "", "empty_shard"),
    }
    for fault in printed["faults"]:
        assert fault["kind"] in result.stderr
    again = index(folder, "--json")
    assert (again.returncode, again.stdout) == (1, result.stdout)


def test_hostile_names_are_printed_as_they_are(tmp_path):
    (tmp_path / "a.tar").write_bytes(shard(["../[red]evil", "fine"]))
    result = index(tmp_path)
    assert result.returncode == 1
    assert "[red]evil" in result.stderr


def test_a_wrong_call_is_status_2(tmp_path):
    result = index(tmp_path / "nowhere")
    assert result.returncode == 2
    assert "does not exist" in result.stderr
    result = index(tmp_path)
    assert result.returncode == 2
    assert "diptych pack" in result.stderr


@pytest.mark.skipif(not POMOLOGICAL.exists(), reason="../shared/data/pomological is not there")
def test_real_data(tmp_path):
    result = index(POMOLOGICAL / "shards", "--manifest", tmp_path / "manifest", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert (printed["shards"], printed["samples"], printed["failed_downloads"], printed["faults"]) == (8, 7501, 79, [])
