"""`pack`: every source becomes the same shards, what cannot be used is named, and a call that was cut short goes on."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.config import ConfigError
from diptych.datasets.pack import Columns, PackOptions, Part, parts
from diptych.datasets.pack_captions import clean_keywords
from diptych.datasets.pack_images import BadImageError, pack_image
from diptych.datasets.pack_tables import Row
from diptych.pipelines import pack


def encoded(mode: str = "RGB", size: tuple[int, int] = (40, 30), image_format: str = "JPEG", colour: Any = None, **extra: Any) -> bytes:
    """A picture in one colour."""
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, image_format, **extra)
    return data.getvalue()


def members(out: Path) -> dict[str, dict[str, bytes]]:
    """key → extension → content of every sample of every shard."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                file = tar.extractfile(info)
                assert file is not None
                found.setdefault(key, {})[extension] = file.read()
    return found


def captions(out: Path) -> list[str]:
    """Captions in the order of the keys."""
    return [sample["txt"].decode() for _, sample in sorted(members(out).items())]


def image_folder(folder: Path, count: int = 3) -> Path:
    """Pictures 0.jpg, 1.jpg, … without captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index}.jpg").write_bytes(encoded(colour=(index * 20, 0, 0)))
    return folder


TEXTS = ["a red cat", "zwei Hunde", "三只鸟"]


def write_source(kind: str, folder: Path) -> Path:
    """Three pictures with `TEXTS`, as `kind` lays them out."""
    pictures = image_folder(folder / ("images" if kind in ("kaggle", "coco_json") else ""))
    names = ["0.jpg", "1.jpg", "2.jpg"]
    if kind == "metadata.csv":
        with (folder / "metadata.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["file_name", "additional_feature"], *zip(names, TEXTS, strict=True)])
    elif kind == "metadata.jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, TEXTS, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    elif kind == "captions.jsonl":
        lines = [json.dumps({"file": name, "caption": text, "captions": [text, "x"]}) for name, text in zip(names, TEXTS, strict=True)]
        (folder / "captions.jsonl").write_text("\n".join(lines))
    elif kind == "sidecar":
        for name, text in zip(names, TEXTS, strict=True):
            (pictures / name).with_suffix(".txt").write_text(text)
    elif kind == "kaggle":
        with (folder / "prompts.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["imgId", "prompt"], *zip(("0", "1", "2"), TEXTS, strict=True)])
    elif kind == "coco_json":
        content = {"images": [], "annotations": []}  # type: dict[str, list[dict[str, Any]]]
        for index, text in enumerate(TEXTS):
            content["images"].append({"id": index, "file_name": names[index]})
            content["annotations"] += [{"image_id": index, "caption": text}, {"image_id": index, "caption": "another"}]
        (folder / "captions_val.json").write_text(json.dumps(content))
    elif kind == "diffusiondb":
        part = folder / "part-000001"
        part.mkdir()
        for name in names:
            (folder / name).rename(part / name)
        facts = {name: {"p": text, "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"} for name, text in zip(names, TEXTS, strict=True)}
        (part / "part-000001.json").write_text(json.dumps(facts))
    elif kind == "tsv":
        rows = [["image_path", "prompt"], *([str(pictures / name), text] for name, text in zip(names, TEXTS, strict=True))]
        (folder / "table.tsv").write_text("\n".join("\t".join(row) for row in rows))
        return folder / "table.tsv"
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        cells = [{"bytes": (pictures / name).read_bytes(), "path": name} for name in names]
        pq.write_table(pa.table({"image": cells, "text": TEXTS}), folder / "table.parquet", row_group_size=2)
        return folder / "table.parquet"
    return folder


KINDS = ["metadata.csv", "metadata.jsonl", "captions.jsonl", "sidecar", "kaggle", "coco_json", "diffusiondb", "tsv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_same_samples(kind: str, tmp_path: Path) -> None:
    source = write_source(kind, tmp_path / "source")
    result = pack.run(str(source), str(tmp_path / "out"), {"samples_per_shard": 2}, jobs=1)
    assert (result["samples_in"], result["samples_out"], result["faults"], result["shards"]) == (3, 3, [], 2)
    found = members(tmp_path / "out")
    assert list(found) == ["000000", "000001", "000010"]
    assert captions(tmp_path / "out") == TEXTS
    pictures = [np.asarray(Image.open(io.BytesIO(sample["jpg"]))) for sample in found.values()]
    assert [int(picture[5, 5, 0]) // 10 * 10 for picture in pictures] == [0, 20, 40]
    facts = json.loads(found["000010"]["json"])
    assert (facts["caption"], facts["width"], facts["height"], facts["status"]) == (TEXTS[2], 40, 30, "success")


def test_a_hugging_face_data_set_is_read_from_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (20, 10), (index * 60, 0, 0)) for index in range(3)]
    stored = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"image": pictures, "text": TEXTS})})
    stored = stored.cast_column("image", datasets.Image())
    stored.save_to_disk(str(tmp_path / "hf"))
    result = pack.run(str(tmp_path / "hf"), str(tmp_path / "out"), {"samples_per_shard": 2}, jobs=1)
    assert (result["samples_out"], captions(tmp_path / "out")) == (3, TEXTS)
    with pytest.raises(ConfigError, match=r"--split.*train"):
        pack.run(str(tmp_path / "hf"), str(tmp_path / "other"), split="tset")


def test_prompts_alone_become_text_shards(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("castle , 4 k\n\n  grüner_Drache \n".encode() + b"broken \xff byte\n")
    result = pack.run(str(tmp_path / "prompts.txt"), str(tmp_path / "out"), {"clean_keywords": True}, jobs=1)
    assert captions(tmp_path / "out") == ["castle, 4k", "grüner Drache"]
    assert [(fault["kind"], "prompts.txt:4" in fault["detail"]) for fault in result["faults"]] == [("unreadable_row", True)]
    assert all(set(sample) == {"txt", "json"} for sample in members(tmp_path / "out").values())


def test_what_cannot_be_used_is_named_and_leaves_a_gap(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", 8)
    (source / "1.jpg").write_bytes(encoded()[:200])
    (source / "2.jpg").write_bytes(b"no picture")
    (source / "3.jpg").write_bytes(b"")
    (source / "5.jpg").unlink()
    rows = [
        ["file_name", "text"],
        ["0.jpg", "fine"],
        ["1.jpg", "cut"],
        ["2.jpg", "text"],
        ["3.jpg", "empty"],
        ["4.jpg", " "],
        ["5.jpg", "gone"],
    ]
    with (source / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([*rows, ["6.jpg", "too", "many"]])
    result = pack.run(str(source), str(tmp_path / "out"), {"samples_per_shard": 100}, jobs=1)
    kinds = {fault["key"]: fault["kind"] for fault in result["faults"]}
    # 6.jpg: its row cannot be read, so no row names it; 7.jpg stands in no row at all.
    assert kinds == {
        "0000001": "undecodable_image", "0000002": "undecodable_image", "0000003": "undecodable_image", "0000004": "no_caption",
        "0000005": "missing_image", "0000006": "unreadable_row", "0000007": "no_row", "0000008": "no_row",
    }  # fmt: skip
    assert list(members(tmp_path / "out")) == ["0000000"]
    assert (result["samples_in"], result["samples_out"]) == (9, 1)
    stats = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (9, 1, 3)
    assert all(fault["shard"] == "00000.tar" and fault["detail"] for fault in result["faults"])


def test_a_call_that_was_cut_short_packs_only_what_is_missing(tmp_path: Path) -> None:
    source, out = write_source("metadata.csv", tmp_path / "source"), tmp_path / "out"
    first = pack.run(str(source), str(out), {"samples_per_shard": 1}, jobs=1)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    whole = members(out)
    (out / "00001_stats.json").unlink()  # what a killed call leaves: a shard without its last file
    again = pack.run(str(source), str(out), {"samples_per_shard": 1}, jobs=1)
    assert (first["shards_skipped"], again["shards_skipped"], again["samples_out"]) == (0, 2, 3)
    changed = [path.name for path in sorted(out.glob("*.tar")) if path.stat().st_mtime_ns != stamps[path.name]]
    assert (changed, {key: set(sample) for key, sample in members(out).items()}) == (
        ["00001.tar"],
        {key: set(sample) for key, sample in whole.items()},
    )


def test_faults_are_told_again_by_a_call_that_finds_everything_done(tmp_path: Path) -> None:
    source = write_source("metadata.csv", tmp_path / "source")
    (source / "1.jpg").write_bytes(b"broken")
    first = pack.run(str(source), str(tmp_path / "out"), jobs=1)
    again = pack.run(str(source), str(tmp_path / "out"), jobs=1)
    assert first["faults"] == again["faults"] != []


def test_an_output_of_another_call_is_refused(tmp_path: Path) -> None:
    source, out = write_source("metadata.csv", tmp_path / "source"), str(tmp_path / "out")
    pack.run(str(source), out, {"size": 64}, jobs=1)
    with pytest.raises(ConfigError, match="size=64, not 32"):
        pack.run(str(source), out, {"size": 32}, jobs=1)


def test_processes_give_the_same_shards_as_one(tmp_path: Path) -> None:
    source = write_source("sidecar", tmp_path / "source")
    pack.run(str(source), str(tmp_path / "one"), {"samples_per_shard": 1}, jobs=1)
    pack.run(str(source), str(tmp_path / "two"), {"samples_per_shard": 1}, jobs=2)
    assert members(tmp_path / "one") == members(tmp_path / "two")


@pytest.mark.parametrize(("mode", "texts"), [("first", ["a", "d"]), ("each", ["a", "b", "c", "d", "e"]), ("all", ["a\nb\nc", "d\ne"])])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_captions_per_image(mode: str, texts: list[str], kind: str, tmp_path: Path) -> None:
    image_folder(tmp_path / "source", 2)
    rows = [{"file_name": "0.jpg", "captions": ["a", "b", "c"]}, {"file_name": "1.jpg", "captions": ["d", "e"]}]
    if kind == "jsonl":
        source = tmp_path / "source"
        (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = tmp_path / "source" / "table.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
    pack.run(str(source), str(tmp_path / "out"), {"captions": mode, "samples_per_shard": 2}, jobs=1)
    assert captions(tmp_path / "out") == texts


def test_a_template_makes_captions_of_columns(tmp_path: Path) -> None:
    (tmp_path / "reports.csv").write_text("label,text\nNo Finding,clear lungs\nEdema,fluid {here}\n")
    pack.run(str(tmp_path / "reports.csv"), str(tmp_path / "out"), {"template": "'{label}':{text}"}, jobs=1)
    assert captions(tmp_path / "out") == ["'No Finding':clear lungs", "'Edema':fluid {here}"]
    with pytest.raises(ConfigError, match="'person'"):
        pack.run(str(tmp_path / "reports.csv"), str(tmp_path / "other"), {"template": "{person} thumbs up"}, jobs=1)


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing/", "no such file or folder"), ("missing.csv", "no such file"), ("empty", "no pictures"), ("shards", "already")],
)
def test_a_source_that_is_none_is_refused_with_the_remedy(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        pack.run(str(tmp_path / source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mode", "image_format", "colour", "expected"),
    [
        ("RGBA", "PNG", (255, 0, 0, 0), (255, 255, 255)),  # transparency is laid on white
        ("LA", "PNG", (0, 255), (0, 0, 0)),
        ("P", "PNG", 0, (0, 0, 0)),
        ("L", "JPEG", 200, (200, 200, 200)),
        ("CMYK", "JPEG", (0, 255, 255, 0), (254, 0, 0)),
        ("I;16", "PNG", 0x8000, (128, 128, 128)),  # scaled, not clipped
        ("1", "PNG", 1, (255, 255, 255)),
        ("RGB", "WEBP", (10, 200, 30), (10, 200, 30)),
    ],
)
def test_pictures_of_every_mode_become_opaque_rgb(mode: str, image_format: str, colour: Any, expected: tuple[int, int, int]) -> None:
    packed = pack_image(encoded(mode, (16, 16), image_format, colour), "none", 0)
    image = Image.open(io.BytesIO(packed.data))
    assert (image.mode, image.format) == ("RGB", "JPEG")
    assert np.abs(np.asarray(image, int)[8, 8] - expected).max() <= 6


def test_heic_is_read() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    packed = pack_image(encoded("RGB", (64, 48), "HEIF", (10, 20, 200)), "longest", 32)
    assert (packed.width, packed.height, packed.original_width) == (32, 24, 64)


def test_orientation_is_applied_and_removed() -> None:
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is left comes up
    data = io.BytesIO()
    picture.save(data, "JPEG", exif=exif, quality=95)
    packed = pack_image(data.getvalue(), "none", 0)
    image = Image.open(io.BytesIO(packed.data))
    assert image.size == (20, 40) == (packed.original_width, packed.original_height)
    pixels = np.asarray(image, int)
    assert pixels[5, 10, 0] > 200 > 50 > pixels[35, 10, 0]
    assert image.getexif().get(0x0112, 1) == 1


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.integers(8, 96),
    resize=st.sampled_from(["border", "center_crop", "longest"]),
)
def test_resizing_keeps_the_aspect(width: int, height: int, size: int, resize: Any) -> None:
    picture = Image.new("RGB", (width, height), (0, 128, 0))
    data = io.BytesIO()
    picture.save(data, "PNG")
    packed = pack_image(data.getvalue(), resize, size, "png")
    pixels = np.asarray(Image.open(io.BytesIO(packed.data)), int)
    assert pixels.shape == (packed.height, packed.width, 3)
    if resize == "longest":
        scale = min(1.0, size / max(width, height))
        assert (packed.width, packed.height) == (max(1, round(width * scale)), max(1, round(height * scale)))
        return
    assert (packed.width, packed.height) == (size, size)
    green = (np.abs(pixels - [0, 128, 0]).max(axis=2) < 40).mean()
    # The margin is white and only as wide as the aspect asks; a crop has none.
    inside = min(width, height) / max(width, height) if resize == "border" else 1.0
    assert abs(green - inside) <= 3 / size


def test_a_picture_that_needs_no_change_keeps_its_bytes() -> None:
    data = encoded(size=(50, 40), quality=60)
    assert pack_image(data, "none", 0).data == data
    assert pack_image(data, "longest", 64).data == data
    assert pack_image(data, "longest", 32).data != data


def test_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(size=(400, 400), image_format="PNG")
    monkeypatch.setattr("diptych.datasets.images.MAX_PIXELS", 1000)
    with pytest.raises(BadImageError, match="400 × 400"):
        pack_image(data, "none", 0)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 3000), flip=st.integers(0, 3000))
def test_damaged_pictures_are_packed_or_refused_but_never_raise_otherwise(cut: int, flip: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    data = bytearray(stream.getvalue()[: max(cut, 1)])
    data[flip % len(data)] ^= 0xFF
    try:
        pack_image(bytes(data), "center_crop", 32)
    except BadImageError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b  c", "a b c"),
        ("castle, 4 k, sharp", "castle, 4k, sharp"),
        ("sci - fi ,art", "sci-fi, art"),
        (", one ,two,,three ,", "one, two, three"),
    ],
)
def test_keywords_are_tidied(text: str, expected: str) -> None:
    assert clean_keywords(text) == expected
    assert clean_keywords(expected) == expected


class Counted:
    """A table read by range whose row i has `counts[i]` captions."""

    base, columns, indexed = "", ("text",), True

    def __init__(self, counts: list[int]) -> None:
        self.counts, self.length = counts, len(counts)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        for index in range(start, self.length if stop is None else min(stop, self.length)):
            yield Row(str(index), {"text": [f"{index}.{number}" for number in range(self.counts[index])]})

    def captions(self, column: str) -> Iterator[Any]:
        return (row.fields[column] for row in self.rows())


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 7), min_size=1, max_size=20), size=st.integers(1, 9), indexed=st.booleans())
def test_cutting_into_parts_neither_loses_nor_repeats_a_sample(counts: list[int], size: int, indexed: bool) -> None:
    table = Counted(counts)
    table.indexed = indexed  # type: ignore[misc]
    options = PackOptions(captions="each", samples_per_shard=size)
    columns = Columns("", "text", "")
    cut: list[Part] = list(parts(table, columns, options))
    whole = [record.caption for part in cut for record in part.records(columns, options)]
    expected = [f"{row}.{number}" if count else None for row, count in enumerate(counts) for number in range(max(count, 1))]
    assert whole == expected
    assert [part.number for part in cut] == list(range(len(cut)))
    assert all(len(list(part.records(columns, options))) == size for part in cut[:-1])
