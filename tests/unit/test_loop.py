"""The loop: what it refuses, when it stops, what it reports; one process, no process group."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support_distributed import run_workers
from support_training import (
    PairConfig,
    PairTask,
    assert_identical,
    final_state,
    losses_by_step,
    make_rows,
    pair_config,
    share_of,
    stream_from,
    trace_rows,
    train_in,
)

from diptych.batches import Fault, StepBatch
from diptych.config import ConfigError, RunConfig
from diptych.trainers.checkpoint import newest_whole
from diptych.trainers.guard import Diverged
from diptych.trainers.journal import read_metrics
from diptych.trainers.loop import Callbacks
from diptych.trainers.progress import FaultBudgetExceeded
from diptych.trainers.runfolder import RunFolder
from diptych.trainers.task import Task
from diptych.trainers.throughput import Throughput


class Killed(Exception):  # noqa: N818
    """Stands for the end of the process."""


def interrupted(config: RunConfig, at: int):
    """A stream that dies when step `at` is asked for."""

    def stream(first: int) -> Iterator[StepBatch]:
        for share in stream_from(config, 0, 1, first):
            if share.step == at:
                raise Killed
            yield share

    return stream


def test_the_task_learns(tmp_path: Path) -> None:
    result, _ = train_in(tmp_path, pair_config(train__steps=120, train__global_batch_size=16, validation__samples=32))
    losses = losses_by_step(tmp_path)
    assert result.status == "finished"
    assert (result.step, result.samples) == (120, 120 * 16)
    assert losses[120] < 0.8 * losses[1]
    assert result.metrics["val/loss"] < 0.8 * losses[1]


@pytest.mark.parametrize("killed_at", [3, 4, 7])
def test_resuming_equals_never_having_been_killed(tmp_path: Path, killed_at: int) -> None:
    config = pair_config(task__dropout=0.2, checkpoint__every_steps=4, optim__schedule="cosine", optim__clip_norm=0.5)
    train_in(tmp_path / "whole", config)
    with pytest.raises(Killed):
        train_in(tmp_path / "killed", config, stream=interrupted(config, killed_at))
    result, _ = train_in(tmp_path / "killed", config)
    assert result.status == "finished"
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    assert losses_by_step(tmp_path / "whole") == losses_by_step(tmp_path / "killed")
    assert trace_rows(tmp_path / "whole") == trace_rows(tmp_path / "killed")


def test_the_trace_names_every_sample_once(tmp_path: Path) -> None:
    train_in(tmp_path, pair_config(train__steps=5, train__micro_batches=3))
    assert trace_rows(tmp_path) == [(slot // 8, slot, slot % 97) for slot in range(40)]


def test_a_share_of_the_wrong_step_is_refused(tmp_path: Path) -> None:
    config = pair_config()

    def late(first: int) -> Iterator[StepBatch]:
        return itertools.chain(itertools.islice(stream_from(config, 0, 1, first), 2), stream_from(config, 0, 1, 3))

    with pytest.raises(RuntimeError, match="delivered step 3 where step 2 was due"):
        train_in(tmp_path, config, stream=late)


def test_a_stream_that_ends_early_is_an_error(tmp_path: Path) -> None:
    config = pair_config()
    with pytest.raises(RuntimeError, match="ended after step 2 of 8"):
        train_in(tmp_path, config, stream=lambda first: itertools.islice(stream_from(config, 0, 1, first), 2))


def test_nan_stops_the_run_before_anything_is_saved_and_says_where(tmp_path: Path) -> None:
    config = pair_config(checkpoint__every_steps=1)

    def poisoned(first: int) -> Iterator[StepBatch]:
        for share in stream_from(config, 0, 1, first):
            if share.step == 5:
                share.arrays["image_embedding"][2, 1] = float("nan")
            yield share

    with pytest.raises(Diverged, match=r"infinite at step 5 .*optim\.lr"):
        train_in(tmp_path, config, stream=poisoned)
    assert newest_whole(RunFolder(str(tmp_path))) == "step_00000005-a0001"


def test_nan_from_the_start_points_at_the_inputs(tmp_path: Path) -> None:
    def poisoned(first: int) -> Iterator[StepBatch]:
        arrays = make_rows(share_of(0, 8, 0, 1, 1))
        arrays["image_embedding"][:] = float("inf")
        yield StepBatch(0, arrays)

    with pytest.raises(Diverged, match="check the inputs"):
        train_in(tmp_path, pair_config(), stream=poisoned)


def faulty(config: RunConfig, faults: dict[int, list[str]]):
    def stream(first: int) -> Iterator[StepBatch]:
        for share in stream_from(config, 0, 1, first):
            share.faults = [Fault("0.tar", key, "undecodable_image", "", slot=0) for key in faults.get(share.step, [])]
            yield share

    return stream


def test_the_fault_budget_counts_distinct_samples_over_attempts(tmp_path: Path) -> None:
    config = pair_config(data__fault_budget=2, checkpoint__every_steps=2)
    # The same two samples over and over are within the budget.
    seen: list[tuple[int, int, list[str]]] = []
    record = Callbacks(record_faults=lambda step, rank, faults: seen.append((step, rank, [fault.key for fault in faults])))
    faults = {0: ["a"], 1: ["a", "b"], 3: ["b"]}
    train_in(tmp_path, pair_config(data__fault_budget=2, train__steps=4), stream=faulty(config, faults), callbacks=record)
    assert seen == [(0, 0, ["a"]), (1, 0, ["a", "b"]), (3, 0, ["b"])]
    # A third one after the resume is beyond it.
    with pytest.raises(FaultBudgetExceeded, match=r"fault_budget: 3 distinct bad samples by step 6, allowed 2.*0\.tar/c"):
        train_in(tmp_path, config, stream=faulty(config, {4: ["a"], 6: ["c"]}))


def test_being_asked_to_stop_leaves_a_checkpoint_that_goes_on(tmp_path: Path) -> None:
    config = pair_config(validation__samples=8)
    asked = iter([False, False, True])
    result, _ = train_in(tmp_path / "a", config, callbacks=Callbacks(should_stop=lambda: next(asked)))
    assert (result.status, result.step) == ("stopped", 3)
    assert "val/loss" not in result.metrics
    result, _ = train_in(tmp_path / "a", config)
    assert (result.status, result.step) == ("finished", 8)
    train_in(tmp_path / "b", config)
    assert_identical(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


def save_at_three(folder: str) -> list[str]:
    """On each of two workers; only rank 1 has notice that its node is taken back."""
    import torch.distributed as dist

    asked = iter(range(100))
    callbacks = Callbacks(should_save=lambda: next(asked) == 2 and dist.get_rank() == 1)
    train_in(folder, pair_config(train__steps=6, checkpoint__every_steps=5), callbacks=callbacks)
    return RunFolder(folder).names("checkpoints")


def test_a_notice_on_one_worker_saves_at_once_and_training_goes_on(tmp_path: Path) -> None:
    names = run_workers(save_at_three, 2, str(tmp_path))[0]
    assert names == ["step_00000003-a0001", "step_00000005-a0001", "step_00000006-a0001"]


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    config = pair_config()
    train_in(tmp_path, config)
    before = final_state(tmp_path)
    result, _ = train_in(tmp_path, config)
    assert (result.status, result.step) == ("finished", 8)
    assert_identical(before, final_state(tmp_path))


def test_early_stopping_waits_for_its_patience_and_remembers_it(tmp_path: Path) -> None:
    # This figure never changes, so the first validation, after step 2, stays the best one.
    config = pair_config(
        train__steps=50,
        train__patience=3,
        train__monitor="val/last_slot",
        validation__samples=16,
        validation__every_steps=2,
        checkpoint__every_steps=2,
    )
    with pytest.raises(Killed):
        train_in(tmp_path, config, stream=interrupted(config, 5))
    result, _ = train_in(tmp_path, config)
    assert (result.status, result.step) == ("early_stopped", 8)
    again, _ = train_in(tmp_path, config)
    assert (again.status, again.step) == ("early_stopped", 8)


def test_a_monitor_that_validation_does_not_produce_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.monitor: received 'val/bleu'; allowed: .*val/loss.*val/recall"):
        train_in(tmp_path, pair_config(train__monitor="val/bleu", validation__samples=8))


def test_validation_covers_every_sample_in_order_whatever_the_batch(tmp_path: Path) -> None:
    results = []
    for batch in (21, 8, 4):
        config = pair_config(train__steps=2, validation__samples=21, validation__batch_size=batch)
        result, _ = train_in(tmp_path / str(batch), config)
        assert result.metrics["val/last_slot"] == 10**6 + 20
        results.append(result.metrics)
    # Captions and retrieval do not depend on how the samples were batched; the contrast is one batch's.
    for metrics in results[1:]:
        assert metrics["val/caption"] == pytest.approx(results[0]["val/caption"], rel=1e-6)
        assert metrics["val/recall"] == results[0]["val/recall"]
        assert metrics["val/loss"] == pytest.approx(2 * metrics["val/caption"] + metrics["val/contrast"])


def test_validation_takes_the_averaged_weights_and_gives_the_others_back(tmp_path: Path) -> None:
    shown: list[torch.Tensor] = []

    def show(step: int, task: Task) -> None:
        assert isinstance(task, PairTask)
        assert not task.training
        shown.append(task.head.weight.detach().clone())

    config = pair_config(train__steps=3, validation__samples=8)
    _, strategy = train_in(tmp_path, config, callbacks=Callbacks(show=show))
    state = strategy.state()
    assert state is not None
    assert torch.equal(shown[0], state.ema["head.weight"])
    assert torch.equal(strategy.task.head.weight, state.weights["head.weight"])
    assert not torch.equal(state.ema["head.weight"], state.weights["head.weight"])
    assert strategy.task.training


def test_lines_appear_every_log_steps_and_at_the_end(tmp_path: Path) -> None:
    train_in(tmp_path, pair_config(train__steps=8, train__log_every=3))
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [3, 6, 8]


def test_throughput_counts_the_wait_for_data(tmp_path: Path) -> None:
    config = pair_config(train__steps=4, train__log_every=4)

    def slow(first: int) -> Iterator[StepBatch]:
        for share in stream_from(config, 0, 1, first):
            time.sleep(0.1)
            yield share

    result, _ = train_in(tmp_path, config, stream=slow)
    assert result.metrics["train/samples_per_second"] < 32 / 0.4
    assert result.metrics["train/data_wait_share"] > 0.3
    # 32 samples hold as many tokens as their masks say.
    tokens = sum(make_rows(share_of(0, 32, 0, 1, 1))["token_mask"].sum(axis=1))
    ratio = result.metrics["train/tokens_per_second"] / result.metrics["train/samples_per_second"]
    assert ratio == pytest.approx(tokens / 32, rel=1e-6)


def test_utilisation_is_of_the_peak_of_all_devices() -> None:
    meter = Throughput(samples_per_step=8, peak=1e12, flops_per_sample=1e9, workers=2)
    assert list(meter.timed(iter("ab"))) == ["a", "b"]
    begin = time.perf_counter()
    time.sleep(0.05)
    meter.paused(begin)
    meter.step()
    figures = meter.rates()
    assert figures["mfu"] == pytest.approx(figures["samples_per_second"] * 1e9 / 2e12)
    # Validation's time is no part of the interval.
    assert figures["samples_per_second"] > 8 / 0.05
    assert "mfu" not in Throughput(8, None, 1e9, 2).rates()


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    train_in(tmp_path / "a", pair_config(task__dropout=0.1))
    train_in(tmp_path / "b", pair_config(task__dropout=0.1, train__gradient_checkpointing=True))
    assert_identical(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


# Muon orthogonalises in bf16, which turns the last bit of a sum into its rounding.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 2e-3)])
def test_micro_batches_change_no_loss(tmp_path: Path, optimizer: str, tolerance: float) -> None:
    for count in (1, 2, 3):
        train_in(tmp_path / str(count), pair_config(train__micro_batches=count, optim__name=optimizer))
    for count in (2, 3):
        ours, theirs = losses_by_step(tmp_path / "1"), losses_by_step(tmp_path / str(count))
        assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.mark.slow
@pytest.mark.compiler
def test_a_compiled_task_learns_the_same(tmp_path: Path) -> None:
    train_in(tmp_path / "plain", pair_config())
    train_in(tmp_path / "compiled", pair_config(train__compile=True))
    assert losses_by_step(tmp_path / "plain") == pytest.approx(losses_by_step(tmp_path / "compiled"), abs=1e-4)


def test_frozen_and_unreached_parameters_stay_as_they_are(tmp_path: Path) -> None:
    task = PairTask(PairConfig(idle=True), seed=3)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    train_in(tmp_path, pair_config(task__idle=True), task=task)
    after = final_state(tmp_path).weights
    for name in ("idle", "frozen.weight", "frozen.bias", "shift"):
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["head.weight"], after["head.weight"])
