"""What the README and docs/ say must be so: every command, key, target, task and link.

tests/integration/test_documented_commands.py runs the commands.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support_documentation import ALL_BLOCKS, NOT_RUN, PAGES, ROOT, Block
from support_pages import MAKERS, NEEDS, SMALLER, STAND_INS

from diptych.cli import _application, available_verbs
from diptych.config import apply_overrides, get_path, load_recipe, recipes_of, task_names

KNOWN_PROGRAMS = {
    "diptych",
    "make",
    "source",
    "pip",
    "python3",
    "python",
    "mlflow",
    "ray",
    "git",
    "cd",
    "export",
    "ls",
    "docker",
    "img2dataset",
}


def by_name(items: list[Block]) -> dict[str, object]:
    """Arguments for parametrize."""
    return {"argvalues": items, "ids": [block.name for block in items]}


def program(words: list[str]) -> str:
    """Name of the program, without settings before it and without its folder."""
    names = [word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word)]
    return Path(names[0]).name if names else "export"


def test_blocks_are_found_and_marked() -> None:
    assert len(ALL_BLOCKS) > 10
    assert {block.how for block in ALL_BLOCKS} == {"run", "slow", "parse"}
    fences = sum(len(re.findall(r"^```(?:console|bash|sh|shell|sh-session)\b", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == len(ALL_BLOCKS), "a block of commands that no test sees"


def test_what_is_not_run_has_a_reason_and_is_little() -> None:
    left_out = [block for block in ALL_BLOCKS if block.how == "parse"]
    assert not [block.name for block in left_out if block.reason not in NOT_RUN], "write <!-- test: parse (WORD) -->, a word of NOT_RUN"
    assert not [block.name for block in ALL_BLOCKS if block.reason and block.how != "parse"]
    assert {block.reason for block in left_out} == set(NOT_RUN)
    assert len(left_out) < len(ALL_BLOCKS) / 4
    training = [words for block in left_out for words in block.commands if program(words) == "diptych" and words[1] in ("train", "tune")]
    assert not training, "a training can always be made small: see support_pages.py"


def test_every_stand_in_stands_in_for_something() -> None:
    """Names that no page speaks of any more would hide that a page changed."""
    text = "\n".join(block.text for block in ALL_BLOCKS if block.how != "parse")
    assert not [name for name in STAND_INS if name not in text]
    calls = {"/".join(match.groups()) for match in re.finditer(r"diptych train (\w+) .*?--recipe (\w+)", text)}
    assert set(SMALLER) == {call for call in calls if not call.endswith("/smoke")}
    for page, needs in NEEDS.items():
        spoken = "\n".join(block.text for block in ALL_BLOCKS if block.page == ROOT / page)
        assert not [name for name in needs if not re.search(rf"\b{re.escape(name)}\b", spoken)], page
    assert set(MAKERS) == {name for needs in NEEDS.values() for name in needs}


@pytest.mark.parametrize("call", sorted(SMALLER))
def test_what_makes_a_recipe_smaller_fits_it(call: str) -> None:
    smaller = apply_overrides(load_recipe(*call.split("/")), shlex.split(SMALLER[call]))
    assert smaller.train.steps == 2


@pytest.mark.parametrize("block", **by_name(ALL_BLOCKS))
def test_commands_are_ones_that_exist(block: Block) -> None:
    """Programs are known ones, targets stand in the Makefile, scripts in the tree."""
    makefile = (ROOT / "Makefile").read_text()
    for words in block.commands:
        assert program(words) in KNOWN_PROGRAMS, words
        if program(words) == "make":
            targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)], words
            assignments = [word.partition("=")[0] for word in words[1:] if "=" in word]
            assert not [name for name in assignments if not re.search(rf"\b{name}\b", makefile)], words
        scripts = [word for word in words if word.endswith(".py")]
        assert not [script for script in scripts if not (ROOT / script).is_file()], words


def calls_of(words: list[str]) -> list[list[str]]:
    """Arguments of the calls of `diptych` that a command makes: its own, and the one that it submits to a cluster."""
    text = shlex.join(words)
    found = [words[words.index("diptych") + 1 :]] if "diptych" in words else []
    found += [words[1:]] if program(words) == "diptych" and not found else []
    if submitted := re.search(r"-m diptych\.pipelines\.(.*)", text):
        found.append(shlex.split(submitted[1]))
    if found and found[0][0] == "submit":
        # Options of `submit` stand before the verb.
        found.append(found[0][next(place for place, word in enumerate(found[0]) if place and word in available_verbs()) :])
    return found


DIPTYCH_CALLS = [(block, call) for block in ALL_BLOCKS for words in block.commands for call in calls_of(words)]


@pytest.mark.parametrize(("block", "call"), DIPTYCH_CALLS, ids=[f"{block.name}-{' '.join(call)[:40]}" for block, call in DIPTYCH_CALLS])
def test_diptych_call_is_understood(block: Block, call: list[str]) -> None:
    """The verb exists, its options parse, and KEY=VALUE fits the task's recipe."""
    import click
    import typer

    if call[0].startswith("-"):
        assert call == ["--help"]
        return
    verb = call[0]
    assert verb in available_verbs(), f"{block.name}: no verb {verb}"
    group = typer.main.get_command(_application(call))
    command = group.get_command(click.Context(group), verb)  # type: ignore[attr-defined]
    assert command is not None
    if "--help" in call:
        return
    values = command.make_context(verb, call[1:]).params
    if verb in ("train", "tune") and not values["config"]:
        apply_overrides(load_recipe(values["task"], values["recipe"] or "smoke"), values["overrides"] or [])
    if verb == "recipes" and values["name"]:
        task, _, recipe = values["name"].partition("/")
        load_recipe(task, recipe or values["recipe"] or "smoke")


def test_the_readme_lists_every_task_and_recipe() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.partition("## Tasks")[2].partition("## ")[0]
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `(\w+)` \|.*$", table, re.MULTILINE)}
    assert set(rows) == set(task_names())
    for task, row in rows.items():
        recipes = set(re.findall(r"`(\w+)`", row.split("|")[4]))
        assert recipes == set(recipes_of(task)), task


@pytest.mark.parametrize("task", task_names())
def test_the_command_of_every_recipe_parses(task: str) -> None:
    """Recipes say the command that runs them: it must name that very recipe and existing keys."""
    for name, function in recipes_of(task).items():
        text = " ".join((function.__doc__ or "").split())
        calls = re.findall(r"diptych train (\w+) --recipe (\w+)((?: [\w.]+=\S+)*)", text)
        assert (task, name) in [call[:2] for call in calls], f"the docstring of {task}/{name} has no command for it"
        for called_task, called_recipe, overrides in calls:
            config = load_recipe(called_task, called_recipe)
            for override in overrides.rstrip(".,;").split():
                key, _, value = override.partition("=")
                # SHARDS or D stand for what the reader has.
                assert get_path(config, key) is not None if value.isupper() else apply_overrides(config, [override])


def test_keys_named_in_prose_exist() -> None:
    """`section.key` in code spans is a key of some task's configuration, or a module or file."""
    from diptych.config import dotted_keys

    known = {key for task in task_names() for recipe in recipes_of(task) for key in dotted_keys(load_recipe(task, recipe))}
    known |= {key.rpartition(".")[0] for key in known}
    sections = {"train", "data", "optim", "validation", "checkpoint", "cluster", "tracking", "task"}
    unknown = [
        f"{page.name}: {match[1]}"
        for page in PAGES
        for match in re.finditer(r"`((\w+)\.[a-z_.]*[a-z])(?:=[^`]*)?`", page.read_text())
        if match[2] in sections and match[1] not in known and not match[1].endswith((".py", ".json", ".parquet", ".tar", ".yaml"))
    ]
    assert not unknown


def test_verbs_and_options_named_in_prose_exist() -> None:
    unknown = [
        f"{page.name}: {match[0]}"
        for page in PAGES
        for match in re.finditer(r"`diptych ([a-z]+)\b[^`]*`", page.read_text())
        if match[1] not in available_verbs()
    ]
    assert not unknown


def test_files_and_folders_that_are_linked_exist() -> None:
    """Links inside the tree; mkdocs checks the anchors when the documentation is built."""
    broken = []
    for page in PAGES:
        for match in re.finditer(r"\]\((?!https?:|#|mailto:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / match[1]).exists():
                broken.append(f"{page.name}: {match[1]}")
    assert not broken


def test_environment_variables_named_exist_in_the_code() -> None:
    """A setting of ours that no line reads would be a promise kept by nobody."""
    code = "\n".join(path.read_text() for path in (ROOT / "diptych").rglob("*.py"))
    named = {name for page in PAGES for name in re.findall(r"\bDIPTYCH_[A-Z_]+\b", page.read_text())}
    assert named
    assert not [name for name in named if name not in code]
