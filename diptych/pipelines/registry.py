"""Exports in MLflow's model registry: a version of a named model per export, with the run that it comes from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from diptych.config import ConfigError
from diptych.pipelines import tracking
from diptych.pipelines.runs_folder import read_driver


def tracked(run_dir: Path) -> dict[str, Any]:
    """What the driver recorded of a run that MLflow knows; `ConfigError` for one that it does not."""
    driver = read_driver(run_dir)
    if not driver.get("run_id"):
        raise ConfigError(
            "--register", str(run_dir), "a run that was tracked in MLflow", "This one was trained with tracking.enabled=false."
        )
    return driver


def register(run_dir: Path, folder: Path, name: str, checkpoint: str) -> int:
    """Register the export in `folder` as the next version of the model `name`; returns the version.

    `mlflow.pyfunc.load_model("models:/NAME/VERSION")` opens it again. The run's own status stays as it is.
    """
    import logging

    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException

    driver = tracked(run_dir)
    store, run_id = tracking.client(driver["uri"]), driver["run_id"]
    # It would pin this environment's packages by importing the model once; the card says what is needed.
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)
    target = f"models/{name}-{checkpoint}"
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary) / "model"
        code = str(Path(__file__).with_name("registered_model.py"))
        mlflow.pyfunc.save_model(local, python_model=code, artifacts={"export": str(folder)}, pip_requirements=_requirements())
        store.log_artifacts(run_id, str(local), target)
    try:
        store.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise ConfigError("--register", name, "a name that MLflow takes for a model", str(error)) from None
    source = f"{store.get_run(run_id).info.artifact_uri}/{target}"
    tags = {"diptych.checkpoint": checkpoint, tracking.TAG_DIGEST: driver["digest"]}
    return int(store.create_model_version(name, source=source, run_id=run_id, tags=tags).version)


def _requirements() -> list[str]:
    from importlib.metadata import version

    return [f"{package}=={version(package)}" for package in ("mlflow", "torch", "transformers")]
