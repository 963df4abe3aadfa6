"""Which helpers of Ray Train a run gets, and when it may import them. No Ray is started."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR

from diptych.config import load_recipe
from diptych.pipelines import ray_context, ray_trainer, train


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Ray would have been asked for: the callbacks' classes, and the watcher's variable."""
    found: dict[str, Any] = {}

    def fit(self: ray_trainer._Trainer) -> None:
        found["callbacks"] = {type(callback) for callback in self._create_default_callbacks()}
        found["watcher"] = os.environ.get(ENABLE_PREEMPTION_WATCHER_ENV_VAR)

    monkeypatch.setattr(ray_trainer._Trainer, "fit", fit)
    monkeypatch.setattr(ray_trainer, "get_or_create_autoscaling_coordinator", lambda: found.setdefault("coordinator", True))
    monkeypatch.delenv(ENABLE_PREEMPTION_WATCHER_ENV_VAR, raising=False)
    # `fit` leaves these to the driver's process, which this one is not.
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    return found


@pytest.mark.parametrize("outlived", [True, False])
def test_helpers_that_a_run_has_no_use_for_stay_away(seen: dict[str, Any], tmp_path: Path, outlived: bool) -> None:
    ray_trainer.fit(load_recipe("coca", "smoke"), {}, tmp_path, outlived)
    assert seen["coordinator"], "asked for before the controller starts"
    assert DatasetsCallback not in seen["callbacks"]
    assert (PlacementGroupCleanerCallback in seen["callbacks"]) == outlived
    assert seen["watcher"] == (None if outlived else "0")
    assert ENABLE_PREEMPTION_WATCHER_ENV_VAR not in os.environ


def test_the_user_may_ask_for_the_watcher(seen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENABLE_PREEMPTION_WATCHER_ENV_VAR, "1")
    ray_trainer.fit(load_recipe("coca", "smoke"), {}, tmp_path, outlived=False)
    assert seen["watcher"] == os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] == "1"


def test_ray_is_imported_with_its_settings_before_a_thread_imports_more_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reads them once; a thread that was first would have a local Ray ship the environment under `uv run`."""
    order: list[str] = []

    def up(_: Any) -> bool:
        order.append("settings")
        return False

    def beside(_: Any) -> Future[None]:
        order.append("thread")
        return Future()

    def session(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_context, "is_up", up)
    monkeypatch.setattr(train, "_beside", beside)
    monkeypatch.setattr(ray_context, "ray_session", session)
    prepared: Any = SimpleNamespace(config=load_recipe("coca", "smoke"))
    with pytest.raises(KeyboardInterrupt):
        train._train(prepared, Path(), Future(), None)
    assert order == ["settings", "thread"]


def test_what_is_made_beside_arrives_or_raises() -> None:
    assert train._beside(lambda: 3).result(10) == 3
    with pytest.raises(ZeroDivisionError):
        train._beside(lambda: 1 // 0).result(10)
