"""The tar faults as a run meets them: each is found by `index` or the ledger by shard and key, none is silent, none merged."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support_runs import overrides

from diptych.datasets.ledger import read_ledger
from diptych.datasets.scenes import render

SAMPLES = 12


def picture(index: int) -> bytes:
    buffer = io.BytesIO()
    render(0, index, size=32)[0].save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def members(index: int) -> list[tuple[str, bytes]]:
    return [(f"k{index:02d}.jpg", picture(index)), (f"k{index:02d}.txt", render(0, index, size=32)[1].encode())]


def write_tar(path: Path, entries: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> dict[str, int]:
    """Write the entries; the offset of each one's header."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {info.name: info.offset for info in tar.getmembers()}


def all_members() -> list[tuple[str, bytes]]:
    return [entry for index in range(SAMPLES) for entry in members(index)]


def cut(at: Callable[[dict[str, int]], int]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        offset = at(write_tar(path, all_members()))
        path.write_bytes(path.read_bytes()[:offset])

    return build


def patched(change: Callable[[bytearray, dict[str, int]], None]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        offsets = write_tar(path, all_members())
        data = bytearray(path.read_bytes())
        change(data, offsets)
        path.write_bytes(bytes(data))

    return build


def flip(data: bytearray, offsets: dict[str, int]) -> None:
    data[offsets["k05.txt"] + 2] ^= 0x01


def zero(data: bytearray, offsets: dict[str, int]) -> None:
    data[offsets["k05.jpg"] : offsets["k05.jpg"] + 512] = bytes(512)


def replaced(name: str, data: bytes | None) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        entries = [(each, content if each != name else data) for each, content in all_members()]
        write_tar(path, [(each, content) for each, content in entries if content is not None])

    return build


def doubled(path: Path) -> None:
    write_tar(path, [*all_members(), *members(3)])


def dotted(path: Path) -> None:
    write_tar(path, [*all_members(), *[(f"k99.{part}.{extension}", data) for part in (1, 2) for extension, data in
                                       (("jpg", picture(part)), ("txt", b"a red circle"))]])  # fmt: skip


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # name: (how the tar is made, kind that index or the ledger tells, key that it names)
    "cut inside a member": (cut(lambda offsets: offsets["k08.jpg"] + 600), "cut_member", "k08"),
    "cut at a boundary": (cut(lambda offsets: offsets["k08.jpg"]), "no_end_marker", "k07"),
    "cut inside a header": (cut(lambda offsets: offsets["k08.jpg"] + 100), "cut_header", "k07"),
    "one flipped header byte": (patched(flip), "bad_header", "k05"),
    "zeroed header": (patched(zero), "zeroed_header", "k04"),
    "duplicate key": (doubled, "duplicate_key", "k03"),
    "key with several dots": (dotted, "dotted_key", "k99.1"),
    "missing member": (replaced("k05.txt", None), "missing_member", "k05"),
    "undecodable JPEG": (replaced("k05.jpg", picture(5)[:-200]), "undecodable_image", "k05"),
    "empty file": (replaced("k05.jpg", b""), "empty_member", "k05"),
}


def train(folder: Path, *changes: str) -> dict[str, Any]:
    from diptych.pipelines import train as verb
    from diptych.pipelines.local import train_here

    settings = overrides(folder / "shards", "run", workers=1, train__steps=6, checkpoint__every_steps=0, data__validation_share=0)
    config = verb.resolve("coca", "smoke", "", [*settings, "task.tokenizer=train:64", *changes])
    return train_here(config, folder / "run")


@pytest.mark.parametrize("name", FAULTS)
def test_every_tar_fault_is_named_and_the_run_goes_on(tmp_path: Path, name: str) -> None:
    from diptych.pipelines import index

    build, kind, key = FAULTS[name]
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/00000.tar", [(f"a{entry}", data) for entry, data in all_members()])
    build(tmp_path / "shards/00001.tar")
    result = train(tmp_path)
    assert result["status"] == "finished"
    found = index.run(str(tmp_path / "shards"))["faults"] + read_ledger(str(tmp_path / "run"))
    assert any((fault["shard"], fault["kind"]) == ("00001.tar", kind) and fault["key"].startswith(key) for fault in found), found
    assert {fault["shard"] for fault in found} == {"00001.tar"}


def test_keys_with_dots_stay_apart(tmp_path: Path) -> None:
    from diptych.datasets.manifest import build_manifest

    (tmp_path / "shards").mkdir()
    dotted(tmp_path / "shards/00000.tar")
    manifest = build_manifest(str(tmp_path / "shards"))
    assert manifest.samples == SAMPLES + 2
    assert {"k99.1", "k99.2"} <= set(manifest.column("key").to_pylist())


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["PAX", "GNU"])
def test_long_names_are_whole_keys(tmp_path: Path, tar_format: int) -> None:
    from diptych.pipelines import index

    (tmp_path / "shards").mkdir()
    long = "folder/" + "n" * 150
    write_tar(tmp_path / "shards/00000.tar", [(f"{long}{entry}", data) for entry, data in all_members()], tar_format)
    assert index.run(str(tmp_path / "shards"))["faults"] == []
    assert train(tmp_path)["status"] == "finished"


def test_the_run_stops_when_the_budget_is_spent(tmp_path: Path) -> None:
    """Half of the pictures are broken: 6 distinct bad samples, of which the run may replace 2."""
    (tmp_path / "shards").mkdir()
    broken = [(name, data[:-100] if name.endswith("jpg") and int(name[1:3]) % 2 else data) for name, data in all_members()]
    write_tar(tmp_path / "shards/00000.tar", broken)
    ended = train(tmp_path, "data.fault_budget=2", "train.steps=12")
    assert ended["status"] == "failed"
    assert "data.fault_budget" in ended["error"]
    assert "allowed 2" in ended["error"]
    ledger = read_ledger(str(tmp_path / "run"))
    assert {line["kind"] for line in ledger} == {"undecodable_image"}
    assert len({line["key"] for line in ledger}) > 2
    assert any(line["key"] in ended["error"] for line in ledger)
