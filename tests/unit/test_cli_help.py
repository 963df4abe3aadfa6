"""The command line answers at once, fits a screen, completes its words, and ends with status 2 on a wrong call."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.cli import VERBS, available_verbs

HEAVY = ("torch", "ray", "transformers", "mlflow", "pyarrow", "numpy", "pandas", "open_clip", "datasets")
SCREEN_LINES, SCREEN_COLUMNS = 50, 100
"""A terminal that fills a laptop's screen."""
WHAT_WAS_IMPORTED = (
    "import atexit, sys; atexit.register(lambda: print('HEAVY', sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)); "
)


def call(*arguments: str, report_imports: bool = False) -> subprocess.CompletedProcess[str]:
    """`diptych ARGUMENTS` in a process of its own."""
    code = (WHAT_WAS_IMPORTED.format(heavy=HEAVY) if report_imports else "") + "from diptych.cli import main; main()"
    environment = os.environ | {"COLUMNS": str(SCREEN_COLUMNS)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def cpu_seconds(*arguments: str) -> float:
    """CPU time of a Python process, user's and system's."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


_YARDSTICK = "total = 0\nfor number in range(4_000_000): total += number * number"
"""A core that takes 0.25 s of CPU for this is one that the half second is meant for."""


@pytest.mark.parametrize("verb", ["", *available_verbs()])
def test_help_takes_under_half_a_second(verb: str) -> None:
    """The median of three in CPU time. A core that other work shares, or a slower one, takes longer for the yardstick too."""
    call = ["-m", "diptych", *([verb] if verb else []), "--help"]
    seconds = statistics.median(cpu_seconds(*call) for _ in range(3))
    allowed = 0.5 * max(1.0, cpu_seconds("-c", _YARDSTICK) / 0.25)
    print(f"diptych {verb} --help: {seconds:.2f} s of CPU, {allowed:.2f} s allowed")
    assert seconds < allowed


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_imports_nothing_heavy(flag: str) -> None:
    answer = call(flag, report_imports=True)
    assert answer.returncode == 0
    assert answer.stdout
    assert answer.stderr.strip().endswith("HEAVY []")


def test_help_fits_a_screen_and_names_every_verb() -> None:
    page = call("--help").stdout
    assert max(map(len, page.splitlines())) <= SCREEN_COLUMNS
    assert len(page.splitlines()) <= SCREEN_LINES
    assert len(available_verbs()) > 0
    for verb, text in available_verbs().items():
        assert re.search(rf"^  {verb} +{re.escape(text)}$", page, re.MULTILINE), verb
    assert "Examples:" in page


def test_every_verb_has_a_module_and_every_command_a_verb() -> None:
    """A module of pipelines that defines `command` and is no verb could not be called."""
    import ast
    from importlib.util import find_spec

    folder = Path(str(find_spec("diptych.pipelines").submodule_search_locations[0]))  # type: ignore[union-attr, index]
    commands = {
        file.stem
        for file in folder.glob("*.py")
        if any(isinstance(node, ast.FunctionDef) and node.name == "command" for node in ast.parse(file.read_text()).body)
    }
    assert commands == set(available_verbs())
    assert set(available_verbs()) <= set(VERBS)


@pytest.mark.parametrize("verb", sorted(available_verbs()))
def test_verb_help_shows_an_example_and_imports_nothing_heavy(verb: str) -> None:
    answer = call(verb, "--help", report_imports=True)
    assert answer.returncode == 0, answer.stderr
    assert f"diptych {verb}" in answer.stdout, "the help shows an example of the call"
    imported = answer.stderr.strip().rpartition("HEAVY ")[2]
    assert "torch" not in imported
    assert "'ray'" not in imported
    assert len(answer.stdout.splitlines()) <= SCREEN_LINES
    assert max(map(len, answer.stdout.splitlines())) <= SCREEN_COLUMNS


def test_wrong_verb_ends_with_2_and_the_nearest() -> None:
    answer = call("trian")
    assert answer.returncode == 2
    assert "trian" in answer.stderr
    assert "Did you mean train?" in answer.stderr
    assert not answer.stdout


def test_no_arguments_shows_the_help() -> None:
    answer = call()
    assert answer.returncode == 0
    assert answer.stdout == call("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "coca2"], ["TASK", "coca2", "Did you mean coca?"]),
        (["train", "coca", "--recipe", "smoky"], ["--recipe", "smoky", "Did you mean smoke?"]),
        (["train", "coca", "train.step=3"], ["train.step", "Did you mean", "train.steps"]),
        (["train", "coca", "train.steps=many"], ["train.steps", "many", "integer"]),
        (["train", "coca", "--config", "missing.json"], ["--config", "missing.json"]),
        (["train", "coca", "--recipy", "smoke"], ["--recipy"]),
        (["train"], ["task"]),
        (["recipes", "nonesuch"], ["nonesuch", "coca"]),
    ],
)
def test_wrong_calls_end_with_2_before_torch_or_ray(arguments: list[str], parts: list[str]) -> None:
    answer = call(*arguments, report_imports=True)
    assert answer.returncode == 2, answer.stderr
    assert all(part in answer.stderr for part in parts), answer.stderr
    imported = answer.stderr.strip().rpartition("HEAVY ")[2]
    assert "torch" not in imported
    assert "'ray'" not in imported
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("verb", ["recipes"])
def test_a_module_runs_as_its_verb(verb: str) -> None:
    """`python -m diptych.pipelines.VERB` is the same call."""
    module = subprocess.run(
        [sys.executable, "-m", f"diptych.pipelines.{verb}", "--json"], capture_output=True, text=True, timeout=60, check=True
    )
    assert module.stdout == call(verb, "--json").stdout


@pytest.mark.parametrize(
    ("shell", "words", "expected"),
    [
        ("bash", "diptych ", set(available_verbs())),
        ("bash", "diptych train --re", {"--recipe"}),
        ("zsh", "diptych tr", {"train"}),
        ("fish", "diptych pack --caption", {"--caption-column", "--captions"}),
    ],
)
def test_shells_complete_verbs_and_options(shell: str, words: str, expected: set[str]) -> None:
    """As the scripts that `diptych --show-completion` prints ask for it."""
    variables = {"_DIPTYCH_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": words}
    variables |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    answer = subprocess.run(
        [sys.executable, "-m", "diptych"], capture_output=True, text=True, timeout=60, check=False, env=os.environ | variables
    )
    offered = set(re.findall(r"(?<![\w-])[a-z-]+(?![\w-])", answer.stdout))
    assert expected <= offered, answer.stdout + answer.stderr


def test_bash_completes_with_the_script_that_is_printed() -> None:
    """Printed for the shell that it is called from."""
    script = """
        eval "$(diptych --show-completion)"
        COMP_WORDS=(diptych tr) COMP_CWORD=1
        _diptych_completion diptych
        echo "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    answer = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"PATH": path}
    )
    assert answer.stdout.split() == ["train"], answer.stderr
