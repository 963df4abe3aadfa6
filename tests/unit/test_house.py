"""The house rules that no linter holds: sizes, names, what may not stand in code, and what a fresh clone needs."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked(*suffixes: str) -> list[Path]:
    """Files of the checkout that git tracks or would track, with one of the suffixes; all files for none."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    # A source archive has no git; then every file that is not hidden counts.
    paths = [ROOT / name for name in names] or [
        path for path in ROOT.rglob("*") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


MODULES = [path for path in tracked(".py") if path.is_relative_to(ROOT / "diptych")]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file, methods and inner ones too."""
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def short(path: Path) -> str:
    """Path from the root, for messages."""
    return str(path.relative_to(ROOT))


def test_the_package_is_found() -> None:
    assert len(MODULES) > 20


def test_files_are_of_a_size_that_is_read_in_one_go() -> None:
    """About 300 lines; what is longer wants to be two things."""
    long = {short(path): count for path in MODULES if (count := len(path.read_text().splitlines())) > 360}
    assert not long


def test_functions_are_short() -> None:
    """Up to about 40 lines, a loop up to 80."""
    long = {
        f"{short(path)}:{node.lineno} {node.name}": lines
        for path in MODULES
        for node in functions(path)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > 80
    }
    assert not long


def test_most_functions_are_really_short() -> None:
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for path in MODULES for node in functions(path)]
    long = sum(length > 45 for length in lengths)
    assert long <= 0.03 * len(lengths), f"{long} of {len(lengths)} functions are longer than 45 lines"


def test_every_module_opens_with_its_purpose() -> None:
    assert not [short(path) for path in MODULES if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))]


def test_no_drawer_for_everything() -> None:
    assert not [short(path) for path in tracked(".py") if path.stem in ("utils", "util", "helpers", "common", "misc")]


# Written in pieces, so that this file does not contain them.
UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error", "place" + "holder"]) + r")\b")


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{short(path)}:{number}: {line.strip()}"
        for path in tracked(".py", ".toml", ".yaml", ".yml")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert not found


MACHINE = re.compile(r"(?<![\w./-])/(work|root|home/\w+)/|\b(extra-)?index-url\b|\bfind-links\s*=|registry\s*=\s*[\"']https?:")


def test_no_file_names_a_machine_or_a_package_index() -> None:
    """A clone must mean the same everywhere; a uv.lock would name whatever index made it."""
    assert not (ROOT / "uv.lock").exists() or not [path for path in tracked() if path.name == "uv.lock"]
    found = []
    for path in tracked(".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".sh", ""):
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        allowed = path in (Path(__file__), ROOT / "Makefile")
        found += [
            f"{short(path)}:{number}: {line.strip()[:100]}" for number, line in enumerate(lines, 1) if MACHINE.search(line) and not allowed
        ]
    assert not found


def test_parquet_from_python_is_read_by_the_calling_thread() -> None:
    """Pre-buffering leaves Python's bytes to pyarrow's IO threads, which abort a process that exits just then; paths are safe."""
    from_python = re.compile(r"read_table\(\s*(io\.|pa\.Buffer|pa\.py_)|ParquetFile\((?!self\.samples_path|.*pre_buffer=False)")
    found = [
        f"{short(path)}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if from_python.search(line)
    ]
    assert not found


def test_names_of_test_files_are_unique() -> None:
    """Tests are imported by file name alone (importlib mode, no packages)."""
    names = [path.name for path in tracked(".py") if path.is_relative_to(ROOT / "tests") and path.name.startswith("test_")]
    assert len(names) > 3
    assert sorted(names) == sorted(set(names))
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_test_can_fail() -> None:
    """A test without a check passes whatever happens."""
    checks = re.compile(r"\bassert|raises|check|verify|expect|warns|compare")
    silent = []
    for path in tracked(".py"):
        if path.is_relative_to(ROOT / "tests") and path.name.startswith("test_"):
            text = path.read_text()
            silent += [
                f"{short(path)}:{node.lineno} {node.name}"
                for node in functions(path)
                if node.name.startswith("test_") and not checks.search(ast.get_source_segment(text, node) or "")
            ]
    assert not silent


def test_arguments_are_named_not_passed_through() -> None:
    """A `**kwargs` that is handed on hides what a function takes."""
    # torch.load prescribes the signature of a pickle module's load().
    prescribed = {"foreign_checkpoints.py"}

    def hands_on(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        calls = [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]
        handed = [word.value.id for call in calls for word in call.keywords if word.arg is None and isinstance(word.value, ast.Name)]
        return node.args.kwarg is not None and node.args.kwarg.arg in handed

    assert not [
        f"{short(path)}:{node.lineno} {node.name}"
        for path in MODULES
        if path.name not in prescribed
        for node in functions(path)
        if hands_on(node)
    ]


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pins_are_exact_and_cover_what_is_declared(project: dict[str, dict[str, object]]) -> None:
    """`constraints.txt` is read by uv and pip: `name==version` lines alone, and none of our own requirements left free."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 100
    pins = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9._-]+)==([^\s@;/]+)", line)
        assert match, line
        pins[canonicalize_name(match[1])] = match[2]
    extras = project["project"]["optional-dependencies"]
    assert isinstance(extras, dict)
    # faiss-gpu cannot stand beside faiss-cpu, so the extra gpu is not among the pins.
    declared = [*project["project"]["dependencies"], *[text for name, texts in extras.items() if name != "gpu" for text in texts]]  # type: ignore[misc]
    assert len(declared) > 30
    for text in declared:
        requirement = Requirement(text)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not pinned: make pins"
        assert requirement.specifier.contains(pin, prereleases=True), f"{text} against {pin}"


def test_make_targets_that_the_readme_promises_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    promised = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"install", "demo", "test"} <= promised
    assert not [name for name in promised if not re.search(rf"^{name}:", makefile, re.MULTILINE)]
    assert "uv run" not in re.sub(r"^#.*$", "", makefile, flags=re.MULTILINE), "Ray would rebuild the environment for each worker"


def test_every_benchmark_has_a_target() -> None:
    """What `make bench` runs exists, and each script can be run by `make bench-NAME`; what begins with an underscore is called by one."""
    makefile = (ROOT / "Makefile").read_text()
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py") if '__name__ == "__main__"' in path.read_text()}
    lists = re.findall(r"^(?:BENCH \?|LONG )= (.*)$", makefile, re.MULTILINE)
    assert len(lists) == 2
    named = set(" ".join(lists).split()) | set(re.findall(r"^ARGS_(\w+) =", makefile, re.MULTILINE))
    assert named == scripts


def test_ci_runs_only_what_the_readme_says() -> None:
    """CI is the README's own commands: it may call make and nothing else."""
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert len(lines) == 1
    targets = [word for word in lines[0].split()[2:] if not word.startswith("-")]
    assert lines[0].startswith("exec make ")
    assert targets[-1] == "test", "pytest's closing line comes last"
    readme = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert not [target for target in targets if f"make {target}" not in readme]
