"""The ledger keeps every fault once, whatever the number of attempts and workers."""

from __future__ import annotations

from pathlib import Path

from diptych.batches import Fault
from diptych.datasets.ledger import Ledger, read_ledger, summary

BAD = Fault("00000.tar", "000000001", "undecodable_image", "cut", slot=7)
OTHER = Fault("00001.tar", "000010002", "missing_member", "no txt", slot=9)


def test_a_fault_met_again_after_a_restart_is_told_once(tmp_path: Path) -> None:
    Ledger(str(tmp_path), 1).record(3, 0, [BAD])
    Ledger(str(tmp_path), 1).record(4, 1, [OTHER])
    Ledger(str(tmp_path), 2).record(3, 1, [BAD])
    lines = read_ledger(str(tmp_path))
    assert [(line["key"], line["attempt"], line["rank"], line["step"]) for line in lines] == [
        ("000000001", 1, 0, 3),
        ("000010002", 1, 1, 4),
    ]
    assert summary(lines) == {"undecodable_image": 1, "missing_member": 1}


def test_a_half_written_last_line_does_not_hide_the_others(tmp_path: Path) -> None:
    Ledger(str(tmp_path), 1).record(3, 0, [BAD])
    with (tmp_path / "ledger" / "a0001-r0000.jsonl").open("ab") as file:
        file.write(b'{"shard": "000')
    assert len(read_ledger(str(tmp_path))) == 1


def test_a_run_without_faults_has_an_empty_ledger(tmp_path: Path) -> None:
    assert read_ledger(str(tmp_path)) == []
