"""What a local Ray is told before it is imported, because it reads some settings only once. No Ray is started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ASK = "from ray._private import ray_constants; print(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)"


def shipped_under_uv_run(code: str, **environment: str) -> bool:
    """Whether a driver under `uv run` would make Ray rebuild the environment for its workers, after `code`."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_ADDRESS")}
    command = [sys.executable, "-c", f"from diptych.pipelines import ray_context\n{code}\n{ASK}"]
    answer = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120, check=True)
    return answer.stdout.strip() == "True"


IS_UP = "from diptych.config import load_recipe; ray_context.is_up(load_recipe('coca', 'smoke'))"


@pytest.mark.parametrize("code", ["ray_context.local_gpus()", "ray_context._import_ray(local=True)", IS_UP])
def test_a_local_ray_ships_no_environment(code: str) -> None:
    assert not shipped_under_uv_run(code)


def test_the_user_may_decide_otherwise() -> None:
    assert shipped_under_uv_run("ray_context._import_ray(local=True)", RAY_ENABLE_UV_RUN_RUNTIME_ENV="1")
    assert shipped_under_uv_run("ray_context._import_ray(local=False)"), "on a cluster its operator decides"
