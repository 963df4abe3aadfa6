"""What a benchmark found: rows beside their peers, with the spread over repeats, the goal, the command and the machine.

A script makes one `Results`, adds its rows, which are recorded in FOLDER/SCRIPT.json at once where `--results FOLDER` was given, so
that a call that is interrupted keeps what it measured, and ends with `finish()`, which shows them; `page.py` writes the pages from these files. A row that is measured again on a machine of the same
kind takes the place of the old one, so a script may be called once per size. Ratios are above 1 where ours is better.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from _memory import Peaks

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """One of several sizes at which the same thing was measured, so that growth shows."""

    family: str
    """Rows of one family make one plot."""
    name: str
    """What is counted: rows, samples, …"""
    value: float
    at_most: float | None = None
    """Goal for the exponent of our seconds over the size."""


@dataclass
class Row:
    """One figure of ours, with the peer's beside it or alone."""

    what: str
    """What was measured, its settings included: names the row among those of its script."""
    unit: str
    ours: list[float]
    """One value per repeat."""
    peer: str | None = None
    peers: list[float] | None = None
    """The peer's, in turn with ours."""
    less: bool = False
    """Less is better: seconds, bytes."""
    at_least: float | None = None
    """Goal for the ratio, or for our own figure where there is no peer."""
    at_most: float | None = None
    headline: bool = False
    """Stands in the README."""
    size: Size | None = None
    median: dict[str, float] = field(init=False)
    ratio: dict[str, float] | None = field(init=False)
    """Of the medians, with the lowest and the highest of the repeats that stood next to each other."""
    met: bool | None = field(init=False)
    """None: no goal."""

    def __post_init__(self) -> None:
        assert self.ours, f"{self.what}: no values"
        assert (self.peer is None) == (self.peers is None), f"{self.what}: a peer has a name and values"
        self.ours = [_rounded(value) for value in self.ours]
        self.peers = self.peers and [_rounded(value) for value in self.peers]
        self.median = {"ours": statistics.median(self.ours)}
        self.ratio = None
        if self.peers:
            self.median["peer"] = statistics.median(self.peers)
            turns = self._turns(self.peers)
            spread = [self._better(*turn) for turn in turns]
            self.ratio = {"median": self._better(self.median["ours"], self.median["peer"]), "lowest": min(spread), "highest": max(spread)}
        self.met = self._is_met()

    def _turns(self, peers: list[float]) -> list[tuple[float, float]]:
        if len(peers) == len(self.ours):
            return list(zip(self.ours, peers, strict=True))
        return [(one, other) for one in (min(self.ours), max(self.ours)) for other in (min(peers), max(peers))]

    def _better(self, ours: float, peer: float) -> float:
        above, below = (peer, ours) if self.less else (ours, peer)
        return _rounded(above / below) if below else math.inf

    def _is_met(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        value = self.ratio["median"] if self.ratio else self.median["ours"]
        # A figure that is no number meets nothing.
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def goal(self) -> str:
        """In words; empty without one."""
        words = [f"{name} {shown(value)}" for name, value in (("at least", self.at_least), ("at most", self.at_most)) if value is not None]
        return ", ".join(words) + (" ×" if words and self.ratio else "")

    @property
    def seconds(self) -> tuple[list[float], list[float]]:
        """Ours and the peer's as seconds for the whole size; empty where the unit is no time."""
        if self.size is None or not (self.unit == "s" or self.unit.endswith("/s")):
            return [], []
        size = self.size.value
        return tuple([value if self.unit == "s" else size / value for value in found or []] for found in (self.ours, self.peers))  # type: ignore[return-value]


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of a straight line through (log size, log value); None with fewer than two sizes."""
    if len({size for size, _ in points}) < 2 or any(size <= 0 or value <= 0 for size, value in points):
        return None
    return statistics.linear_regression([math.log(size) for size, _ in points], [math.log(value) for _, value in points]).slope


@dataclass
class Growth:
    """How seconds grow with a size, over the rows of one family."""

    family: str
    name: str
    lines: dict[str, list[tuple[float, list[float]]]]
    """Ours and each peer: (size, seconds of each repeat), by size."""
    at_most: float | None

    def exponent(self, line: str) -> float | None:
        """Of the medians of one line."""
        return exponent([(size, statistics.median(values)) for size, values in self.lines[line]])

    @property
    def met(self) -> bool | None:
        """Whether ours grows no faster than the goal; None without a goal or with one size."""
        found = self.exponent("Diptych")
        return None if self.at_most is None or found is None else found <= self.at_most


def growths(rows: Sequence[Row]) -> list[Growth]:
    """One for each family that has at least two sizes."""
    found: dict[str, Growth] = {}
    for row in rows:
        ours, peers = row.seconds
        if row.size is None or not ours:
            continue
        growth = found.setdefault(row.size.family, Growth(row.size.family, row.size.name, {}, row.size.at_most))
        _add(growth.lines, "Diptych", row.size.value, ours)
        if row.peer and peers:
            _add(growth.lines, row.peer, row.size.value, peers)
    for growth in found.values():
        for line in growth.lines.values():
            line.sort()
    return [growth for growth in found.values() if len(growth.lines["Diptych"]) > 1]


def _add(lines: dict[str, list[tuple[float, list[float]]]], name: str, size: float, values: list[float]) -> None:
    line = lines.setdefault(name, [])
    if size not in [known for known, _ in line]:
        line.append((size, values))


class Results:
    """The rows of one call of one script."""

    def __init__(self, file: str, folder: Path | None) -> None:
        self.script, self.folder, self.rows = Path(file).stem, folder, list[Row]()
        self.run = {"command": command(), "date": _today(), "commit": commit(), "machine": machine(), "load": round(os.getloadavg()[0], 1)}
        self._began = time.monotonic()
        self.peaks = Peaks()

    def add(self, row: Row) -> Row:
        """Add one row."""
        assert row.what not in [known.what for known in self.rows], f"{row.what}: twice"
        self.rows.append(row)
        if self.folder:
            self._record(self.folder)
        return row

    def check(self, what: str, held: bool) -> Row:
        """A row for what holds or does not."""
        return self.add(Row(what, "yes/no", [float(held)], at_least=1.0))

    def finish(self) -> bool:
        """Show the rows on standard error; whether every goal is met."""
        from diptych.pipelines.console import note

        note(f"{self.script}: medians (lowest to highest)")
        for row in self.rows:
            cells = [figure(row, "ours"), f"{row.peer}: {figure(row, 'peer')}" if row.peer else "", *verdict(row)]
            note(f"  {row.what}: {'; '.join(filter(None, cells))}")
        self.peaks.look()
        if self.folder and self.rows:
            self._record(self.folder)
        note(f"  peak memory: {peaks(self.peaks.megabytes)}")
        found = growths(self.rows)
        for growth in found:
            note(f"  {growth.family}: seconds grow as {growth.name} to the power of {exponents(growth)}")
        if not self.folder:
            note("  not recorded: --results benchmarks/results does that, then benchmarks/page.py writes the pages")
        return all(one.met is not False for one in (*self.rows, *found))

    def _record(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.script}.json"
        kept = []
        names = {row.what for row in self.rows}
        for run in json.loads(path.read_text())["runs"] if path.is_file() else []:
            if run["machine"] == self.run["machine"]:
                run["rows"] = [row for row in run["rows"] if row["what"] not in names]
            kept += [run] if run["rows"] else []
        minutes = round((time.monotonic() - self._began) / 60, 1)
        runs = [*kept, self.run | {"minutes": minutes, "peaks": self.peaks.megabytes, "rows": [_plain(row) for row in self.rows]}]
        # Written beside and renamed: an interrupted call leaves the old file whole.
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps({"script": self.script, "runs": runs}, indent=1, ensure_ascii=False) + "\n")
        beside.replace(path)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Script → its runs, each with `rows` as `Row`; computed anew, so that a file's derived values are never believed."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        runs = json.loads(path.read_text())["runs"]
        found[path.stem] = [run | {"rows": [_row(row) for row in run["rows"]]} for run in runs]
    return found


def _row(plain: dict[str, Any]) -> Row:
    given = {key: value for key, value in plain.items() if key not in ("median", "ratio", "met")}
    return Row(**given | {"size": Size(**plain["size"]) if plain.get("size") else None})


def _plain(row: Row) -> dict[str, Any]:
    """Without what says nothing."""
    return {key: value for key, value in asdict(row).items() if key == "met" or (value is not None and value is not False)}


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--results FOLDER`."""
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="record the figures in FOLDER, one JSON file per script")


def run_script(main: Callable[..., bool], script: str, about: str | None, folders: Sequence[str] = ("out",)) -> NoReturn:
    """Call `main(*folders, overrides, results)` as the command line `FOLDER… [KEY=VALUE …]` says; exit status 1 if it finds a goal missed."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in folders:
        parser.add_argument(name, type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    add_option(parser)
    given = parser.parse_intermixed_args()
    sys.exit(0 if main(*(getattr(given, name) for name in folders), given.overrides, Results(script, given.results)) else 1)


def figure(row: Row, side: str) -> str:
    """Median with unit, and lowest to highest where there are several."""
    values = row.ours if side == "ours" else row.peers or []
    if row.unit == "yes/no":
        return "yes" if row.median[side] else "no"
    spread = f" ({shown(min(values))} to {shown(max(values))})" if len(values) > 1 else ""
    return f"{shown(row.median[side])} {row.unit}".strip() + spread


def verdict(row: Row) -> tuple[str, str]:
    """(ratio with its spread, goal and whether it is met)."""
    ratio = ""
    if row.ratio:
        several = len(row.ours) > 1 or len(row.peers or []) > 1
        ratio = f"{row.ratio['median']:.2f} ×" + (f" ({row.ratio['lowest']:.2f} to {row.ratio['highest']:.2f})" if several else "")
    if row.met is None:
        return ratio, ""
    return ratio, ("yes" if row.unit == "yes/no" else row.goal) + (": met" if row.met else ": missed")


def exponents(growth: Growth) -> str:
    """The exponent of every line, and the goal."""
    parts = [f"{value:.2f} ({name})" for name in growth.lines if (value := growth.exponent(name)) is not None]
    goal = "" if growth.met is None else f"; goal: at most {shown(growth.at_most or 0)}, {'met' if growth.met else 'missed'}"
    return ", ".join(parts) + goal


def peaks(megabytes: dict[str, float]) -> str:
    """Each kind of process with the most that one of it had, the largest first."""
    return ", ".join(f"{kind} {shown(value)} MB" for kind, value in sorted(megabytes.items(), key=lambda one: -one[1]))


def shown(value: float) -> str:
    """Three significant digits, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def command(words: Sequence[str] | None = None) -> str:
    """The call as it would be repeated from the repository's root: without `--results`, and without folders of this machine."""
    words = list(sys.argv if words is None else words)
    kept, skip = [f"python benchmarks/{Path(words[0]).name}"], False
    for word in words[1:]:
        if skip or word == "--results" or word.startswith("--results="):
            skip = word == "--results"
            continue
        kept.append(re.sub(r"(?<![\w.…])/[^\s,=]+", lambda match: _portable(match[0]), word))
    threads = os.environ.get("OMP_NUM_THREADS")
    return " ".join(([f"OMP_NUM_THREADS={threads}"] if threads else []) + kept)


def _portable(path: str) -> str:
    return os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else f"…/{Path(path).name}"


def _today() -> str:
    return dt.datetime.now(dt.UTC).date().isoformat()


def commit(checkout: Path = ROOT) -> str:
    """Short hash of a checkout, with a + if files of the package or the benchmarks differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "diptych", "benchmarks/*.py")
    return (git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")) or "unknown"


def machine() -> str:
    """Cores that this process may use, the processor's name, and the accelerator's if torch is loaded and sees one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown")
    amx = " with AMX" if any("amx_bf16" in line for line in lines) else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = sys.modules.get("torch")
    card = f", {torch.cuda.get_device_name(0)}" if torch is not None and torch.cuda.is_available() else ""
    return f"{cores} cores of {' '.join(name.split())}{amx}{card}"
