"""Figures are measured in turns and recorded by scripts, and pages written from the records: neither may differ from the other, and goals can be missed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support_benchmarks import benchmark_module

ROOT = Path(__file__).resolve().parents[2]

_memory = benchmark_module("_memory")
_results = benchmark_module("_results")
page = benchmark_module("page")
_alternate = benchmark_module("_alternate")
Row, Size, Results = _results.Row, _results.Size, _results.Results


def test_the_pages_are_what_the_records_give() -> None:
    """`benchmarks/page.py` writes them after a change of benchmarks/results; figures are never typed."""
    made = page.pages()
    assert {path.name for path in made} == {"README.md", "benchmarks.md", "benchmarks_plots.html", "scale.md"}
    assert not [path.name for path, text in made.items() if path.read_text() != text]


def test_derived_values_in_the_records_are_those_of_their_repeats() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        for run in json.loads(path.read_text())["runs"]:
            assert run["command"].rpartition("python benchmarks/")[2].startswith(f"{path.stem}.py")
            assert [_results._plain(_results._row(row)) for row in run["rows"]] == run["rows"], path.name


def test_every_script_can_record() -> None:
    # What begins with an underscore is called by a script, which records; `page.py` writes what was recorded.
    named = [path for path in (ROOT / "benchmarks").glob("[!_]*.py") if path.stem != "page"]
    scripts = [path for path in named if '__name__ == "__main__"' in path.read_text()]
    assert len(scripts) > 10
    for path in scripts:
        text = path.read_text()
        recorded = "add_option(" in text and "Results(__file__, " in text
        assert recorded or "run_script(main, __file__, __doc__" in text, path.name


def test_a_ratio_is_of_medians_and_its_spread_of_turns() -> None:
    row = Row("speed", "images/s", [10, 30, 20], "peer", [10, 10, 40], at_least=2.0)
    assert row.median == {"ours": 20, "peer": 10}
    assert row.ratio == {"median": 2.0, "lowest": 0.5, "highest": 3.0}
    assert row.met is True
    assert _results.verdict(row) == ("2.00 × (0.50 to 3.00)", "at least 2 ×: met")
    assert Row("time", "s", [1.0], "peer", [3.0], less=True, at_least=3.5).met is False
    assert Row("time", "s", [1.0], "peer", [3.0], less=True).ratio["median"] == 3.0
    assert Row("share", "%", [4.0], at_most=3).met is False
    assert Row("nothing", "", [float("nan")], at_least=0.5).met is False
    assert Row("no goal", "s", [1.0]).met is None


def test_growth_is_fitted_and_can_miss_its_goal() -> None:
    def rows(power: float, at_most: float) -> list[object]:
        sizes = (10, 100, 1000)
        return [Row(f"{n}", "rows/s", [n / n**power], "peer", [1.0], size=Size("sort", "rows", n, at_most)) for n in sizes]

    (growth,) = _results.growths(rows(2.0, 1.1))
    assert growth.exponent("Diptych") == pytest.approx(2.0, abs=1e-3)
    assert growth.exponent("peer") == pytest.approx(1.0, abs=1e-3)
    assert growth.met is False
    assert _results.growths(rows(1.0, 1.1))[0].met is True
    assert not _results.growths(rows(1.0, 1.1)[:1])


def recorded(folder: Path, script: str, *rows: object) -> bool:
    """One call of a script."""
    results = Results(f"benchmarks/{script}.py", folder)
    for row in rows:
        results.add(row)
    return results.finish()


def test_a_record_says_how_long_its_call_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(_results.time, "monotonic", lambda: clock[0])
    results = Results("speed.py", tmp_path)
    clock[0] += 90
    results.add(Row("one", "s", [1.0]))
    assert "took 1.5 minutes" in page.tables(_results.read(tmp_path))


def test_a_row_measured_again_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded(tmp_path, "sort", Row("a", "s", [1.0]), Row("b", "s", [1.0]))
    assert not recorded(tmp_path, "sort", Row("a", "s", [2.0], at_most=1.0))
    (first, second) = page.read(tmp_path)["sort"]
    assert [row.what for row in first["rows"]] == ["b"]
    assert [row.ours for row in second["rows"]] == [[2.0]]
    monkeypatch.setattr(_results, "machine", lambda: "another machine")
    recorded(tmp_path, "sort", Row("b", "s", [3.0]))
    assert [row.what for run in page.read(tmp_path)["sort"] for row in run["rows"]] == ["b", "a", "b"]
    recorded(tmp_path, "sort", Row("b", "s", [4.0], headline=True))
    monkeypatch.setattr(_results, "machine", lambda: "a third machine")
    recorded(tmp_path, "sort", Row("b", "s", [5.0], headline=True))
    assert [line for line in page.readme_table(page.read(tmp_path)).splitlines() if line.startswith("| b")] == ["| b | 5 s |  |  |  |"]


def test_a_figure_that_is_no_headline_any_more_leaves_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, "sort", Row("a", "s", [1.0], headline=True), Row("b", "s", [2.0], headline=True))
    monkeypatch.setattr(_results, "machine", lambda: "another machine")
    recorded(tmp_path, "sort", Row("b", "s", [3.0]))
    assert page.readme_table(page.read(tmp_path)).splitlines()[2:] == ["| a | 1 s |  |  |  |"]


def test_pages_follow_the_records(tmp_path: Path) -> None:
    for name in ("README.md", "docs/benchmarks.md", "docs/scale.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    sizes = [
        Row(f"sort {n} | rows", "s", [n / 10], "peer", [n / 5], less=True, headline=n > 10, size=Size("sort", "rows", n)) for n in (10, 99)
    ]
    recorded(tmp_path / "results", "sort", *sizes, Row("kept <whole>", "yes/no", [1.0], at_least=1.0))
    recorded(tmp_path / "results", "simulate", Row("far away", "s", [1.0]))
    readme, table, plots, scale = (text for _, text in sorted(page.pages(tmp_path / "results", tmp_path).items()))
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "old" not in readme + table
    assert "| sort 99 \\| rows | 9.9 s | peer: 19.8 s | 2.00 × |" in readme
    assert "sort 10" not in readme
    assert "sort 10" in table
    assert "seconds grow as rows to the power of 1.00 (Diptych), 1.00 (peer)" in table
    assert "far away" in scale
    assert "sort" not in scale
    assert plots.count("<svg") == 2
    assert "kept &lt;whole&gt;" in plots
    with pytest.raises(ValueError, match="markers"):
        page.between("no markers", "text")


def test_a_command_says_nothing_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = [
        str(ROOT / "benchmarks" / "coca.py"),
        "/data/some/place",
        f"data.shards={ROOT}/runs/x",
        "../near/it",
        "--results",
        "/tmp/r",
        "--n",
        "3",
    ]
    assert _results.command(words) == "python benchmarks/coca.py …/place data.shards=runs/x ../near/it --n 3"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert _results.command(["benchmarks/coca.py", "--results=x"]) == "OMP_NUM_THREADS=2 python benchmarks/coca.py"
    assert _results.machine()


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["ray::RayTrainWorker"], "RayTrainWorker (Ray)"),
        (["ray::TrainController.run", ""], "TrainController (Ray)"),
        (["ray::_read(slot=3)"], "_read (Ray)"),
        (["/opt/ray/core/src/ray/raylet/raylet", "--node"], "raylet"),
        (["/env/bin/python", "-u", "/here/benchmarks/_overhead_sides.py", "out", "--bare", "coca"], "_overhead_sides.py --bare coca"),
        (["python3.11", "-m", "torch.distributed.run", "--standalone"], "torch.distributed.run"),
        (["python", "-c", "from multiprocessing.spawn import spawn_main; …"], "multiprocessing"),
        (["python", "-c", "import json"], "python -c"),
        ([], ""),
    ],
)
def test_processes_are_known_by_what_they_are(words: list[str], kind: str) -> None:
    assert _memory.kind_of(words) == kind


def test_the_peak_of_a_child_is_noted_and_stands_on_the_page(tmp_path: Path) -> None:
    results = _results.Results("made.py", tmp_path)
    code = "import time\nheld = bytearray(200_000_000)\ndel held\nprint(flush=True)\ntime.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        results.add(_results.Row("what", "s", [1.0]))
        results.finish()
        child.kill()
    # Freed again by then: the peak counts, not what the last look found.
    assert 200 < results.peaks.megabytes["python -c"] < 400
    assert f"python -c {_results.shown(results.peaks.megabytes['python -c'])} MB" in page.tables(_results.read(tmp_path))


def test_of_the_object_store_counts_what_was_written() -> None:
    before = _memory.store_megabytes(os.getpid())
    descriptor, path = tempfile.mkstemp(dir="/dev/shm", prefix="plasma")
    os.unlink(path)
    with os.fdopen(descriptor, "wb") as store:
        store.truncate(50_000_000)
        assert _memory.store_megabytes(os.getpid()) < before + 1
        store.write(bytes(3_000_000))
        store.flush()
        assert before + 3 <= _memory.store_megabytes(os.getpid()) < before + 4


def test_what_was_read_of_the_peaks_does_not_change() -> None:
    peaks = _memory.Peaks()
    peaks.look()
    read = peaks.megabytes
    with subprocess.Popen(["sleep", "100"]) as child:
        deadline = time.monotonic() + 10
        while "sleep" not in peaks.megabytes and time.monotonic() < deadline:
            peaks.look()
        child.kill()
    assert "sleep" in peaks.megabytes
    assert "sleep" not in read


def test_a_call_without_rows_is_not_recorded(tmp_path: Path) -> None:
    assert _results.Results("made.py", tmp_path).finish()
    assert not list(tmp_path.iterdir())


STEPPING = """
import mmap, signal, subprocess, sys, time
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from _alternate import StepLog
child = subprocess.Popen([sys.executable, "-c", "while True: pass" if {busy!r} else "import time; time.sleep(1000)"], env={env})
Path({folder!r}, {name!r} + ".child").write_text(str(child.pid))
signal.signal(signal.SIGCONT, lambda *_: time.sleep({overdue}))
log = StepLog(Path({folder!r}, {name!r} + ".steps"))
for step in range({most}):
    time.sleep({seconds})
    {work}
    log.ended()
"""


def _stepping(
    folder: Path,
    name: str,
    seconds: float,
    most: int = 1_000_000,
    busy: bool = False,
    overdue: float = 0.0,
    work: str = "pass",
    env: Any = None,
) -> Any:
    """A program with a child, at rest or `busy`, in `env` if given, that does `work` in a step every `seconds`, and `most` of them; after a stop it first sleeps `overdue` seconds."""
    where = {"benchmarks": str(ROOT / "benchmarks"), "folder": str(folder), "name": name}
    code = STEPPING.format(**where, seconds=seconds, most=most, busy=busy, overdue=overdue, work=work, env=env)
    return _alternate.Program([sys.executable, "-c", code], lambda: _alternate.read_steps(folder / f"{name}.steps"), folder / f"{name}.log")


def _is_running(pid: str) -> bool:
    return psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE


def test_programs_that_take_turns_never_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_alternate, "SETTLE_SECONDS", 0.1)
    # The child of one has no environment by which it could be known, as Ray's agents have none.
    programs = {"fast": _stepping(tmp_path, "fast", 0.01), "slow": _stepping(tmp_path, "slow", 0.05, env={})}
    turns = _alternate.alternate(programs, turns=3, seconds=0.5)
    rates = {name: [turn.rate for turn in found] for name, found in turns.items()}
    assert {name: len(found) for name, found in rates.items()} == {"fast": 3, "slow": 3}
    assert statistics.median(rates["slow"]) < min(20.001, statistics.median(rates["fast"]))
    # Both warm up, fast and slow; then fast, slow, slow, fast, fast, slow; and fast may do a step when it is let go to be ended.
    ends = sorted((when, name) for name, program in programs.items() for _, when in program.ends())
    assert sum(before[1] != after[1] for before, after in itertools.pairwise(ends)) in (5, 6)
    assert not [path for path in tmp_path.glob("*.child") if _is_running(path.read_text())]


def test_what_each_process_kept_busy_in_a_turn_is_told(tmp_path: Path) -> None:
    programs = {"rests": _stepping(tmp_path, "rests", 0.1), "works": _stepping(tmp_path, "works", 0.1, busy=True)}
    turns = _alternate.alternate(programs, turns=2, seconds=1.5)
    for found in turns.values():
        for turn in found:
            assert len(turn.busy) == 2
            assert turn.busy[0] >= turn.busy[1]
    # How much a busy loop gets depends on what else the machine does; one that rests gets next to nothing anyway.
    assert min(turn.busy[0] for turn in turns["works"]) > 5 * max(turn.busy[0] for turn in turns["rests"])
    assert max(turn.busy[0] for turn in turns["works"]) < 1.2
    # Its thread is on a core or wants one nearly all the time, of which a host may take some; one that sleeps does neither.
    wanted = {name: [turn.running[0] + turn.ready[0] for turn in found] for name, found in turns.items()}
    assert min(wanted["works"]) > 3 * max(wanted["rests"])
    assert max(wanted["works"]) < 1.3


def test_pages_that_a_thread_touches_anew_are_told(tmp_path: Path) -> None:
    """Those of the busiest thread of each process: here one that makes a mapping of a hundred pages, writes to each and drops it, a hundred times a second."""
    program = _stepping(tmp_path, "maps", 0.01, work="with mmap.mmap(-1, 409600) as new: new[::4096] = bytes(100)")
    turns = _alternate.alternate({"maps": program}, turns=1, seconds=1.0)["maps"]
    assert 90 < max(turns[0].touched) / turns[0].rate < 120


def test_the_beginning_of_a_turn_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fell due while a program was stopped it does when it goes on: here half a second in which it does no step."""
    monkeypatch.setattr(_alternate, "SETTLE_SECONDS", 1.0)
    programs = {"late": _stepping(tmp_path, "late", 0.01, overdue=0.5), "other": _stepping(tmp_path, "other", 0.05)}
    turns = _alternate.alternate(programs, turns=2, seconds=0.5)
    assert min(turn.rate for turn in turns["late"]) > max(turn.rate for turn in turns["other"])


def test_a_turn_lasts_until_a_slow_program_has_done_a_few_steps(tmp_path: Path) -> None:
    """A call of an hour once ended in a turn of 3.5 s in which one line was logged."""
    turns = _alternate.alternate({"slow": _stepping(tmp_path, "slow", 0.6)}, turns=2, seconds=0.1)["slow"]
    assert all(0.6 <= 1 / turn.rate < 1.5 for turn in turns)


def test_a_program_that_ends_early_is_shown(tmp_path: Path) -> None:
    programs = {"whole": _stepping(tmp_path, "whole", 0.01), "short": _stepping(tmp_path, "short", 0.01, most=_alternate.FEW + 1)}
    with pytest.raises(SystemExit, match="has ended"):
        _alternate.alternate(programs, turns=2, seconds=0.5)
    assert not [path for path in tmp_path.glob("*.child") if _is_running(path.read_text())]


def test_a_comparison_that_is_asked_to_end_and_asked_again_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = _alternate._Running.end

    def asked_again(running: _alternate._Running) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        end(running)

    monkeypatch.setattr(_alternate._Running, "end", asked_again)

    def ask() -> None:
        while len(list(tmp_path.glob("*.steps"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    with pytest.raises(SystemExit):
        _alternate.alternate({name: _stepping(tmp_path, name, 0.01) for name in ("one", "other")}, turns=1000, seconds=1.0)
    asking.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [_is_running(path.read_text()) for path in tmp_path.glob("*.child")] == [False, False]


def test_a_rate_is_of_the_steps_within_a_turn() -> None:
    ends = [(1, 0.0), (2, 9.9), (3, 10.5), (5, 11.5), (6, 12.5), (7, 20.0)]
    assert _alternate._rate(ends, 10.0, 13.0) == 1.5
