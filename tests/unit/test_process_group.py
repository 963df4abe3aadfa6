"""A start of the worker group that fails half-way gives back what it held. By Ray Train's own start; no Ray is started."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from diptych.pipelines.process_group import ProcessGroupConfig


class Room:
    """A placement group."""

    def __init__(self) -> None:
        self.held = True

    def shutdown(self) -> None:
        self.held = False


class HalfStarted(WorkerGroup):
    """As far as Ray's start comes without a cluster: room is held, workers are there, and the process group is formed next."""

    def __init__(self, room: Room, lost: Exception) -> None:
        self.room, self.lost = room, lost
        self._worker_group_state = None
        self._world_rank_to_ongoing_poll: dict[int, Any] = {}

    def _start_impl(self, builder: Any) -> None:
        builder.with_placement_group_handle(self.room)
        self._worker_group_state = object()
        config = ProcessGroupConfig(backend="gloo")
        try:
            config.backend_cls().on_start(self, config)
        except RayActorError as error:
            raise WorkerGroupStartupFailedError from error

    def execute_single(self, rank: int, fn: Any, *arguments: Any, **named: Any) -> Any:
        raise self.lost


@pytest.mark.parametrize("lost", [ActorDiedError(), RayTaskError("f", "", RuntimeError("Connection closed by peer"))])
def test_a_worker_lost_while_the_group_forms_frees_the_room_and_is_tried_again(lost: Exception) -> None:
    group = HalfStarted(room := Room(), lost)
    with pytest.raises(WorkerGroupStartupFailedError) as raised:
        group._start()
    assert not room.held
    assert not group.has_started()
    assert isinstance(raised.value, RETRYABLE_CONTROLLER_ERRORS)
    assert "Connection closed" in str(raised.value) or "memory runs out" in str(raised.value)


def test_neither_the_driver_nor_rays_controller_imports_torch() -> None:
    """What both import before the first worker starts; torch takes 1.5 s of a processor in each."""
    code = "import sys; from diptych.pipelines import ray_trainer, session, train; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
