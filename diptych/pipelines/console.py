"""What people and programs see: notes on standard error, one JSON object on standard output, and exit statuses."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, soft_wrap=True)
"""For people. `NO_COLOR` and pipes are honoured by rich."""

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_CALL, EXIT_INTERRUPTED = 0, 1, 2, 130


def note(text: str) -> None:
    """One line for people."""
    console.print(escape(text), highlight=False)


def guard(action: Callable[[], Any], resume: str = "") -> int:
    """Run `action` and turn its end into an exit status, with one clear message per kind of failure.

    `resume` says how to go on after Ctrl-C.
    """
    from diptych.config import ConfigError

    try:
        action()
    except SystemExit as end:
        # Typer turns Ctrl-C into this exit without a word.
        if end.code == EXIT_INTERRUPTED:
            note("interrupted" + (f"; {resume}" if resume else ""))
        return end.code if isinstance(end.code, int) else EXIT_FAILED
    except ConfigError as error:
        console.print(f"[bold red]error[/]: {escape(str(error))}", highlight=False)
        return EXIT_WRONG_CALL
    except KeyboardInterrupt:
        note("interrupted" + (f"; {resume}" if resume else ""))
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get("DIPTYCH_TRACEBACK", "") or not isinstance(error, ValueError):
            traceback.print_exc()
        console.print(f"[bold red]failed[/]: {escape(str(error))}", highlight=False)
        return EXIT_FAILED
    return EXIT_DONE


def finish(result: dict[str, Any], as_json: bool, failed: bool = False) -> NoReturn:
    """End a verb: print `result` as the last line of standard output if asked, and exit with the status."""
    if as_json:
        sys.stdout.write(json.dumps(result, default=str) + "\n")
        sys.stdout.flush()
    raise SystemExit(EXIT_FAILED if failed else EXIT_DONE)


def show_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table for people."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[escape(str(cell)) for cell in row])
    console.print(table)


def would(what: str, plan: Callable[[], dict[str, Any]], as_json: bool) -> NoReturn:
    """End a verb that was called with `--dry-run`: show what the call would do, as `plan()` says.

    Meanwhile nothing is downloaded from a hub, and manifests that have to be built are not kept.
    """
    from diptych.datasets.manifest import nothing_kept

    former = os.environ.get("HF_HUB_OFFLINE")
    # Read by the hub's client when it is imported, which the plan does first.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        with nothing_kept():
            found = plan()
    except ValueError:
        # The libraries say in many ways that they may not ask a hub; where its client was not even imported, that was not it.
        if "huggingface_hub" in sys.modules:
            note("a dry run downloads nothing: what is only on a hub so far counts as missing")
        raise
    finally:
        del os.environ["HF_HUB_OFFLINE"]
        os.environ |= {} if former is None else {"HF_HUB_OFFLINE": former}
    show_table(f"would {what}", ["what", "value"], _rows("", found))
    finish(found, as_json)


def _rows(prefix: str, plan: dict[str, Any]) -> list[list[Any]]:
    """(dotted key, value) of each leaf; a list of mappings has a row for each."""
    rows: list[list[Any]] = []
    for name, value in plan.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            rows += _rows(f"{key}.", value)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            rows += [[f"{key}.{place}", ", ".join(f"{inner}={each[inner]}" for inner in each)] for place, each in enumerate(value)]
        else:
            rows.append([key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value])
    return rows


def show_faults(faults: list[dict[str, Any]], limit: int = 50) -> None:
    """The first `limit` faults as a table, and how many more there are."""
    if faults:
        rows = [[fault["shard"], fault["key"], fault["kind"], fault["detail"]] for fault in faults[:limit]]
        show_table(f"{len(faults)} faults", ["shard", "key", "kind", "detail"], rows)
        if len(faults) > limit:
            note(f"… and {len(faults) - limit} more (use --json for all)")


class _Rate(ProgressColumn):
    """Units a second, once there are any."""

    def render(self, task: Task) -> Text:
        """The rate as text."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="progress.data.speed")


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar that yields `advance(n)`; silent where standard error is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
