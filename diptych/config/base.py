"""What every section of a configuration is made of, and how it complains. No torch, no Ray."""

from __future__ import annotations

import abc
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from diptych.batches import AspectBuckets, Needs


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

    @property
    def shape_buckets(self) -> AspectBuckets | None:
        """Shapes that the pictures of one batch may have; None = one shape for all."""
        return None

    def resolve(self, facts: dict[str, Any]) -> TaskConfig:
        """This section with what follows from the data filled in (an embedding's dimension); by default unchanged."""
        return self

    def check_data(self, facts: dict[str, Any]) -> None:
        """Refuse data that the task cannot use, before any Ray starts.

        `facts` describes the manifest and the embeddings: `samples`, `captions`, `images`, `image_dim`, `text_dim`.
        """


def comma_separated(value: Any) -> Any:
    """Text split at its commas, a single value as a tuple of one, anything else as it is: what stands before validation of a tuple."""
    if isinstance(value, str):
        return tuple(part for part in value.split(",") if part)
    return (value,) if isinstance(value, bool | int | float) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(comma_separated)]
"""Several paths; on the command line separated by commas."""
Integers = Annotated[tuple[int, ...], BeforeValidator(comma_separated)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(comma_separated)]
Flags = Annotated[tuple[bool, ...], BeforeValidator(comma_separated)]
"""Several of a kind, likewise."""
