"""Promise 2: workers × micro-batches give the same losses and gradients; promise 1: resumed = never killed, in gloo processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support_distributed import WorkerFailed, run_workers
from support_training import (
    SAMPLES,
    assert_identical,
    final_state,
    losses_by_step,
    pair_config,
    share,
    smallest,
    stream_from,
    trace_rows,
    train_in,
)

from diptych.batches import StepBatch
from diptych.config import RunConfig, TrainConfig, task_names
from diptych.trainers.attempts import read_attempts
from diptych.trainers.journal import read_metrics
from diptych.trainers.micro_batches import make_micro_batches
from diptych.trainers.objective import accumulate, local_weights
from diptych.trainers.runfolder import RunFolder
from diptych.trainers.strategies import make_strategy
from diptych.trainers.validation import mean_terms


def losses_and_gradients(names: list[str], micro_batches: list[int]) -> dict[tuple[str, int], Any]:
    """Of each task for each accumulation, with layer dropout off; the same on every worker."""
    found = {}
    for name in names:
        for count in micro_batches:
            torch.manual_seed(0)
            task = smallest(name)
            config = RunConfig(task=task.config, train=TrainConfig(global_batch_size=SAMPLES, micro_batches=count, precision="fp32"))
            strategy = make_strategy(config, task)
            world = strategy.world
            task.eval()
            whole = task.example_batch(SAMPLES, seed=5)
            rows = share(whole, world.rank, world.size, count)
            micros = make_micro_batches(task, {key: value.numpy() for key, value in rows.items()}, count, world.device)
            totals = {term: world.sum_(weight).float() for term, weight in local_weights(task, micros).items()}
            terms, _ = accumulate(strategy, micros, totals, seed=1, step=0)
            gradients = {key: parameter.grad.clone() for key, parameter in task.named_parameters() if parameter.grad is not None}
            found[name, count] = (mean_terms(world, terms), gradients)
    return found


NAMES = ["pair", *task_names()]


@pytest.fixture(scope="module")
def reference() -> dict[tuple[str, int], Any]:
    """One worker, one micro-batch, no process group."""
    return losses_and_gradients(NAMES, [1])


@pytest.mark.parametrize("name", NAMES)
def test_captions_are_unequal(name: str) -> None:
    batch = smallest(name).example_batch(SAMPLES, seed=5)
    if "token_mask" in batch:
        assert len(set(batch["token_mask"].sum(dim=1).tolist())) > 1


@pytest.mark.parametrize(("workers", "micro_batches"), [(1, [2, 3, 4]), (2, [1, 2]), (3, [1]), (4, [1])])
def test_no_split_changes_losses_or_gradients(reference: dict[tuple[str, int], Any], workers: int, micro_batches: list[int]) -> None:
    if workers == 1:
        ranks = [losses_and_gradients(NAMES, micro_batches)]
    else:
        ranks = run_workers(losses_and_gradients, workers, NAMES, micro_batches, deadline_seconds=300)
    for name in NAMES:
        expected_terms, expected = reference[name, 1]
        for count in micro_batches:
            for terms, gradients in (rank[name, count] for rank in ranks):
                assert terms == pytest.approx(expected_terms, abs=1e-5)
                assert set(gradients) == set(expected)
                # Of the largest element where that is above one: fp32 holds seven digits.
                worst = max(
                    float((gradients[key] - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1)) for key in expected
                )
                assert worst < 1e-5, f"{name} with {workers} workers x {count} micro-batches: {worst}"


def trained(folder: str, changes: dict[str, Any], kill: tuple[int, int] | None) -> str:
    """One attempt on every worker; with `kill` = (step, rank) that worker gets SIGKILL when it asks for that step."""
    config = pair_config(**changes)
    rank, size = dist.get_rank(), dist.get_world_size()

    def stream(first: int) -> Iterator[StepBatch]:
        for part in stream_from(config, rank, size, first):
            if kill == (part.step, rank):
                os.kill(os.getpid(), signal.SIGKILL)
            yield part

    result, _ = train_in(folder, config, stream=stream)
    return result.status


# Weights of several megabytes, so that DDP has more than one bucket to lay out.
LARGE = {"task__hidden": 192, "task__dropout": 0.1, "train__steps": 8, "checkpoint__every_steps": 3, "validation__samples": 16}


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("killed_at", [4, 6], ids=["off a checkpoint", "right after one"])
def test_a_killed_worker_leaves_no_mark(tmp_path: Path, workers: int, killed_at: int) -> None:
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    run_workers(trained, workers, whole, LARGE, None)
    with pytest.raises(WorkerFailed, match=rf"-{signal.SIGKILL}\b"):
        run_workers(trained, workers, killed, LARGE, (killed_at, workers - 1))
    assert run_workers(trained, workers, killed, LARGE, None) == ["finished"] * workers
    attempts = read_attempts(RunFolder(killed))
    assert attempts[2].start_step in (3, 6)
    assert_identical(final_state(whole), final_state(killed))
    assert losses_by_step(whole) == losses_by_step(killed)
    assert trace_rows(whole) == trace_rows(killed)
    assert [slot for _, slot, _ in trace_rows(killed)] == list(range(8 * 8))


def test_four_then_three_then_one_worker_see_the_same_samples_and_losses(tmp_path: Path) -> None:
    whole, changing = str(tmp_path / "whole"), str(tmp_path / "changing")
    changes = {"train__steps": 12, "validation__samples": 20, "validation__every_steps": 4, "train__global_batch_size": 8}
    run_workers(trained, 1, whole, changes, None)
    for workers, steps in ((4, 4), (3, 8), (1, 12)):
        run_workers(trained, workers, changing, changes | {"train__steps": steps}, None)
    assert {record.world_size for record in read_attempts(RunFolder(changing)).values()} == {4, 3, 1}
    assert losses_by_step(changing) == pytest.approx(losses_by_step(whole), abs=1e-4)
    assert trace_rows(changing) == trace_rows(whole)
    validated = [
        {line["step"]: line["metrics"]["val/loss"] for line in read_metrics(folder) if "val/loss" in line["metrics"]}
        for folder in (whole, changing)
    ]
    assert list(validated[0]) == [4, 8, 12]
    assert validated[1] == pytest.approx(validated[0], abs=1e-4)


def agreed(folder: str) -> tuple[str, int]:
    """Rank 1 alone wants to stop, after its third step."""
    from diptych.trainers.loop import Callbacks

    asked = iter(range(100))
    wants = Callbacks(should_stop=lambda: dist.get_rank() == 1 and next(asked) >= 2)
    result, _ = train_in(folder, pair_config(), callbacks=wants)
    return result.status, result.step


def test_all_workers_stop_at_the_same_step(tmp_path: Path) -> None:
    assert run_workers(agreed, 2, str(tmp_path)) == [("stopped", 3)] * 2


def over_budget(folder: str) -> tuple[str, int]:
    """Each rank meets one bad sample of its own in step 2, and rank 0 the same one again in step 4; one is allowed."""
    from diptych.batches import Fault
    from diptych.trainers.progress import FaultBudgetExceeded

    config = pair_config(data__fault_budget=1)
    rank, size = dist.get_rank(), dist.get_world_size()
    taken = []

    def stream(first: int) -> Iterator[StepBatch]:
        for part in stream_from(config, rank, size, first):
            if part.step == 2 or (part.step, rank) == (1, 0):
                part.faults = [Fault("0.tar", f"key{rank}", "undecodable_image", "")]
            taken.append(part.step)
            yield part

    try:
        train_in(folder, config, stream=stream)
    except FaultBudgetExceeded as error:
        return str(error), taken[-1]
    return "no error", taken[-1]


def test_the_fault_budget_is_one_for_all_workers(tmp_path: Path) -> None:
    for message, step in run_workers(over_budget, 2, str(tmp_path)):
        assert step == 2
        assert "2 distinct bad samples" in message


def idle(folder: str) -> dict[str, torch.Tensor]:
    _, strategy = train_in(folder, pair_config(task__idle=True))
    return {name: value.clone() for name, value in strategy.task.state_dict().items()}


def test_unreached_parameters_do_not_stall_the_workers(tmp_path: Path) -> None:
    one, other = run_workers(idle, 2, str(tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["idle"], torch.ones(5))
