"""The guard of the gradient norm, for norms that stay on a device until they are asked for."""

from __future__ import annotations

import pytest
import torch
from support_training import pair_config

from diptych.trainers.guard import Diverged, Guard


class OnDevice(torch.Tensor):
    """A number that claims to be on a GPU."""

    device = torch.device("cuda", 0)


def watched(*norms: float) -> Guard:
    guard = Guard(pair_config())
    for step, norm in enumerate(norms):
        guard.watch(step, torch.tensor(norm).as_subclass(OnDevice))
    return guard


def test_a_device_is_read_when_somebody_asks_and_the_first_bad_step_is_named() -> None:
    guard = watched(1.0, 0.5, float("nan"), 2.0, float("inf"))
    with pytest.raises(Diverged, match=r"at step 2 .*last finite norm 0\.5"):
        guard.check()


def test_a_device_that_nobody_asks_about_is_read_all_the_same() -> None:
    with pytest.raises(Diverged, match="at step 7"):
        watched(*[1.0] * 7, float("nan"), *[1.0] * 1000)


def test_refused_steps_count_in_a_row_and_across_checks() -> None:
    guard = watched(*[-1.0] * 24, 1.0, *[-1.0] * 24)
    guard.check()
    with pytest.raises(Diverged, match="25 steps in a row"):
        guard.watch(49, torch.tensor(-1.0))


def test_a_number_on_the_cpu_is_looked_at_at_once() -> None:
    with pytest.raises(Diverged, match="from the first step"):
        Guard(pair_config()).watch(0, torch.tensor(float("inf")))
