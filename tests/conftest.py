"""Environment and markers of the whole suite. No Ray here: units need none, and integration tests share one of their own.

The environment is set before any test module imports torch or Ray, because both read it once.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support_cluster import ray_variables

# A loaded machine is no fault of the property; in CI the examples are the same each time, so that a red run can be repeated.
settings.register_profile("diptych", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ)
settings.load_profile("diptych")
os.environ.update(
    {
        # Small models on few cores: one thread each is faster, and sums keep one order.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        # Train's report() waits for its controller's poll; 2 s by default.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        # No test may reach a network beyond loopback: what is not in the tree or the environment is a fault of the test.
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "NO_COLOR": "1",
        "COLUMNS": "160",
    }
    | ray_variables()
)
# A shell lets its background jobs ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# What a user's shell may hold must not send a test's runs to their server or cluster.
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
    os.environ.pop(name, None)

_NEEDS = {
    "gpu": (Path("/dev/nvidia0").exists, "no NVIDIA GPU"),
    "compiler": (lambda: bool(shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")), "no C++ compiler"),
    "browser": (
        lambda: bool(shutil.which("chromedriver") and any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))),
        "no Chromium with its driver",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason in the closing summary, what this machine lacks."""
    missing = {marker: reason for marker, (present, reason) in _NEEDS.items() if not present()}
    for item in items:
        for marker, reason in missing.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data(repository: Path) -> Path:
    """The real data beside the checkout; the test is skipped aloud where it is absent."""
    folder = repository.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    return folder
