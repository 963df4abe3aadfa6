"""`cluster.*` and `tracking.*`: what a run asks of Ray and of MLflow."""

from __future__ import annotations

import pydantic

from diptych.config.base import Config


class ClusterConfig(Config):
    """What the run asks of Ray."""

    address: str = ""
    """Ray address; empty = `RAY_ADDRESS`, else a local Ray of this machine."""
    cpus_per_worker: float = pydantic.Field(1.0, gt=0)
    """Logical CPUs of a training worker."""
    gpus_per_worker: float = pydantic.Field(0.0, ge=0)
    """GPUs of a training worker; above 0 it trains on CUDA."""
    data_cpus: int = pydantic.Field(2, ge=0)
    """Logical CPUs for reading and decoding, over all workers; 0 = each worker reads for itself, in `read_threads`."""
    read_threads: int = pydantic.Field(1, ge=1)
    """Threads in which a worker reads and decodes where `data_cpus` is 0; they share its interpreter."""
    logical_cpus: int = pydantic.Field(0, ge=0)
    """Logical CPUs that a local Ray declares; 0 = what the run needs, which may be more than the machine has."""
    autoscaling: bool = False
    """The cluster grows to what is asked for: wait for nodes instead of refusing."""
    max_failures: int = pydantic.Field(3, ge=0)
    """Times that a failed or lost worker or node is replaced before the run fails; a node taken back with notice counts under neither."""
    controller_failures: int = pydantic.Field(3, ge=0)
    """Times that a group of workers that cannot be started is tried again."""
    storage_retries: int = pydantic.Field(5, ge=0)
    """Repeated tries of one access to a remote run folder after a transient error, with exponential backoff."""
    start_timeout_seconds: float = pydantic.Field(300.0, gt=0)
    """A group of workers that is not up by then counts as a controller failure."""
    resize_seconds: float = pydantic.Field(60.0, gt=0)
    """Seconds between looks at the cluster for room to grow, for a range of workers."""
    storage: str = ""
    """Folder shared by all nodes for Ray's own files; empty = the run folder."""


class TrackingConfig(Config):
    """MLflow."""

    uri: str = ""
    """Tracking server or `sqlite:///…`; empty = `MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db` in the working folder."""
    experiment: str = ""
    """Experiment; empty = `diptych-<task>`."""
    enabled: bool = True
    """False keeps the run out of MLflow."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use of the driver's machine."""
    samples: int = pydantic.Field(16, ge=0)
    """Rows of the sample table that validation logs."""
