"""Counted draws: the right distributions, and a function of (seed, purpose, slot, element) and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.trainers.randomness import bernoulli, integers, normal, seed_layers, step_seed, uniform

SLOTS = torch.arange(2000)

UNIFORM = [0.00991988, 0.21068388, 0.92068297, 0.34168524]
INTEGERS = [9, 210, 920, 341]
NORMAL = [1.113878, -1.655037, 0.402106, 0.338578]
STEP_SEED = 8283437484412294242


def test_uniform_is_flat_in_every_bin() -> None:
    values = uniform(1, "noise", SLOTS, (100,))
    assert values.dtype == torch.float32
    assert values.shape == (2000, 100)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=50, min=0, max=1)
    # chi-square with 49 degrees of freedom; 100 is beyond its 0.99999 quantile.
    assert ((counts - 4000) ** 2 / 4000).sum() < 100


def test_normal_has_the_moments_and_the_tail_of_a_gaussian() -> None:
    values = normal(1, "noise", SLOTS, (101,)).double()
    assert values.shape == (2000, 101)
    assert abs(values.mean()) < 0.01
    assert abs(values.var() - 1) < 0.01
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 3) < 0.1
    for bound in (1.0, 2.0, 3.0):
        share = (values.abs() > bound).double().mean().item()
        assert share == pytest.approx(math.erfc(bound / math.sqrt(2)), rel=0.1)


def test_elements_slots_purposes_and_seeds_are_uncorrelated() -> None:
    a = normal(1, "noise", SLOTS, (64,))
    others = {
        "next element": a.roll(1, dims=1),
        "next slot": a.roll(1, dims=0),
        "other purpose": normal(1, "timestep", SLOTS, (64,)),
        "next seed": normal(2, "noise", SLOTS, (64,)),
    }
    for name, b in others.items():
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.012, name


def test_integers_reach_every_value_and_neither_end_beyond() -> None:
    values = integers(3, "timestep", SLOTS, (50,), -3, 7)
    assert values.dtype == torch.int64
    counts = torch.bincount(values.flatten() + 3)
    assert len(counts) == 10
    assert ((counts - 10_000).abs() < 500).all()


@pytest.mark.parametrize(("low", "high"), [(5, 5), (5, 4), (0, 2**31 + 1)])
def test_integers_refuse_an_empty_or_too_large_range(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="must hold between 1 and"):
        integers(0, "x", SLOTS, (), low, high)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_bernoulli_holds_its_probability(probability: float) -> None:
    values = bernoulli(0, "drop", SLOTS, (50,), probability)
    assert values.dtype == torch.bool
    assert values.float().mean().item() == pytest.approx(probability, abs=0.005)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 10**12), min_size=1, max_size=12), st.integers(1, 5), st.data())
def test_a_draw_depends_on_its_own_slot_alone(slots: list[int], width: int, data: st.DataObject) -> None:
    whole = normal(7, "noise", torch.tensor(slots), (width, 3))
    cut = data.draw(st.integers(0, len(slots)))
    parts = [normal(7, "noise", torch.tensor(part, dtype=torch.int64), (width, 3)) for part in (slots[:cut], slots[cut:])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole.flip(0), normal(7, "noise", torch.tensor(slots[::-1]), (width, 3)))


def test_draws_stay_what_they_are_from_version_to_version() -> None:
    """A run that is resumed with a newer Diptych must see the same noise."""
    slots = torch.tensor([0, 1, 5 * 10**9, -1])
    assert uniform(0, "noise", slots).tolist() == pytest.approx(UNIFORM, abs=1e-7)
    assert integers(0, "noise", slots, (), 0, 1000).tolist() == INTEGERS
    assert normal(0, "noise", slots).tolist() == pytest.approx(NORMAL, abs=1e-5)
    assert step_seed(0, 1, 2, 3) == STEP_SEED


def test_step_seeds_differ_by_every_part() -> None:
    seeds = {step_seed(seed, step, micro, rank) for seed in range(3) for step in range(20) for micro in range(4) for rank in range(4)}
    assert len(seeds) == 3 * 20 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(st.integers(0, 2**63 - 1))
@settings(max_examples=20, deadline=None)
def test_layers_are_seeded_as_by_torch(seed: int) -> None:
    torch.manual_seed(seed)
    expected = torch.rand(3), torch.nn.functional.dropout(torch.ones(50))
    seed_layers(seed, torch.device("cpu"))
    assert all(
        torch.equal(one, other) for one, other in zip(expected, (torch.rand(3), torch.nn.functional.dropout(torch.ones(50))), strict=True)
    )
