"""Learning rates, parameter groups, clipping and averaged weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support_training import PairConfig, PairTask, final_state, pair_config, train_in

from diptych.config import ConfigError, OptimConfig
from diptych.trainers.ema import Ema, warmed_decay
from diptych.trainers.journal import read_metrics
from diptych.trainers.muon import MuonWithAdamW
from diptych.trainers.optim import clip_gradients, learning_rate, make_optimizer, read_moments, write_moments
from diptych.trainers.task import Task


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, 10, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55)])
def test_schedules_fall_from_the_peak_to_the_floor(schedule: str, middle: float) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10, schedule=schedule)
    rates = [learning_rate(config, 110, step) for step in range(10, 111)]
    assert rates[0] == pytest.approx(1.0)
    assert rates[50] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_gains_biases_and_scalars_are_not_decayed() -> None:
    task = PairTask(PairConfig(idle=True), seed=0)
    optimizer = make_optimizer(task, OptimConfig(weight_decay=0.3))
    decayed = {id(parameter) for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in task.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim >= 2 and parameter.requires_grad), name


def test_a_task_without_trainable_parameters_is_refused() -> None:
    task = PairTask(PairConfig(), seed=0).requires_grad_(False)
    with pytest.raises(ConfigError, match="without trainable parameters"):
        make_optimizer(task, OptimConfig())


def test_clipping_bounds_the_norm_and_reports_the_one_before() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((2,), 1.0)
    assert clip_gradients(parameters, 0.0).item() == pytest.approx(14**0.5)
    assert parameters[0].grad[0] == 2.0
    assert clip_gradients(parameters, 0.5).item() == pytest.approx(14**0.5)
    total = (parameters[0].grad.square().sum() + parameters[1].grad.square().sum()).sqrt()
    assert total.item() == pytest.approx(0.5, rel=1e-5)


def test_averages_follow_the_warmed_up_recursion() -> None:
    live = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, expected = Ema([live], decay=0.7), live.detach().clone()
    for update in range(30):
        with torch.no_grad():
            live.add_(0.5)
        ema.update(update)
        decay = min(0.7, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * live.detach()
    assert warmed_decay(0.7, 0) == 0.1
    assert torch.allclose(ema.average[0], expected, atol=1e-5)


def test_averages_are_swapped_in_and_out_bit_for_bit_also_after_an_error() -> None:
    live = torch.nn.Parameter(torch.randn(100))
    ema = Ema([live], decay=0.7)
    with torch.no_grad():
        live.mul_(1.1)
    ema.update(0)
    weights, averages = live.detach().clone(), ema.average[0].clone()
    seen = []
    with pytest.raises(ZeroDivisionError), ema.swapped():
        seen.append(torch.equal(live, averages) and 1 / 0)
    assert not seen
    assert torch.equal(live, weights)
    assert torch.equal(ema.average[0], averages)


def test_a_changed_rate_wins_over_the_restored_optimizer(tmp_path: Path) -> None:
    train_in(tmp_path, pair_config(train__steps=3))
    train_in(tmp_path, pair_config(train__steps=5, optim__lr=5e-5, optim__weight_decay=0.2))
    rates = {line["step"]: line["metrics"]["train/lr"] for line in read_metrics(str(tmp_path))}
    assert rates == {1: 1e-2, 2: 1e-2, 3: 1e-2, 4: 5e-5, 5: 5e-5}


def test_averages_switched_on_later_start_from_the_weights(tmp_path: Path) -> None:
    train_in(tmp_path, pair_config(train__steps=3, optim__ema_decay=0.0))
    before = final_state(tmp_path)
    assert not before.ema
    _, strategy = train_in(tmp_path, pair_config(train__steps=4, optim__ema_decay=0.999, optim__lr=1e-12))
    state = strategy.state()
    assert state is not None
    assert set(state.ema) == {name for name, _ in strategy.task.named_parameters()}
    assert torch.allclose(state.ema["head.weight"], before.weights["head.weight"], atol=1e-6)


def test_eight_bit_moments_need_a_gpu():
    config = pair_config(optim__eight_bit=True)
    with pytest.raises(ConfigError, match=r"cluster\.gpus_per_worker") as caught:
        make_optimizer(PairTask(config.task, 0), config.optim)
    assert caught.value.key == "optim.eight_bit"


def test_muon_takes_the_matrices_of_blocks_and_adamw_all_else() -> None:
    task = PairTask(PairConfig(), seed=0)
    optimizer = make_optimizer(task, OptimConfig(name="muon", weight_decay=0.3))
    assert isinstance(optimizer, MuonWithAdamW)
    names = {parameter: name for name, parameter in task.named_parameters()}
    assert sorted(names[one] for one in optimizer.matrices) == ["decode.0.weight", "image.0.weight", "image.3.weight"]
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(names.__getitem__, grouped)) == sorted(names.values())


def test_muon_steps_along_the_orthogonalised_gradient_scaled_as_adamw() -> None:
    task = PairTask(PairConfig(), seed=0)
    optimizer = make_optimizer(task, OptimConfig(name="muon", lr=1.0, weight_decay=0.0))
    weight = task.get_parameter("image.0.weight")
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    spread = torch.linalg.svdvals(before - weight.detach()) / (0.2 * max(weight.shape) ** 0.5)
    # Five Newton-Schulz steps bring every singular value near 1, not to it.
    assert spread.min() > 0.5
    assert spread.max() < 1.4


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_filters_as_rows_of_a_matrix_whatever_their_memory(memory_format: torch.memory_format) -> None:
    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Conv2d(8, 6, 3), torch.nn.Conv2d(8, 8, 3, groups=8)])

        def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
            return [{"params": list(self.parameters()), "weight_decay": weight_decay}]

    module = Blocks().to(memory_format=memory_format)
    optimizer = make_optimizer(cast("Task", module), OptimConfig(name="muon", lr=1.0, weight_decay=0.0))
    assert isinstance(optimizer, MuonWithAdamW)
    weight = module.blocks[0].weight
    assert set(optimizer.matrices) == {weight}, "a filter of one channel is no map between channels"
    before, gradient = weight.detach().clone(), torch.randn(6, 8, 3, 3)
    weight.grad = gradient
    optimizer.step()
    spread = torch.linalg.svdvals((before - weight.detach()).flatten(1)) / (0.2 * 72**0.5)
    assert spread.min() > 0.5
    assert spread.max() < 1.4
    momentum = read_moments(optimizer, weight)["momentum"]
    assert momentum.shape == weight.shape
    assert torch.nn.functional.cosine_similarity(momentum.flatten(), gradient.flatten(), dim=0) > 0.999
    write_moments(optimizer, weight, {"momentum": gradient})
    assert torch.equal(read_moments(optimizer, weight)["momentum"], gradient)
    optimizer.zero_grad()
    assert weight.grad is None


def test_a_muon_run_that_is_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    train_in(tmp_path / "whole", pair_config(train__steps=6, optim__name="muon"))
    train_in(tmp_path / "cut", pair_config(train__steps=3, optim__name="muon"))
    train_in(tmp_path / "cut", pair_config(train__steps=6, optim__name="muon"))
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    assert "momentum/image.0.weight" in whole.optimizer
    assert "exp_avg_sq/image.0.weight" not in whole.optimizer
    for part in ("weights", "optimizer", "ema"):
        ours, theirs = getattr(cut, part), getattr(whole, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part


@pytest.mark.parametrize("names", [("muon", "adamw"), ("adamw", "muon")])
def test_moments_of_another_optimizer_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    train_in(tmp_path, pair_config(train__steps=2, optim__name=names[0]))
    with pytest.raises(ConfigError, match="moments are that optimizer's") as caught:
        train_in(tmp_path, pair_config(train__steps=4, optim__name=names[1]))
    assert caught.value.key == "optim.name"


def test_muon_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs whole"):
        train_in(tmp_path, pair_config(train__strategy="zero2", optim__name="muon"))
    task = PairTask(PairConfig(), seed=0)
    with pytest.raises(ConfigError, match="moments are not AdamW's"):
        make_optimizer(task, OptimConfig(name="muon", eight_bit=True))
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(name == "head.weight")
    with pytest.raises(ConfigError, match="no matrix inside of blocks"):
        make_optimizer(task, OptimConfig(name="muon"))
