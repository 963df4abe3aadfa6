"""Configuration: frozen, typed, and addressed by dotted paths. No torch, no Ray.

A recipe returns a whole `RunConfig`; the command line, search spaces and tests change it through `KEY=VALUE` dotted
paths (`apply_overrides`). A field's documentation is the string under it, with its unit. Derived values are Python in
the recipe, not syntax in a file. Every complaint is a `ConfigError` that names the key, the value, what is allowed and
the remedy.
"""

from __future__ import annotations

import abc
import contextlib
import difflib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationInfo, field_validator, model_validator

from diptych.batches import Needs
from diptych.documentation import field_documentation
from diptych.redaction import without_secrets


class ConfigError(ValueError):
    """A call or a configuration that cannot be carried out; the command line ends with status 2."""

    def __init__(self, key: str, received: Any, allowed: str, remedy: str = "") -> None:
        self.key, self.received, self.allowed, self.remedy = key, received, allowed, remedy
        message = f"{key}: received {received!r}; allowed: {allowed}."
        super().__init__(f"{message} {remedy}".strip())

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.key, self.received, self.allowed, self.remedy))


class Config(BaseModel):
    """Base of every section: frozen, unknown keys refused, documented by the string under each field."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads true as 1, so that train.steps=true would train one step.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("a number, neither true nor false")
        return value


C = TypeVar("C", bound=Config)


class TaskConfig(Config, abc.ABC):
    """Base of a task's own section, `task.*`. Lives in `diptych/recipes/<task>.py` beside the task's recipes."""

    name: ClassVar[str]
    """The task, and the name of its module in `trainers/tasks`."""

    @abc.abstractmethod
    def needs(self) -> Needs:
        """The batch that the task takes."""

    def resolve(self, facts: dict[str, Any]) -> TaskConfig:
        """This section with what follows from the data filled in (an embedding's dimension); by default unchanged."""
        return self

    def check_data(self, facts: dict[str, Any]) -> None:
        """Refuse data that the task cannot use, before any Ray starts.

        `facts` describes the manifest and the embeddings: `samples`, `captions`, `images`, `image_dim`, `text_dim`.
        """


def _comma_separated(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part for part in value.split(",") if part)
    return (value,) if isinstance(value, bool | int | float) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_comma_separated)]
"""Several paths; on the command line separated by commas."""
Integers = Annotated[tuple[int, ...], BeforeValidator(_comma_separated)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_comma_separated)]
Flags = Annotated[tuple[bool, ...], BeforeValidator(_comma_separated)]
"""Several of a kind, likewise."""


class DataConfig(Config):
    """Where samples come from and how they stream."""

    shards: str = ""
    """Folder or URL of webdataset tars, or a brace pattern such as `s3://bucket/{00000..00099}.tar`."""
    manifest: str = ""
    """Folder of the manifest; empty = beside the shards, or in the working folder where those cannot be written."""
    keep: Paths = ()
    """Keep-lists (Parquet); a sample is used if all of them keep it."""
    embeddings: str = ""
    """Folder of precomputed embeddings, clip-retrieval's layout or the reordered one; `members` = `.npy` in the tars."""
    caches: Paths = ()
    """Folders that `diptych cache` wrote (latents, text states, image states), for tasks that read them instead of computing them."""
    validation_share: float = pydantic.Field(0.02, ge=0, lt=1)
    """Share of the samples held out for validation, chosen by hash of the key."""
    split_seed: int = 0
    """Seed of the validation split; it does not depend on the run's seed."""
    shuffle: bool = True
    """False streams in the manifest's order."""
    shuffle_chunk: int = pydantic.Field(32, ge=1)
    """Neighbouring samples that are moved together, in samples: larger reads more sequentially."""
    shuffle_group: int = pydantic.Field(8192, ge=1)
    """Samples that are shuffled among each other, in samples: larger mixes more."""
    fault_budget: int = pydantic.Field(100, ge=0)
    """Distinct bad samples that a run may replace before it stops."""
    read_retries: int = pydantic.Field(5, ge=0)
    """Repeated tries of one read after a transient error, with exponential backoff."""
    decoder: Literal["auto", "pil", "opencv"] = "auto"
    """JPEG decoder; `auto` is the fastest one installed. Both use a reduced DCT scale when the target is smaller."""
    block_megabytes: float = pydantic.Field(32.0, gt=0, le=96)
    """Upper bound of one worker's block of consecutive steps, in MB of decoded batch."""
    prefetch_blocks: int = pydantic.Field(2, ge=1)
    """Blocks that are read ahead, per worker."""
    trace: bool = False
    """Write `trace.parquet` (step, rank, slot, shard, key, attempt) to the run folder."""


class OptimConfig(Config):
    """The optimizer, its schedule, clipping and EMA."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices of hidden layers with AdamW for the rest, at the same rate (`train.strategy=ddp` only)."""
    lr: float = pydantic.Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[float, float], BeforeValidator(_comma_separated)] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = pydantic.Field(1e-8, gt=0)
    """Adam's epsilon."""
    eight_bit: bool = False
    """Moments in 8 bits (bitsandbytes, the extra `gpu`): a quarter of the memory. GPUs, AdamW and `train.strategy=ddp` only."""
    weight_decay: float = pydantic.Field(0.01, ge=0)
    """Decoupled decay of matrices; gains and biases are not decayed."""
    warmup_steps: int = pydantic.Field(0, ge=0)
    """Linear warm-up, in optimizer steps."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up, until `train.steps`."""
    min_lr: float = pydantic.Field(0.0, ge=0)
    """Where `cosine` and `linear` end."""
    clip_norm: float = pydantic.Field(0.0, ge=0)
    """Largest global gradient norm; 0 = no clipping."""
    ema_decay: float = pydantic.Field(0.0, ge=0, lt=1)
    """Decay of the averaged weights per step; 0 = none. Warmed up as min(decay, (1+t)/(10+t)), so short runs gain too."""


class TrainConfig(Config):
    """The loop."""

    steps: int = pydantic.Field(100, ge=1)
    """Optimizer steps of the whole run."""
    global_batch_size: int = pydantic.Field(32, ge=1)
    """Samples per optimizer step over all workers and micro-batches."""
    micro_batches: int = pydantic.Field(1, ge=1)
    """Micro-batches per worker and step (gradient accumulation)."""
    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = "ddp"
    """DDP, or DeepSpeed ZeRO stage 1, 2 or 3."""
    offload: bool = False
    """Keep the optimizer's state in host memory (ZeRO only)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` takes bf16 where the device multiplies it fast (CUDA ≥ 8.0, AMX), else fp32, and logs its choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """`torch.compile` the task."""
    deterministic: bool = False
    """Deterministic kernels, for bitwise equal GPU runs."""
    log_every: int = pydantic.Field(10, ge=1)
    """Steps between logged lines."""
    patience: int = pydantic.Field(0, ge=0)
    """Stop after this many validations without improvement of `monitor`; 0 = never."""
    monitor: str = "val/loss"
    """Metric for `patience` and for the best checkpoint."""
    monitor_mode: Literal["min", "max"] = "min"
    """Whether smaller or larger is better."""
    start_from: str = ""
    """A run folder, or `RUN/checkpoints/NAME`, whose weights, moments, averages and slot a new run begins with; seed, global batch
    and data must be its own, hyperparameters need not. `steps` counts the donor's too. Empty = begin afresh."""
    collective_timeout_seconds: float = pydantic.Field(600.0, gt=0)
    """A collective that hangs longer fails the attempt."""


class ValidationConfig(Config):
    """Validation in the loop."""

    every_steps: int = pydantic.Field(0, ge=0)
    """Optimizer steps between validations; 0 = only at the end."""
    samples: int = pydantic.Field(512, ge=0)
    """Held-out samples used each time, at most; 0 = no validation."""
    batch_size: int = pydantic.Field(0, ge=0)
    """Samples per validation batch over all workers; 0 = the global batch size."""


class CheckpointConfig(Config):
    """Checkpoints."""

    every_steps: int = pydantic.Field(0, ge=0)
    """Optimizer steps between checkpoints; 0 = only at the end."""
    keep: int = pydantic.Field(3, ge=1)
    """Newest checkpoints kept; the best one by `train.monitor` is kept beside them."""
    storage: str = ""
    """Folder or URL, such as `s3://bucket/runs`, for checkpoints, metrics and traces; empty = the run folder."""


class ClusterConfig(Config):
    """What the run asks of Ray."""

    address: str = ""
    """Ray address; empty = `RAY_ADDRESS`, else a local Ray of this machine."""
    cpus_per_worker: float = pydantic.Field(1.0, gt=0)
    """Logical CPUs of a training worker."""
    gpus_per_worker: float = pydantic.Field(0.0, ge=0)
    """GPUs of a training worker; above 0 it trains on CUDA."""
    data_cpus: int = pydantic.Field(2, ge=1)
    """Logical CPUs for reading and decoding, over all workers."""
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
        if self.train.offload and self.train.strategy == "ddp":
            raise ConfigError("train.offload", True, "false under train.strategy=ddp", "Set train.strategy=zero1, zero2 or zero3.")
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


def build(cls: type[C], data: dict[str, Any], prefix: str = "") -> C:
    """`cls(**data)`, with pydantic's complaints as one `ConfigError` on the first offending key."""
    try:
        return cls(**data)
    except pydantic.ValidationError as error:
        raise _explain(cls, error, prefix) from None


def apply_overrides(config: C, overrides: Iterable[str]) -> C:
    """Return `config` with each `dotted.key=value` applied, all at once if need be. Values are read as JSON where they parse, else as text."""
    changes: dict[str, str] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError("KEY=VALUE", override, "a dotted configuration key, '=', and a value", "Example: train.steps=200")
        changes[key.strip()] = text
    while changes:
        refused: dict[str, ConfigError] = {}
        for key, text in changes.items():
            try:
                config = _set_text(config, key, text)
            except ConfigError as error:
                refused[key] = error
        if len(refused) == len(changes):
            break
        # What was refused may be right beside what stood after it.
        changes = {key: changes[key] for key in refused}
    else:
        return config
    with contextlib.suppress(ConfigError, KeyError, AttributeError):
        return _set_together(config, {key: _parse(text) for key, text in changes.items()})
    raise next(iter(refused.values()))


def _set_together(config: C, changes: dict[str, Any]) -> C:
    """`config` with all of `changes` made at once, then validated: a model and its tokenizer are right only together."""
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    for name in {key.partition(".")[0] for key in changes}:
        inner = {key.partition(".")[2]: value for key, value in changes.items() if key.partition(".")[0] == name}
        fields[name] = _set_together(fields[name], inner) if isinstance(fields[name], Config) else inner[""]
    return build(type(config), fields)


def _set_text(config: C, key: str, text: str) -> C:
    parsed = _parse(text)
    try:
        return set_path(config, key, parsed)
    except ConfigError as error:
        if isinstance(parsed, str):
            raise
        # Text that also reads as JSON, such as a run called 2024, is text where only text is allowed.
        try:
            return set_path(config, key, text)
        except ConfigError:
            raise error from None


def set_path(config: C, key: str, value: Any) -> C:
    """Return `config` with the field at the dotted path `key` set to `value`, validated again up to the root."""
    path = key.split(".")
    chain: list[Config] = [config]
    for name in path[:-1]:
        inner = getattr(chain[-1], name, None) if name in type(chain[-1]).model_fields else None
        if not isinstance(inner, Config):
            raise _unknown_key(config, key, value)
        chain.append(inner)
    if path[-1] not in type(chain[-1]).model_fields:
        raise _unknown_key(config, key, value)
    if isinstance(getattr(chain[-1], path[-1]), Config):
        raise ConfigError(key, value, f"one of its keys: {', '.join(type(getattr(chain[-1], path[-1])).model_fields)}")
    new: Any = value
    for depth in range(len(path) - 1, -1, -1):
        owner = chain[depth]
        fields = {name: getattr(owner, name) for name in type(owner).model_fields} | {path[depth]: new}
        new = build(type(owner), fields, ".".join(path[:depth]))
    return new


def get_path(config: Config, key: str) -> Any:
    """The value at the dotted path `key`; `ConfigError` with the nearest key if there is none."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Config) or name not in type(value).model_fields:
            raise _unknown_key(config, key)
        value = getattr(value, name)
    return value


def dotted_keys(config: Config, prefix: str = "") -> dict[str, Any]:
    """Every leaf of `config` as dotted key → value, in the order of the fields."""
    leaves: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        leaves |= dotted_keys(value, f"{prefix}{name}.") if isinstance(value, Config) else {f"{prefix}{name}": value}
    return leaves


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _unknown_key(config: Config, key: str, received: Any = "no value") -> ConfigError:
    known = list(dotted_keys(config))
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    near = near or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    remedy = f"Did you mean {' or '.join(near)}?" if near else "`diptych recipes NAME` lists the keys."
    section = key.rpartition(".")[0]
    inside = [name for name in known if name.rpartition(".")[0] == section]
    return ConfigError(key, received, f"an existing key, such as {', '.join((inside or list(type(config).model_fields))[:8])}, …", remedy)


def _explain(cls: type[Config], error: pydantic.ValidationError, prefix: str) -> ConfigError:
    first = error.errors()[0]
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    key = ".".join([prefix] * bool(prefix) + [str(part) for part in first["loc"]])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), list(cls.model_fields), n=2, cutoff=0.5)
        return ConfigError(key, first["input"], "no such key", f"Did you mean {' or '.join(near)}?" if near else "")
    name = str(first["loc"][0]) if first["loc"] else ""
    field = cls.model_fields.get(name)
    received = first["input"]
    allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    choices = get_args(field.annotation) if field is not None and str(field.annotation).startswith("typing.Literal") else ()
    remedy = field_documentation(cls, name)
    if choices and isinstance(received, str):
        near = difflib.get_close_matches(received, [str(choice) for choice in choices], n=1, cutoff=0.4)
        allowed, remedy = ", ".join(map(str, choices)), (f"Did you mean {near[0]}?" if near else remedy)
    return ConfigError(key, received, allowed, remedy)


def _task_module(name: str) -> Any:
    from diptych import recipes

    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        raise ConfigError("TASK", name, ", ".join(names), f"Did you mean {near[0]}?" if near else "")
    return importlib.import_module(f"{recipes.__name__}.{name}")


def task_names() -> list[str]:
    """Every task that ships with recipes, by discovery."""
    from diptych import recipes

    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__) if not module.name.startswith("_"))


def task_config_class(name: str) -> type[TaskConfig]:
    """The configuration class of the task `name`."""
    module = _task_module(name)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, TaskConfig) and value.__module__ == module.__name__
    ]
    assert len(classes) == 1, f"{module.__name__} must define one TaskConfig, found {classes}"
    return classes[0]


def recipes_of(name: str) -> dict[str, Callable[[], RunConfig]]:
    """Every recipe of the task `name`: the public functions of its recipe module."""
    module = _task_module(name)
    return {
        key: value
        for key, value in vars(module).items()
        if callable(value) and not isinstance(value, type) and not key.startswith("_") and value.__module__ == module.__name__
    }


def load_recipe(task: str, recipe: str) -> RunConfig:
    """The configuration that the recipe returns; `ConfigError` with the nearest name if there is none."""
    recipes = recipes_of(task)
    if recipe not in recipes:
        near = difflib.get_close_matches(recipe, recipes, n=1, cutoff=0.4)
        raise ConfigError("--recipe", recipe, ", ".join(recipes), f"Did you mean {near[0]}?" if near else "")
    return recipes[recipe]()


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
