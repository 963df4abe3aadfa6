"""8-bit AdamW on a GPU: a resumed run goes on with the same moments."""

from __future__ import annotations

import pytest
from support_training import PairTask, assert_identical, pair_config, stream_from

from diptych.trainers.micro_batches import make_micro_batches
from diptych.trainers.objective import accumulate, local_weights
from diptych.trainers.strategies import Strategy, make_strategy

pytestmark = pytest.mark.gpu


def advance(strategy: Strategy, first: int, last: int) -> None:
    """Optimizer steps `first` to `last` - 1."""
    for share in stream_from(pair_config(), 0, 1, first):
        if share.step == last:
            return
        micros = make_micro_batches(strategy.task, share.arrays, 1, strategy.world.device)
        totals = {name: weight.float() for name, weight in local_weights(strategy.task, micros).items()}
        accumulate(strategy, micros, totals, seed=0, step=share.step)
        strategy.step(share.step, 1e-2)


def test_a_resumed_run_has_the_same_moments() -> None:
    pytest.importorskip("bitsandbytes")
    config = pair_config(optim__eight_bit=True, task__hidden=128)
    whole, resumed = (make_strategy(config, PairTask(config.task, 0), "cuda") for _ in range(2))
    advance(whole, 0, 3)
    state = whole.state()
    assert state is not None
    resumed.load_state(state)
    for strategy in (whole, resumed):
        advance(strategy, 3, 6)
    one, other = whole.state(), resumed.state()
    assert one is not None
    assert other is not None
    assert_identical(one, other)
