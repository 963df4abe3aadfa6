"""A hung collective names the worker that hangs, whatever it hangs in."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
from support_distributed import run_workers

from diptych.trainers.heartbeat import blame


def hang(how: str) -> str:
    import torch
    import torch.distributed as dist

    from diptych.trainers import heartbeat
    from diptych.trainers.world import World

    heartbeat.BEAT_SECONDS, heartbeat._SILENT_SECONDS = 0.1, 1.5
    group = dist.new_group(timeout=timedelta(seconds=4))
    world = World.current()
    try:
        with heartbeat.Heartbeat(world) as beat:
            for step in range(3):
                beat.step = step
                dist.all_reduce(torch.ones(4), group=group)
            if world.rank == 1 and how == "stopped":
                # Woken by a child, since a stopped process cannot wake itself.
                if os.fork() == 0:
                    time.sleep(6)
                    os.kill(os.getppid(), signal.SIGCONT)
                    os._exit(0)
                os.kill(os.getpid(), signal.SIGSTOP)
            elif world.rank == 1:
                slow_reader(6)
            beat.step = 3
            dist.all_reduce(torch.ones(4), group=group)
    except heartbeat.HungCollective as error:
        return str(error)
    except RuntimeError as error:
        return f"other: {error}"
    finally:
        # Rank 0 holds the store; the others may still read it.
        time.sleep(3 if world.rank == 0 else 0)
    return "finished"


def slow_reader(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize(("how", "words"), [("slow", "slow_reader"), pytest.param("stopped", "silent for", marks=pytest.mark.slow)])
def test_the_worker_that_hangs_is_named(how: str, words: str) -> None:
    told = run_workers(hang, 3, how)
    for rank in (0, 2):
        assert "waited for rank 1 (" in told[rank], told
        assert words in told[rank], told
        assert "rank 0" not in told[rank], told
        assert "rank 2" not in told[rank], told


def test_what_no_line_explains_is_said_too(tmp_path: Path) -> None:
    line = {"step": 4, "time": 100.0, "where": "train", "waits": True, "who": "host"}
    assert "network" in blame([line, line], 101.0)
    assert "rank 1, which never started" in blame([line, None], 101.0)
