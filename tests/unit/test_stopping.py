"""What Ctrl-C and SIGTERM do to a run: a checkpoint, then the end, from where it goes on as if nothing had been; again: at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support_runs import logged_step, make_shards, overrides
from support_training import assert_identical, final_state, trace_rows

from diptych.config import RunConfig, apply_overrides, load_recipe
from diptych.pipelines.local import train_here
from diptych.pipelines.train import stopping


def configured(shards: Path, steps: int) -> RunConfig:
    changes: dict[str, Any] = {"workers": 1, "train__steps": steps, "checkpoint__every_steps": 0, "optim__schedule": "constant"}
    return apply_overrides(load_recipe("coca", "smoke"), [*overrides(shards, "run", **changes), "data.validation_share=0"])


def send_when_it_trains(run_dir: Path, number: int) -> threading.Thread:
    """The signal to this process, once the run has logged a step."""

    def send() -> None:
        while not (run_dir.is_dir() and logged_step(run_dir)):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_goes_on(tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shards = make_shards(tmp_path / "shards", 24)
    before = signal.getsignal(number)
    sender = send_when_it_trains(run_dir, number)
    with stopping(run_dir):
        stopped = train_here(configured(shards, 1_000_000), run_dir)
    sender.join()
    assert signal.getsignal(number) is before
    assert stopped["status"] == "stopped"
    assert f"{number.name}: writing a checkpoint, then stopping; resume with name=run" in capsys.readouterr().err
    (run_dir / "stop").unlink()
    longer = configured(shards, stopped["step"] + 4)
    assert train_here(longer, run_dir)["status"] == "finished"
    train_here(longer, tmp_path / "whole")
    assert trace_rows(run_dir) == trace_rows(tmp_path / "whole")
    assert_identical(final_state(run_dir), final_state(tmp_path / "whole"))


def test_a_second_signal_ends_the_driver_at_once(tmp_path: Path) -> None:
    def signalled_twice() -> None:
        with stopping(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            assert (tmp_path / "stop").exists()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        signalled_twice()
