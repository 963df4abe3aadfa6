"""DeepSpeed's ZeRO: the same numbers as DDP, 1/n of the optimizer on each worker, and state that any split loads."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support_distributed import WorkerFailed, run_workers
from support_training import (
    SAMPLES,
    PairTask,
    assert_identical,
    differences,
    final_state,
    losses_by_step,
    make_rows,
    pair_config,
    share,
    share_of,
    smallest,
    stream_from,
    trace_rows,
    train_in,
)

from diptych.batches import StepBatch
from diptych.config import ConfigError, OptimConfig, RunConfig, TrainConfig, task_names
from diptych.trainers.guard import Diverged
from diptych.trainers.loop import Callbacks
from diptych.trainers.micro_batches import make_micro_batches
from diptych.trainers.objective import accumulate, local_weights, loss_value
from diptych.trainers.strategies import make_strategy
from diptych.trainers.task import Task
from diptych.trainers.validation import mean_terms

STAGES = ["zero1", "zero2", "zero3"]
# A width that 3 workers do not divide, a frozen part, and weights too large for ZeRO-3 to keep them whole.
COMMON = {"task__hidden": 118, "task__idle": True, "optim__weight_decay": 0.0, "validation__samples": 20, "checkpoint__every_steps": 3}


def attempts(folder: str, runs: list[tuple[str, dict[str, Any]]]) -> list[tuple[float, float, int]]:
    """(train/loss, val/loss, optimizer bytes) of runs `(name, changes)` one after the other, in one group of processes."""
    found = []
    for name, changes in runs:
        result, strategy = train_in(f"{folder}/{name}", pair_config(**COMMON | changes))
        found.append((result.metrics["train/loss"], result.metrics["val/loss"], strategy.optimizer_bytes()))
    return found


def test_twenty_steps_equal_ddp_and_each_worker_holds_a_part(tmp_path, capsys):
    changes = {"train__steps": 20, "optim__clip_norm": 1.0, "optim__schedule": "cosine"}
    names = ["ddp", *STAGES]
    (rows, _) = run_workers(attempts, 2, str(tmp_path), [(name, changes | {"train__strategy": name}) for name in names])
    states = {name: final_state(tmp_path / name) for name in names}
    with capsys.disabled():
        print("\noptimizer bytes per worker of 2:", {name: row[2] for name, row in zip(names, rows, strict=True)})
    for name, row in zip(names, rows, strict=True):
        assert losses_by_step(tmp_path / name) == pytest.approx(losses_by_step(tmp_path / "ddp"), abs=1e-5)
        assert row[1] == pytest.approx(rows[0][1], abs=1e-5)
        found = differences(states["ddp"], states[name])
        assert found["optimizer"] < 1e-5, name
        # Adam divides by small numbers: rounding of another sum shows in single weights, on one processor and not on another.
        assert max(found.values()) < 1e-4, name
        assert trace_rows(tmp_path / name) == trace_rows(tmp_path / "ddp")
        # What the task changes after a step must reach the partitions that the next one starts from.
        assert float(states[name].weights["scale"]) == pytest.approx(1.49, abs=1e-3)
        if name != "ddp":
            assert row[2] == pytest.approx(rows[0][2] / 2, rel=0.01)


def test_three_workers_hold_a_third_each(tmp_path):
    for rows in run_workers(
        attempts, 3, str(tmp_path), [(name, {"train__steps": 1, "train__strategy": name}) for name in ("ddp", *STAGES)]
    ):
        for row in rows[1:]:
            assert row[2] == pytest.approx(rows[0][2] / 3, rel=0.02)


def test_accumulation_offload_and_checkpointing_change_nothing(tmp_path):
    runs = [("plain", {"train__strategy": "zero1"})]
    for stage in STAGES:
        runs += [(f"{stage}-micro", {"train__strategy": stage, "train__micro_batches": 2})]
        runs += [(f"{stage}-offload", {"train__strategy": stage, "train__offload": True})]
        runs += [(f"{stage}-recompute", {"train__strategy": stage, "train__gradient_checkpointing": True})]
    run_workers(attempts, 2, str(tmp_path), runs)
    for name, _ in runs[1:]:
        assert losses_by_step(tmp_path / name) == pytest.approx(losses_by_step(tmp_path / "plain"), abs=1e-5), name
        assert max(differences(final_state(tmp_path / "plain"), final_state(tmp_path / name)).values()) < 1e-4, name


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_any_strategy_and_world_size_goes_on_from_any_other(tmp_path, size):
    """Saved by two workers under one strategy, finished by `size` under another, against ddp alone all along."""
    first, last = {"train__steps": 4}, {"train__steps": 6}
    pairs = [("zero2", "zero1"), ("zero3", "ddp"), ("zero2", "ddp"), ("zero3", "zero2"), ("ddp", "zero3")]
    run_workers(attempts, 2, str(tmp_path), [(f"{a}-{b}", first | {"train__strategy": a}) for a, b in pairs])
    run_workers(attempts, size, str(tmp_path), [(f"{a}-{b}", last | {"train__strategy": b}) for a, b in pairs])
    train_in(tmp_path / "whole", pair_config(**COMMON | last))
    for a, b in pairs:
        assert losses_by_step(tmp_path / f"{a}-{b}") == pytest.approx(losses_by_step(tmp_path / "whole"), abs=1e-5), (a, b)
        # Adam divides by small numbers: rounding of another sum shows in single weights.
        assert max(differences(final_state(tmp_path / "whole"), final_state(tmp_path / f"{a}-{b}")).values()) < 1e-4, (a, b)


def killed(folder: str, strategy: str, kill_at: int | None) -> str:
    config = pair_config(**COMMON | {"train__strategy": strategy, "task__dropout": 0.1, "train__steps": 8})
    rank, size = dist.get_rank(), dist.get_world_size()

    def stream(first: int) -> Iterator[StepBatch]:
        for part in stream_from(config, rank, size, first):
            if (part.step, rank) == (kill_at, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            yield part

    return train_in(f"{folder}/{strategy}", config, stream=stream)[0].status


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", STAGES)
def test_a_killed_worker_leaves_no_mark(tmp_path, strategy, workers):
    run_workers(killed, workers, str(tmp_path / "whole"), strategy, None)
    with pytest.raises(WorkerFailed, match=rf"-{signal.SIGKILL}\b"):
        run_workers(killed, workers, str(tmp_path / "killed"), strategy, 5)
    assert run_workers(killed, workers, str(tmp_path / "killed"), strategy, None) == ["finished"] * workers
    assert_identical(final_state(tmp_path / "whole" / strategy), final_state(tmp_path / "killed" / strategy))
    assert losses_by_step(tmp_path / "whole" / strategy) == losses_by_step(tmp_path / "killed" / strategy)
    assert trace_rows(tmp_path / "whole" / strategy) == trace_rows(tmp_path / "killed" / strategy)


def shown(folder: str) -> dict[str, bool]:
    return {strategy: shown_by(f"{folder}/{strategy}", strategy) for strategy in STAGES}


def shown_by(folder: str, strategy: str) -> bool:
    """Whether `show` saw the averages in whole weights, and the weights came back after it."""
    seen: list[dict[str, torch.Tensor]] = []

    def show(step: int, task: Task) -> None:
        seen.append({name: parameter.detach().clone() for name, parameter in task.named_parameters()})

    _, trained = train_in(folder, pair_config(**COMMON | {"train__strategy": strategy}), callbacks=Callbacks(show=show))
    state = trained.state()
    with trained.whole():
        now = {name: parameter.detach().clone() for name, parameter in trained.task.named_parameters()}
    if state is None:
        return True
    averages = all(torch.equal(seen[-1][name], value) for name, value in state.ema.items())
    return averages and all(torch.equal(value, state.weights[name]) for name, value in now.items())


def test_averages_are_shown_whole_and_the_weights_come_back(tmp_path):
    assert run_workers(shown, 2, str(tmp_path)) == [dict.fromkeys(STAGES, True)] * 2


def fp16_steps() -> dict[str, list[float]]:
    return {strategy: fp16_steps_of(strategy) for strategy in ("ddp", *STAGES)}


def fp16_steps_of(strategy: str) -> list[float]:
    """Loss scale after a step that overflows on rank 1 alone and one that does not; weights must not move in the first."""
    config = pair_config(train__strategy=strategy, train__precision="fp16")
    trained = make_strategy(config, PairTask(config.task, config.seed))
    before = trained.state()
    scales = []
    for factor in (1e36, 1e-3):
        output = trained.forward(example(config, trained.task), last=True)
        own = factor if dist.get_rank() == 1 else 1e-3
        trained.backward(output.terms["caption"].sum * own + sum(value.sum() for value in output.features.values()) * 0, last=True)
        norm = trained.step(0, 1e-2).item()
        assert (norm == -1.0) == (factor > 1), norm
        state = trained.state()
        if state is not None and before is not None:
            scales.append(state.scaler["scale"])
            moved = any(not torch.equal(before.weights[name], state.weights[name]) for name in state.weights)
            assert moved == (factor < 1)
    return scales


def example(config, task):
    batch = task.example_batch(4)
    return batch | task.draws(batch)


def test_fp16_skips_a_step_that_overflows_on_any_worker():
    expected = {strategy: [2.0**15, 2.0**15] for strategy in ("ddp", *STAGES)}
    assert run_workers(fp16_steps, 2)[0] == expected


def poisoned(folder: str) -> dict[str, str]:
    return {strategy: poisoned_by(f"{folder}/{strategy}", strategy) for strategy in ("ddp", *STAGES)}


def poisoned_by(folder: str, strategy: str) -> str:
    config = pair_config(train__strategy=strategy, checkpoint__every_steps=1)
    rank, size = dist.get_rank(), dist.get_world_size()

    def stream(first: int) -> Iterator[StepBatch]:
        for part in stream_from(config, rank, size, first):
            if (part.step, rank) == (3, 1):
                part.arrays["image_embedding"][:] = float("nan")
            yield part

    try:
        train_in(folder, config, stream=stream)
    except Diverged as error:
        return str(error)
    return "no error"


def test_nan_on_one_worker_stops_all_of_them(tmp_path):
    for messages in run_workers(poisoned, 2, str(tmp_path)):
        for strategy, message in messages.items():
            assert "infinite at step 3" in message, strategy
            assert all(torch.isfinite(value).all() for value in final_state(tmp_path / strategy).weights.values())


def alone(folder: str) -> list[float]:
    """ZeRO with one worker whom nobody gave a process group."""
    dist.destroy_process_group()
    try:
        return [train_in(f"{folder}/{name}", pair_config(train__strategy=name))[0].metrics["train/loss"] for name in ("ddp", *STAGES)]
    finally:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_one_worker_needs_no_process_group(tmp_path):
    ((ddp, *zero),) = run_workers(alone, 1, str(tmp_path))
    assert zero == pytest.approx([ddp] * 3, abs=1e-5)


def refused() -> str:
    config = pair_config(train__strategy="zero3", train__compile=True)
    with pytest.raises(ConfigError) as caught:
        make_strategy(config, PairTask(config.task, config.seed))
    return str(caught.value)


def test_compilation_under_zero3_is_refused_with_the_remedy():
    (message,) = run_workers(refused, 1)
    assert "train.compile" in message
    assert "zero2" in message


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_a_compiled_task_learns_the_same_as_one_that_is_not(tmp_path, stage):
    runs = [("plain", {"train__strategy": "ddp"}), ("compiled", {"train__strategy": stage, "train__compile": True})]
    run_workers(attempts, 2, str(tmp_path), [(name, {"train__steps": 4} | changes) for name, changes in runs], deadline_seconds=500)
    assert losses_by_step(tmp_path / "plain") == pytest.approx(losses_by_step(tmp_path / "compiled"), abs=1e-4)
    assert max(differences(final_state(tmp_path / "plain"), final_state(tmp_path / "compiled")).values()) < 1e-4


def twenty_steps(names: list[str], strategies: list[str]) -> dict[tuple[str, str], tuple[list[float], Any]]:
    """Losses of 20 steps of each task under each strategy, layer dropout off, and the state after them."""
    found = {}
    for name, strategy in itertools.product(names, strategies):
        task = smallest(name)
        train = TrainConfig(steps=20, global_batch_size=SAMPLES, strategy=strategy, micro_batches=2, precision="fp32")
        config = RunConfig(task=task.config, train=train, optim=OptimConfig(lr=1e-4, clip_norm=1.0, ema_decay=0.9))
        trained = make_strategy(config, task)
        world, losses = trained.world, []
        for step in range(20):
            task.eval()
            rows = share(task.example_batch(SAMPLES, seed=step), world.rank, world.size, 2)
            micros = make_micro_batches(task, {key: value.numpy() for key, value in rows.items()}, 2, world.device)
            totals = {term: world.sum_(weight).float() for term, weight in local_weights(task, micros).items()}
            terms, _ = accumulate(trained, micros, totals, seed=1, step=step)
            losses.append(loss_value(task, mean_terms(world, terms)))
            trained.step(step, 1e-4)
        found[name, strategy] = (losses, trained.state())
    return found


@pytest.mark.parametrize("stages", [["zero1"], pytest.param(["zero2", "zero3"], marks=pytest.mark.slow)])
def test_every_task_trains_under_zero_as_under_ddp(stages):
    found, _ = run_workers(twenty_steps, 2, task_names(), ["ddp", *stages], deadline_seconds=300)
    for name, stage in itertools.product(task_names(), stages):
        losses, state = found[name, "ddp"]
        assert found[name, stage][0] == pytest.approx(losses, abs=1e-5), (name, stage)
        assert max(differences(state, found[name, stage][1]).values()) < 1e-4, (name, stage)


def test_shares_of_the_tests_cover_every_slot_once():
    slots = [slot for rank in range(3) for slot in share_of(16, 8, rank, 3, 2).tolist()]
    assert sorted(slot for slot in slots if slot >= 0) == list(range(16, 24))
    assert make_rows(share_of(0, 2, 1, 2, 3))["weight"].tolist() == [1.0, 0.0, 0.0]
