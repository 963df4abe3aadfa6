"""What workers say to each other: few collectives, of which those that nobody needs yet go on beside the step."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support_distributed import run_workers
from support_training import pair_config, train_in

from diptych.trainers import heartbeat
from diptych.trainers.world import World

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
SHAPES = [(), (1,), (3,), (5, 2), (0,)]
CALLS = ["all_reduce", "all_gather", "all_gather_object", "broadcast_object_list", "barrier"]


def rows_of(rank: int) -> dict[str, torch.Tensor]:
    """Three rows in every type and shape; NaN among those that have it."""
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for kind in TYPES:
        for shape in SHAPES:
            values = torch.randint(-3, 100, (3, *shape), generator=generator).to(kind)
            found[f"{kind} {shape}"] = (
                torch.where(values == 7, float("nan"), values.double()).to(kind) if kind.is_floating_point else values
            )
    return found | {"not contiguous": torch.arange(12).view(4, 3).t() + rank}


def counted(calls: Counter[str]) -> None:
    """Count this process's collectives by name."""
    for name in CALLS:
        setattr(dist, name, _counting(name, getattr(dist, name), calls))


def _counting(name: str, really: Any, calls: Counter[str]) -> Any:
    def call(*given: Any, **named: Any) -> Any:
        calls[name] += 1
        return really(*given, **named)

    return call


def gathered() -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """The rows of all, and what that took."""
    calls: Counter[str] = Counter()
    counted(calls)
    world = World.current()
    rows = rows_of(world.rank)
    return dict(zip(rows, world.gather_rows(list(rows.values())), strict=True)), calls


def test_rows_of_any_type_and_shape_are_gathered_bit_for_bit_in_one_collective() -> None:
    for found, calls in run_workers(gathered, 3):
        assert calls == {"all_gather": 1}
        for name, value in found.items():
            whole = torch.cat([rows_of(rank)[name] for rank in range(3)])
            assert (value.dtype, value.shape) == (whole.dtype, whole.shape), name
            assert value.contiguous().view(torch.uint8).equal(whole.view(torch.uint8)), name


def one_after_the_other() -> tuple[float, bool]:
    """Rank 1 adds its part when rank 0 is seen to wait for the sum, so it deadlocks if rank 0 can't go on before."""
    world, store = World.current(), dist.distributed_c10d._get_default_store()
    if world.rank == 1:
        store.wait(["waits"])
        return float(world.begin_sum({"all": torch.tensor(2.0)})["all"]), True
    sums = world.begin_sum({"all": torch.tensor(1.0)})
    main, seen = threading.get_ident(), threading.Event()

    def watch() -> None:
        while not (place := heartbeat._place(sys._current_frames().get(main)))[1]:
            time.sleep(0.01)
        seen.set()
        store.set("waits", place[0])

    # Begun already, and this thread goes on.
    assert not heartbeat._place(sys._current_frames().get(main))[1]
    threading.Thread(target=watch, daemon=True).start()
    return float(sums["all"]), seen.is_set()


def test_a_sum_is_waited_for_where_it_is_read_and_the_heartbeat_knows_who_waits() -> None:
    assert run_workers(one_after_the_other, 2) == [(3.0, True), (3.0, True)]


def collectives_of(folder: Path, steps: int) -> Counter[str]:
    """Of a whole run."""
    calls: Counter[str] = Counter()
    counted(calls)
    train_in(folder, pair_config(train__steps=steps, train__log_every=100))
    return calls


def test_a_contrastive_step_takes_three_collectives_beside_its_gradients(tmp_path: Path) -> None:
    short, long = (run_workers(collectives_of, 2, tmp_path / str(steps), steps) for steps in (3, 10))
    for rank in range(2):
        step = {name: count / 7 for name, count in (long[rank] - short[rank]).items()}
        assert step == {"all_reduce": 2, "all_gather": 1}
