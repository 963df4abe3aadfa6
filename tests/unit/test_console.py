"""What a terminal shows: rate and time left while it works, nothing in a pipe, and how to go on after Ctrl-C."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from diptych.pipelines import console


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_call_says_how_to_go_on(capsys, monkeypatch):
    from diptych import cli
    from diptych.pipelines import pack

    monkeypatch.setattr(pack, "run", lambda *_, **__: interrupt())
    with pytest.raises(SystemExit) as end:
        cli.main(["pack", "a", "b"])
    assert end.value.code == 130
    assert "interrupted; the same call goes on with what is missing" in capsys.readouterr().err


def test_progress_tells_rate_and_time_left_to_people_and_nothing_to_pipes(monkeypatch):
    for terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(console, "console", Console(file=stream, force_terminal=terminal, width=120))
        with console.progress("painting", 10) as advance:
            for _ in range(3):
                time.sleep(0.12)
                advance(2)
        shown = stream.getvalue()
        assert ("6/10" in shown and "/s" in shown and "painting" in shown) if terminal else shown == ""


def test_colour_follows_the_reader(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Console(file=(stream := io.StringIO()), force_terminal=True)
    plain.print("[bold red]error[/]: x")
    assert "\x1b[31" not in stream.getvalue()
    assert "\x1b[1;31" not in stream.getvalue()
