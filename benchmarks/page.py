"""The pages of figures, written from what the scripts recorded: docs/benchmarks.md, its plots, docs/scale.md's tables, and the README's.

    .venv/bin/python benchmarks/page.py --results benchmarks/results

In the Markdown files only what stands between the markers is replaced. Nothing here is typed: a row that no run recorded is absent.
A unit test fails where the files differ from what the records give.
"""

from __future__ import annotations

import argparse
import html
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from _results import ROOT, Growth, Row, exponents, figure, growths, peaks, read, shown, verdict

FOLDER = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SCALE = ("scale", "simulate")
"""Scripts whose tables docs/scale.md shows too."""
_NONE = "No run is recorded yet: `make bench` records them."
_COLOURS = ("#1b6ca8", "#c8553d", "#5b8c5a", "#8e6c8a", "#b8860b")


def pages(folder: Path = FOLDER, root: Path = ROOT) -> dict[Path, str]:
    """File → what it must contain."""
    found = read(folder)
    at_scale = {script: runs for script, runs in found.items() if script in SCALE}
    texts = {root / "README.md": readme_table(found), root / "docs" / "benchmarks.md": tables(found)}
    texts[root / "docs" / "scale.md"] = tables(at_scale)
    result = {path: between(path.read_text(), text) for path, text in texts.items()}
    return result | {root / "docs" / "benchmarks_plots.html": plots(found)}


def between(text: str, inside: str) -> str:
    """`text` with another part between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the markers {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n\n{inside.strip()}\n\n{END}{after}"


def readme_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The rows that their scripts call headlines."""
    # What was measured on several machines stands there as it was measured last.
    newest = {(script, row.what): row for script, runs in found.items() for run in runs for row in run["rows"]}
    # Only then: a figure may have been a headline once and be none any more.
    rows = [row for row in newest.values() if row.headline]
    if not rows:
        return _NONE
    lines = ["| what | Diptych | beside | ratio | goal |", "|---|---|---|---|---|"]
    lines += [_line(row.what, figure(row, "ours"), _peer(row), *verdict(row)) for row in rows]
    return "\n".join(lines)


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    """One section per script, one table per run, with command and machine."""
    parts = []
    for script, runs in found.items():
        parts.append(f"## {script}")
        for run in runs:
            parts.append(_where(run, "`"))
            lines = ["| what | Diptych | beside | ratio | goal |", "|---|---|---|---|---|"]
            lines += [_line(row.what, figure(row, "ours"), _peer(row), *verdict(row)) for row in run["rows"]]
            parts.append("\n".join(lines))
            parts += _peaks(run)
        parts += [f"{one.family}: seconds grow as {one.name} to the power of {exponents(one)}." for one in _growths(runs)]
    return "\n\n".join(parts) or _NONE


def _growths(runs: list[dict[str, Any]]) -> list[Growth]:
    """Over all runs of a script on the machine of its newest run, so that a size may be measured per call."""
    newest = runs[-1]["machine"]
    return growths([row for run in runs if run["machine"] == newest for row in run["rows"]])


def _where(run: dict[str, Any], quote: str) -> str:
    took = f", took {run['minutes']:g} minutes" if "minutes" in run else ""
    return f"{quote}{run['command']}{quote}, {run['date']}, commit {run['commit']}, {run['machine']}, load before {run['load']}{took}:"


def _peaks(run: dict[str, Any]) -> list[str]:
    """A line where the run noted them; older ones did not."""
    found = run.get("peaks")
    return [f"Peak memory of the largest process of each kind, peers' included: {peaks(found)}."] if found else []


def _peer(row: Row) -> str:
    return f"{row.peer}: {figure(row, 'peer')}" if row.peer else ""


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plots(found: dict[str, list[dict[str, Any]]]) -> str:
    """A page that needs nothing else: ratios as bars, growth as lines, and every table."""
    parts = []
    for script, runs in found.items():
        rows = [row for run in runs for row in run["rows"]]
        parts.append(f"<h2>{_text(script)}</h2>")
        if any(row.ratio for row in rows):
            parts.append(ratio_plot([row for row in rows if row.ratio]))
        parts += [growth_plot(growth) for growth in _growths(runs)]
        for run in runs:
            cells = "".join(_row(row.what, figure(row, "ours"), _peer(row), *verdict(row)) for row in run["rows"])
            head = _row("what", "Diptych", "beside", "ratio", "goal").replace("td>", "th>")
            parts.append(f"<p>{_text(_where(run, ''))}</p>\n<table>{head}{cells}</table>")
            parts += [f"<p>{_text(line)}</p>" for line in _peaks(run)]
    body = "\n".join(parts) or f"<p>{_NONE}</p>"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Diptych: benchmarks</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }}
table {{ border-collapse: collapse; margin: .5rem 0 1.5rem; font-size: 13px }} td, th {{ border: 1px solid #ccc; padding: .2rem .5rem; text-align: left }}
svg {{ max-width: 100%; height: auto; display: block }} p {{ overflow-wrap: anywhere }}
</style>
<h1>Benchmarks</h1>
<p>Medians, with the lowest and highest of the repeats. A ratio above 1 means that Diptych is better; the thin line is 1, the mark the goal.</p>
{body}
</html>
"""


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"


def _text(text: str) -> str:
    return html.escape(text)


def ratio_plot(rows: list[Row]) -> str:
    """Bars of the ratios on a logarithmic scale, with their spread and goals."""
    ratios = [row.ratio for row in rows if row.ratio]
    ends = [value for ratio in ratios for value in ratio.values() if 0 < value < math.inf] + [row.at_least or 1 for row in rows] + [1.0]
    low, high = min(ends) / 1.15, max(ends) * 1.15
    left, width, step = 470, 960, 26

    def x(value: float) -> float:
        value = min(max(value, low), high)
        return left + (width - left - 60) * math.log(value / low) / math.log(high / low)

    height = step * len(rows) + 12
    parts = [f'<line x1="{x(1):.1f}" x2="{x(1):.1f}" y1="0" y2="{height}" stroke="#999"/>']
    for number, row in enumerate(rows):
        ratio, y = row.ratio or {}, step * number + 8
        start, stop = sorted((x(1), x(ratio["median"])))
        colour = _COLOURS[1] if row.met is False else _COLOURS[0]
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{_text(_short(row.what))}</text>')
        parts.append(f'<rect x="{start:.1f}" y="{y}" width="{max(stop - start, 1):.1f}" height="16" fill="{colour}" fill-opacity=".75"/>')
        parts.append(f'<line x1="{x(ratio["lowest"]):.1f}" x2="{x(ratio["highest"]):.1f}" y1="{y + 8}" y2="{y + 8}" stroke="#222"/>')
        if row.at_least:
            goal = x(row.at_least)
            parts.append(f'<line x1="{goal:.1f}" x2="{goal:.1f}" y1="{y - 2}" y2="{y + 18}" stroke="#222" stroke-width="2"/>')
        end = max(stop, x(ratio["highest"]))
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 12}">{shown(ratio["median"])} ×</text>')
    return _svg(width, height, parts)


def growth_plot(growth: Growth) -> str:
    """Seconds over the size, both logarithmic, with the fitted exponents."""
    points = [(size, value) for line in growth.lines.values() for size, values in line for value in values if value > 0]
    width, height, left, bottom = 640, 320, 70, 44
    sizes, seconds = [size for size, _ in points], [value for _, value in points]

    def place(value: float, values: list[float], start: float, stop: float) -> float:
        low, high = math.log(min(values) / 1.3), math.log(max(values) * 1.3)
        return start + (stop - start) * (math.log(value) - low) / (high - low)

    def at(size: float, value: float) -> str:
        return f"{place(size, sizes, left, width - 150):.1f},{place(value, seconds, height - bottom, 28):.1f}"

    parts = [f'<text x="{left}" y="16">{_text(growth.family)}: seconds over {_text(growth.name)}</text>']
    parts.append(f'<path d="M{left},28 V{height - bottom} H{width - 150}" fill="none" stroke="#999"/>')
    across = [(at(size, min(seconds)).split(",")[0], size) for size in sorted(set(sizes))]
    parts += [f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{shown(size)}</text>' for x, size in across]
    up = [(at(min(sizes), value).split(",")[1], value) for value in (min(seconds), max(seconds))]
    parts += [f'<text x="{left - 6}" y="{y}" text-anchor="end">{shown(value)} s</text>' for y, value in up]
    for number, (name, line) in enumerate(growth.lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(
            f'<polyline points="{" ".join(at(size, statistics.median(values)) for size, values in line)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        for size, values in line:
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in (at(size, value).split(",") for value in values)]
        x, y = at(line[-1][0], statistics.median(line[-1][1])).split(",")
        slope = growth.exponent(name)
        label = _short(name, 24) + (f": {slope:.2f}" if slope is not None else "")
        parts.append(f'<text x="{float(x) + 8:.1f}" y="{float(y) + 4 + 14 * number:.1f}" fill="{colour}">{_text(label)}</text>')
    return _svg(width, height, parts)


def _short(text: str, most: int = 70) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _svg(width: int, height: int, parts: list[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-size="12" font-family="system-ui, sans-serif">\n{inside}\n</svg>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="FOLDER", help="where the records are")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page differs from the records")
    options = parser.parse_args()
    made = pages(options.results)
    differing = [path for path, text in made.items() if not path.is_file() or path.read_text() != text]
    for path in differing:
        print(f"{path.relative_to(ROOT)} {'differs' if options.check else 'written'}")
        if not options.check:
            path.write_text(made[path])
    sys.exit(1 if options.check and differing else 0)


if __name__ == "__main__":
    main()
