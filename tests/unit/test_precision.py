"""What `precision=auto` chooses, and fp16's loss scaling."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from support_training import PairConfig, PairTask, denormal_product, make_rows, pair_config, share_of, train_in

from diptych.batches import StepBatch
from diptych.trainers.guard import Diverged
from diptych.trainers.precision import LossScale, denormals_flushed, resolve_precision
from diptych.trainers.strategies import make_strategy

CPU = torch.device("cpu")


def test_auto_on_a_cpu_follows_its_flags_and_says_so() -> None:
    chosen = resolve_precision("auto", CPU)
    fast = any(line.startswith("flags") and "amx_bf16" in line.split() for line in Path("/proc/cpuinfo").read_text().splitlines())
    assert chosen.name == ("bf16" if fast else "fp32")
    assert "amx_bf16" in chosen.reason


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_products_are_taken_in_the_named_precision_and_weights_stay_fp32(name: str, dtype: torch.dtype) -> None:
    precision = resolve_precision(name, CPU)
    layer = torch.nn.Linear(4, 4)
    with precision.autocast():
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert precision.scaler().is_enabled() == (name == "fp16")


def test_own_loss_scale_follows_the_rule_of_torch() -> None:
    own = LossScale(growth_interval=5)
    theirs = torch.amp.GradScaler("cpu", growth_interval=5)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for overflow in [False] * 7 + [True, True] + [False] * 6 + [True] + [False] * 11:
        theirs.scale(parameter.sum()).backward()
        if overflow:
            parameter.grad.fill_(torch.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        own.update(overflow)
        assert (own.scale, own.growth_tracker) == (theirs.get_scale(), theirs.state_dict()["_growth_tracker"])
    fresh = torch.amp.GradScaler("cpu")
    fresh.load_state_dict(own.state_dict())
    assert fresh.state_dict()["scale"] == own.scale


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_like_fp32(tmp_path: Path, precision: str) -> None:
    exact, _ = train_in(tmp_path / "fp32", pair_config())
    low, _ = train_in(tmp_path / precision, pair_config(train__precision=precision))
    assert low.metrics["train/loss"] == pytest.approx(exact.metrics["train/loss"], rel=0.02)
    assert low.metrics["train/loss"] != exact.metrics["train/loss"]


def test_a_step_that_overflows_changes_nothing_and_halves_the_scale() -> None:
    config = pair_config(train__precision="fp16")
    strategy = make_strategy(config, PairTask(PairConfig(), seed=0))
    before = strategy.state()
    strategy.backward(sum(parameter.sum() for parameter in strategy.task.parameters()) * 1e36, last=True)
    assert strategy.step(0, 1e-2).item() == -1.0
    after = strategy.state()
    assert before is not None
    assert after is not None
    assert all(torch.equal(before.weights[name], after.weights[name]) for name in before.weights)
    assert after.scaler["scale"] == before.scaler["scale"] / 2


def test_the_loss_scale_survives_a_resume(tmp_path: Path) -> None:
    config = pair_config(train__precision="fp16", train__steps=3)
    _, strategy = train_in(tmp_path, config)
    state = strategy.state()
    assert state is not None
    assert state.scaler["_growth_tracker"] == 3
    _, resumed = train_in(tmp_path, pair_config(train__precision="fp16", train__steps=5))
    state = resumed.state()
    assert state is not None
    assert state.scaler["_growth_tracker"] == 5


def test_fp16_that_overflows_at_every_scale_ends_with_the_remedy(tmp_path: Path) -> None:
    config = pair_config(train__precision="fp16", train__steps=40, train__log_every=40)

    def poisoned(first: int):
        for step in range(first, 100):
            arrays = make_rows(share_of(step * 8, 8, 0, 1, 1))
            arrays["image_embedding"][0, 0] = float("nan")
            yield StepBatch(step, arrays)

    with pytest.raises(Diverged, match="bf16"):
        train_in(tmp_path, config, stream=poisoned)


def test_short_attention_in_bf16_on_a_cpu_takes_products_and_the_switch_goes_back() -> None:
    from diptych.trainers.precision import SHORT_ATTENTION, Precision, fast_attention

    def kernels(precision: str, tokens: int | None) -> set[str]:
        query = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16, requires_grad=True)
        with fast_attention(Precision(precision, "", "cpu"), tokens), torch.profiler.profile() as profiler:
            torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        return {event.name for event in profiler.events() if "attention" in event.name}

    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert fused not in kernels("bf16", 17)
    for precision, tokens in (("fp32", 17), ("bf16", SHORT_ATTENTION + 1), ("bf16", None)):
        assert fused in kernels(precision, tokens)


def learned(steps: int) -> tuple[dict[str, torch.Tensor], int]:
    """Weights of a classifier after `steps` more on what it is sure of, and how many gradients were denormal on the way."""
    torch.manual_seed(0)
    inputs, wanted = torch.eye(64), torch.arange(64)
    layer = torch.nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(64) * 95 + torch.rand(64, 64))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, fused=True)
    denormal = 0
    for _ in range(steps):
        torch.nn.functional.cross_entropy(layer(inputs), wanted).backward()
        bits = layer.weight.grad.view(torch.int32) & 0x7FFFFFFF
        denormal += int(((bits > 0) & (bits < 0x00800000)).sum())
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in layer.state_dict().items()}, denormal


def test_gradients_too_small_to_matter_count_as_zero_and_nothing_else_changes() -> None:
    weights, denormal = learned(20)
    with denormals_flushed():
        flushed, left = learned(20)
    assert denormal > 1000
    assert left == 0
    assert all(torch.equal(weights[name], flushed[name]) for name in weights)


def test_threads_begun_within_flush_too_and_the_setting_goes_back() -> None:
    found: list[float] = []
    with denormals_flushed():
        thread = threading.Thread(target=lambda: found.append(denormal_product()))
        thread.start()
        thread.join()
        found.append(denormal_product())
    assert found == [0.0, 0.0]
    assert denormal_product() > 0
