"""Where a run stands beyond its tensors: steps done, the best validation so far, faults already counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from diptych.batches import Fault
from diptych.config import ConfigError, RunConfig
from diptych.trainers.world import World


class FaultBudgetExceeded(RuntimeError):  # noqa: N818 - the ledger's own word
    """More distinct bad samples than `data.fault_budget` allows."""


@dataclass
class Progress:
    """Stored in every checkpoint's `state.json`; the same on every worker."""

    step: int = 0
    """Optimizer steps done."""
    best_value: float | None = None
    """Best value of `train.monitor` so far."""
    best_step: int = -1
    """Steps done when it was reached."""
    saved_value: float | None = None
    """Best value among the steps that were validated and checkpointed."""
    saved_name: str | None = None
    """The checkpoint that holds it; retention spares it."""
    stale: int = 0
    """Validations since then."""
    last_value: float | None = None
    """Value of `train.monitor` at the last validation."""
    last_step: int = -1
    """Steps done then."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """Distinct (shard, key) of bad samples met, sorted."""

    def to_state(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """Read back from `state.json`, which holds other keys too."""
        values = {name: state[name] for name in cls.__dataclass_fields__}
        return cls(**values | {"faults": [(shard, key) for shard, key in state["faults"]]})

    def judge(self, config: RunConfig, metrics: dict[str, float]) -> bool:
        """Take a validation into account; True if `train.monitor` improved."""
        key = config.train.monitor
        if key not in metrics:
            raise ConfigError("train.monitor", key, "a figure of validation: " + ", ".join(sorted(metrics)))
        self.last_value, self.last_step = metrics[key], self.step
        better = _improves(config, metrics[key], self.best_value)
        if better:
            self.best_value, self.best_step, self.stale = metrics[key], self.step, 0
        else:
            self.stale += 1
        return better

    def saving(self, config: RunConfig, name: str) -> str | None:
        """A checkpoint `name` is about to be written; the name of the best one, which may be this."""
        if self.last_step == self.step and self.last_value is not None and _improves(config, self.last_value, self.saved_value):
            self.saved_value, self.saved_name = self.last_value, name
        return self.saved_name

    def exhausted(self, config: RunConfig) -> bool:
        """Whether early stopping has run out of patience."""
        return 0 < config.train.patience <= self.stale

    def count_faults(self, world: World, faults: list[Fault], budget: int) -> None:
        """Agree on the distinct bad samples of all workers; raises `FaultBudgetExceeded` on every worker at once.

        Called by all workers when any of them met a fault.
        """
        found = {(fault.shard, fault.key) for part in world.gather_objects(faults) for fault in part}
        self.faults = sorted(set(self.faults) | found)
        if len(self.faults) > budget:
            shown = ", ".join(f"{shard}/{key}" for shard, key in sorted(found)[:3])
            raise FaultBudgetExceeded(
                f"data.fault_budget: {len(self.faults)} distinct bad samples by step {self.step}, allowed {budget}; the last ones are {shown}. "
                "`diptych index` lists the faults of the shards; repair them, or raise data.fault_budget."
            )


def _improves(config: RunConfig, value: float, best: float | None) -> bool:
    return best is None or (value < best if config.train.monitor_mode == "min" else value > best)
