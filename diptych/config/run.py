"""`RunConfig`: one training run, whole, as it is stored and read back."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny, ValidationInfo, field_validator, model_validator

from diptych.config.base import Config, ConfigError, TaskConfig
from diptych.config.cluster import ClusterConfig, TrackingConfig
from diptych.config.data import DataConfig
from diptych.config.keys import build
from diptych.config.tasks import task_config_class
from diptych.config.training import CheckpointConfig, OptimConfig, TrainConfig, ValidationConfig
from diptych.redaction import without_secrets


class RunConfig(Config):
    """One training run, whole. `diptych train TASK` resolves it and stores it in the run folder as `config.json`."""

    task: SerializeAsAny[TaskConfig]
    """The task's own section."""
    name: str = ""
    """Run name = folder under `output`; empty = task, date and time. An unfinished run of that name is resumed."""
    output: str = "runs"
    """Folder for run folders; on a cluster, one that all nodes share. Checkpoints may go to an object store: `checkpoint.storage`."""
    seed: int = 0
    """Seed of weights, order and all counted randomness."""
    workers: int | str = 1
    """Training workers; `2..8` = as many of 2 to 8 as the cluster has room for, growing and shrinking with it."""
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("task", mode="before")
    @classmethod
    def _load_task(cls, value: Any, info: ValidationInfo) -> Any:
        # A stored configuration names its task, so that the right section class reads it back.
        if isinstance(value, dict) and "name" in value:
            fields = {key: item for key, item in value.items() if key != "name"}
            return task_config_class(value["name"])(**fields)
        return value

    @field_validator("workers", mode="before")
    @classmethod
    def _read_workers(cls, value: Any) -> Any:
        first, dots, last = value.partition("..") if isinstance(value, str) else (value, "", "")
        try:
            least, most = int(first), int(last or first)
        except (TypeError, ValueError):
            least, most = 0, 0
        if isinstance(value, bool) or (isinstance(value, float) and value != least) or not 1 <= least <= most or bool(dots) != bool(last):
            raise ValueError("a whole number from 1 on, or a range such as 2..8")
        return least if least == most else f"{least}..{most}"

    @property
    def least_workers(self) -> int:
        """Workers without which the run does not start."""
        return int(str(self.workers).partition("..")[0])

    @property
    def most_workers(self) -> int:
        """Workers that the run takes at most; more than `least_workers` if it is elastic."""
        return int(str(self.workers).rpartition("..")[2])

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.train.micro_batches > self.train.global_batch_size:
            raise ConfigError(
                "train.micro_batches", self.train.micro_batches, f"at most train.global_batch_size = {self.train.global_batch_size}"
            )
        if self.cluster.read_threads > 1 and self.cluster.data_cpus:
            raise ConfigError(
                "cluster.read_threads",
                self.cluster.read_threads,
                f"1 where read tasks read (cluster.data_cpus = {self.cluster.data_cpus})",
                "Set cluster.data_cpus=0 for workers that read for themselves, or raise cluster.data_cpus.",
            )
        if self.train.offload and self.train.strategy == "ddp":
            raise ConfigError("train.offload", True, "false under train.strategy=ddp", "Set train.strategy=zero1, zero2 or zero3.")
        if self.task.shape_buckets and self.train.strategy in ("zero2", "zero3") and self.most_workers > 1:
            raise ConfigError(
                "train.strategy",
                self.train.strategy,
                "ddp or zero1 where several workers train on aspect buckets",
                "Workers have different numbers of micro-batches then, and ZeRO 2 and 3 communicate in each.",
            )
        return self

    def to_json(self, public: bool = False) -> str:
        """The configuration as text that `from_json` reads back to an equal one; `public`, for storing, without credentials in URLs."""
        data = self.model_dump(mode="json")
        data["task"] = {"name": self.task.name} | data["task"]
        return json.dumps(without_secrets(data) if public else data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Read a stored configuration; raises `ConfigError` on unknown keys or wrong values."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError("--config", str(error), "a JSON object") from None
        return build(cls, data)


def load_config_file(path: str, say: Callable[[str], None] = print) -> RunConfig:
    """Read a configuration that a run stored or `tune` wrote, or one of DALLE2-pytorch, whose changes of meaning go to `say`."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError("--config", path, "a JSON file that a run stored as config.json", "Check the path.")
    foreign = importlib.import_module("diptych.recipes._dalle2_json")
    translated = foreign.translate_text(file.read_text())
    if translated is None:
        return RunConfig.from_json(file.read_text())
    for remark in translated.remarks:
        say(remark)
    config: RunConfig = translated.config
    return config
