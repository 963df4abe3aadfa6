"""The header walk against Python's `tarfile` on whole archives, and against every kind of damage."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.batches import Fault
from diptych.datasets.tar import BLOCK, Entry, Source, split_name, walk

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "deep/" * 30 + "x" * 120


def make_tar(members, layout=tarfile.PAX_FORMAT, mtime=1795199932.5, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout, **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime if layout == tarfile.PAX_FORMAT else int(mtime)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def found(data, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    items = list(walk(Source(str(path)), "a.tar"))
    return [item for item in items if isinstance(item, Entry)], [item for item in items if isinstance(item, Fault)]


def names_of(entries):
    return [entry.name for entry in entries]


def kinds_of(faults):
    return [fault.kind for fault in faults]


def headers_of(data):
    """Offset of every header block, extended ones included, as tarfile sees them."""
    offsets, position = [], 0
    while data[position : position + BLOCK].strip(b"\0"):
        offsets.append(position)
        info = tarfile.TarInfo.frombuf(data[position : position + BLOCK], "utf-8", "surrogateescape")
        position += BLOCK + (info.size + BLOCK - 1) // BLOCK * BLOCK
    return offsets


SAMPLES = [
    (f"{index:05d}.{ext}", bytes([65 + index]) * size) for index in range(4) for ext, size in (("jpg", 1300), ("txt", 40), ("json", 600))
]

name_part = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0", exclude_categories=("Cs", "Cc")), min_size=1, max_size=60)
member_names = st.lists(name_part, min_size=1, max_size=5).map("/".join).filter(lambda name: ".." not in name and name.strip("/. "))
archives = st.dictionaries(member_names, st.integers(0, 1600).map(lambda size: b"\xa5" * size), max_size=6)


@settings(max_examples=150, deadline=None)
@given(members=archives, layout=st.sampled_from(sorted(FORMATS)))
def test_finds_what_tarfile_finds_in_whole_archives(members, layout, tmp_path_factory):
    try:
        data = make_tar(members.items(), FORMATS[layout])
    except ValueError:
        return  # ustar has no room for this name
    entries, faults = found(data, tmp_path_factory.mktemp("tar"))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive.getmembers()]
    assert [(entry.name, entry.offset, entry.size) for entry in entries] == expected
    assert faults == ([] if members else [Fault("a.tar", "", "empty_shard", "the tar has no members")])


@pytest.mark.parametrize("layout", FORMATS)
def test_long_names(layout, tmp_path):
    name = LONG + ".jpg" if layout != "ustar" else "p" * 120 + "/" + "n" * 90 + ".jpg"
    entries, faults = found(make_tar([(name, b"one"), ("b.jpg", b"two")], FORMATS[layout]), tmp_path)
    assert names_of(entries) == [name, "b.jpg"]
    assert faults == []


def test_global_pax_records_and_pax_sizes(tmp_path):
    data = make_tar([("a.jpg", b"x" * 700)], pax_headers={"comment": "made for a test"})
    entries, faults = found(data, tmp_path)
    assert [(entry.name, entry.size) for entry in entries] == [("a.jpg", 700)]
    assert faults == []
    # A size that stands in the PAX record alone, as for files above 8 GB.
    info = tarfile.TarInfo("b.jpg")
    info.pax_headers = {"size": "700"}
    data = info.tobuf(tarfile.PAX_FORMAT) + b"y" * 700 + bytes(324) + make_tar([("c.jpg", b"z")])
    entries, faults = found(data, tmp_path)
    assert [(entry.name, entry.size) for entry in entries] == [("b.jpg", 700), ("c.jpg", 1)]
    assert faults == []


def rewrite_header(header, size_field=None, magic=None, signed=False, checksum=b"%06o\0 "):
    header = bytearray(header)
    if size_field:
        header[124:136] = size_field
    if magic is not None:
        header[257:512] = magic.ljust(255, b"\0")
    header[148:156] = b" " * 8
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in header)
    header[148:156] = checksum % total
    return bytes(header)


@pytest.mark.parametrize("checksum", [b"%06o\0 ", b"%07o\0", b"%6o \0", b"%06o  "])
@pytest.mark.parametrize("how", ["v7", "base-256", "signed", "spaces"])
def test_old_and_odd_headers(how, checksum, tmp_path):
    name = "é.jpg" if how == "signed" else "a.jpg"
    plain = make_tar([(name, b"x" * 600)], tarfile.GNU_FORMAT)
    change = {
        "v7": {"magic": b""},
        "base-256": {"size_field": b"\x80" + (600).to_bytes(11, "big")},
        "signed": {"signed": True},
        "spaces": {"size_field": b"       1130 "},
    }[how]
    data = rewrite_header(plain[:BLOCK], **change, checksum=checksum) + plain[BLOCK:]
    entries, faults = found(data, tmp_path)
    assert [(entry.name, entry.offset, entry.size) for entry in entries] == [(name, BLOCK, 600)]
    assert faults == []


@settings(max_examples=60, deadline=None)
@given(layout=st.sampled_from(sorted(FORMATS)), share=st.floats(0, 1, exclude_max=True))
def test_a_cut_is_found_wherever_it_falls(layout, share, tmp_path_factory):
    whole = make_tar(SAMPLES, FORMATS[layout])
    path = tmp_path_factory.mktemp("cut")
    all_entries, _ = found(whole, path)
    end = headers_of(whole)[-1] + 2 * BLOCK + BLOCK  # of the last member, with its padding
    cut = int(share * end)
    entries, faults = found(whole[:cut], path)
    assert entries == [entry for entry in all_entries if entry.offset + entry.size <= cut]
    assert len(faults) == 1
    assert faults[0].kind in ("cut_member", "cut_header", "no_end_marker", "empty_shard")
    if faults[0].kind == "cut_member":
        lost = all_entries[len(entries)].name
        assert (faults[0].key, faults[0].detail.split()[0]) == (split_name(lost)[0], lost)


@pytest.mark.parametrize("layout", FORMATS)
def test_cuts_by_kind(layout, tmp_path):
    whole = make_tar(SAMPLES, FORMATS[layout])
    entries, _ = found(whole, tmp_path)
    assert kinds_of(found(whole[: entries[5].header], tmp_path)[1]) == ["no_end_marker"]
    assert kinds_of(found(whole[: entries[5].header + 100], tmp_path)[1]) == ["cut_header"]
    assert kinds_of(found(whole[: entries[5].offset - BLOCK], tmp_path)[1]) == ["cut_header" if layout == "pax" else "no_end_marker"]
    assert kinds_of(found(whole[: entries[5].offset + 1], tmp_path)[1]) == ["cut_member"]
    assert kinds_of(found(b"", tmp_path)[1]) == ["empty_shard"]
    assert kinds_of(found(bytes(10240), tmp_path)[1]) == ["empty_shard"]


class InMemory:
    """A source without a file, for walks by the ten thousand."""

    def __init__(self, data):
        self.data, self.size = data, len(data)

    def read(self, offset, size):
        return bytes(self.data[offset : offset + size])


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
@pytest.mark.parametrize("layout", FORMATS)
def test_a_flipped_byte_at_any_header_position_is_found_and_costs_one_member(layout, flip):
    whole = make_tar(SAMPLES[:4], FORMATS[layout])
    names = [entry.name for entry in walk(InMemory(whole))]
    assert len(names) == 4
    for header in headers_of(whole):
        for position in range(header, header + BLOCK):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            items = list(walk(InMemory(damaged)))
            faults = [item for item in items if isinstance(item, Fault)]
            kept = [item.name for item in items if isinstance(item, Entry)]
            assert kinds_of(faults) == ["bad_header"], (position - header, faults)
            assert len(kept) >= len(names) - 1, (position - header, kept)
            assert [name for name in names if name in kept] == kept


@pytest.mark.parametrize("layout", FORMATS)
def test_a_zeroed_header_costs_one_member(layout, tmp_path):
    whole = make_tar(SAMPLES, FORMATS[layout])
    entries, _ = found(whole, tmp_path)
    for lost in (0, 4, len(entries) - 1):
        damaged = bytearray(whole)
        damaged[entries[lost].offset - BLOCK : entries[lost].offset] = bytes(BLOCK)
        kept, faults = found(bytes(damaged), tmp_path)
        assert kinds_of(faults) == ["zeroed_header"]
        assert names_of(kept) == [entry.name for entry in entries if entry != entries[lost]]
        assert faults[0].key == (split_name(entries[lost - 1].name)[0] if lost else "")


def test_a_second_tar_behind_the_end_marker_is_reported_and_read(tmp_path):
    entries, faults = found(make_tar(SAMPLES[:2]) + make_tar(SAMPLES[2:4]), tmp_path)
    assert names_of(entries) == [name for name, _ in SAMPLES[:4]]
    assert kinds_of(faults) == ["zeroed_header"]
    assert kinds_of(found(make_tar(SAMPLES[:2]) + b"junk", tmp_path)[1]) == ["trailing_data"]


@pytest.mark.parametrize("layout", ["gnu", "pax"])
def test_a_damaged_long_name_never_becomes_another_name(layout, tmp_path):
    long = "k" * 150 + ".jpg"
    whole = make_tar([("a.jpg", b"1"), (long, b"2"), ("c.jpg", b"3")], FORMATS[layout])
    start = found(whole, tmp_path)[0][1].header
    for damage, kind in ((bytes([whole[start + 20] ^ 0xFF]), "bad_header"), (bytes(BLOCK - 20), "bad_header"), (None, "zeroed_header")):
        damaged = bytearray(whole)
        if damage is None:
            damaged[start : start + BLOCK] = bytes(BLOCK)
        else:
            damaged[start + 20 : start + 20 + len(damage)] = damage
        entries, faults = found(bytes(damaged), tmp_path)
        assert names_of(entries) == ["a.jpg", "c.jpg"]
        assert kinds_of(faults) == [kind]
        assert "left out" in faults[0].detail
    if layout == "gnu":
        for place, value in ((40, 0), (3, 65)):
            damaged = bytearray(whole)
            damaged[start + BLOCK + place] = value
            entries, faults = found(bytes(damaged), tmp_path)
            assert (names_of(entries), kinds_of(faults)) == (["a.jpg", "c.jpg"], ["bad_header"])
    if layout == "pax":  # no checksum covers the records themselves
        damaged = bytearray(whole)
        damaged[damaged.index(b" path=") + 1] ^= 0x02
        entries, faults = found(bytes(damaged), tmp_path)
        assert (names_of(entries), kinds_of(faults)) == (["a.jpg", "c.jpg"], ["bad_header"])


def test_a_damaged_extended_header_without_a_name_costs_nothing(tmp_path):
    whole = make_tar(SAMPLES[:3])
    start = found(whole, tmp_path)[0][1].header
    for damage in (b"\xff", bytes(BLOCK)):
        damaged = bytearray(whole)
        damaged[start : start + len(damage)] = damage
        entries, faults = found(bytes(damaged), tmp_path)
        assert names_of(entries) == [name for name, _ in SAMPLES[:3]]
        assert len(faults) == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [("../evil.jpg", "leads out"), ("a/../../evil.jpg", "leads out"), ("/etc/evil.jpg", "absolute"), ("x\\..\\evil.jpg", "leads out")],
)
def test_unsafe_names_are_left_out(name, why, tmp_path):
    entries, faults = found(make_tar([("a.jpg", b"1"), (name, b"2"), ("c.jpg", b"3")], tarfile.GNU_FORMAT), tmp_path)
    assert names_of(entries) == ["a.jpg", "c.jpg"]
    assert kinds_of(faults) == ["unsafe_name"]
    assert why in faults[0].detail


def test_names_with_nul_and_broken_utf8(tmp_path):
    info = tarfile.TarInfo("b.jpg")
    info.pax_headers = {"path": "b\0evil.jpg"}
    latin = make_tar([("bad.jpg", b"2")], tarfile.GNU_FORMAT)[: 2 * BLOCK]
    latin = rewrite_header(b"\xff\xfe.jpg".ljust(7, b"\0") + latin[7:BLOCK]) + latin[BLOCK:]
    data = info.tobuf(tarfile.PAX_FORMAT) + latin + make_tar([("c.jpg", b"3")])
    entries, faults = found(data, tmp_path)
    assert names_of(entries) == ["c.jpg"]
    assert kinds_of(faults) == ["unsafe_name", "unsafe_name"]
    assert [fault.detail.split(" ", 1)[1] for fault in faults] == ["holds a NUL byte", "is not valid UTF-8"]
    assert all(fault.key.encode() and fault.detail.encode() for fault in faults)


def test_links_devices_and_folders(tmp_path):
    data = b"".join(
        special(name, kind, link)
        for name, kind, link in (
            ("soft.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.jpg", tarfile.LNKTYPE, "a.jpg"),
            ("disk.jpg", tarfile.BLKTYPE, ""),
            ("tty.jpg", tarfile.CHRTYPE, ""),
            ("pipe.jpg", tarfile.FIFOTYPE, ""),
            ("folder", tarfile.DIRTYPE, ""),
        )
    )
    entries, faults = found(data + make_tar([("a.jpg", b"1")]), tmp_path)
    assert names_of(entries) == ["a.jpg"]
    assert [(fault.kind, fault.key) for fault in faults] == [("not_a_file", key) for key in ("soft", "hard", "disk", "tty", "pipe")]


def test_an_extended_header_of_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    header = rewrite_header(info.tobuf(tarfile.GNU_FORMAT)[:BLOCK])
    entries, faults = found(header + make_tar([("a.jpg", b"1"), ("b.jpg", b"2")], tarfile.GNU_FORMAT), tmp_path)
    assert names_of(entries) == ["b.jpg"]
    assert kinds_of(faults) == ["bad_header"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.1.jpg", ("a.1", "jpg")),
        ("a.2.JPG", ("a.2", "jpg")),
        ("x.y/a.jpg", ("x.y/a", "jpg")),
        ("x.y/a", ("x.y/a", "")),
        ("README", ("README", "")),
        (".hidden", (".hidden", "")),
        ("x/.hidden", ("x/.hidden", "")),
        ("./a.txt", ("./a", "txt")),
    ],
)
def test_key_is_the_name_without_its_last_extension(name, expected):
    assert split_name(name) == expected


def test_a_small_window_finds_the_same(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(SAMPLES))
    expected = list(walk(Source(str(path)), "a.tar"))
    monkeypatch.setattr("diptych.datasets.tar.LOCAL_WINDOW", 700)
    assert list(walk(Source(str(path)), "a.tar")) == expected


@settings(max_examples=200, deadline=None)
@given(
    layout=st.sampled_from(sorted(FORMATS)),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40)), max_size=8),
)
def test_no_damage_stops_the_walk_or_loses_a_member_silently(layout, damage):
    """Whatever stands there: the walk ends, raises nothing, names only bytes of the file, and reports a lost member.

    Names are not compared: a header's checksum is a plain sum, and two changed bytes may cancel out.
    """
    whole = make_tar(SAMPLES[:7], FORMATS[layout])
    damaged = bytearray(whole)
    for share, content in damage:
        place = int(share * len(whole))
        damaged[place : place + len(content)] = content
    damaged = damaged[: len(whole)]
    items = list(walk(InMemory(damaged)))
    entries, faults = [item for item in items if isinstance(item, Entry)], [item for item in items if isinstance(item, Fault)]
    assert all(0 <= entry.header < entry.offset <= entry.offset + entry.size <= len(damaged) for entry in entries)
    assert [entry.offset for entry in entries] == sorted({entry.offset for entry in entries})
    if len(entries) < 7:
        assert faults
    assert all((fault.key + fault.detail).encode() for fault in faults)
