"""What of a sweep stands on disk: its definition, its trials, and what they reported. JSON alone, replaced or appended whole.

```
runs/<sweep>/
  sweep.json          what is searched, on what, compared by what; written once
  trials.json         every trial: parameters, status, where it stands; replaced at each change
  reports.jsonl       a line per value that ASHA judged
  driver.json         the process that drives it and its MLflow run, as for a run
  inputs/             what the trials share
  t000/ t001/ …       the trials, ordinary run folders
  best.json           the best trial's configuration; `train --config` takes it
  table.csv sweep.html grid.jpg
```
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diptych.config import RunConfig, build, set_path
from diptych.pipelines import runs_folder
from diptych.tune_spaces import Space

ENDED = frozenset({"finished", "early_stopped", "pruned", "failed", "refused"})
"""Statuses of trials that are not taken up again."""


@dataclass(frozen=True)
class Definition:
    """What a sweep is. It does not change once it has begun, budgets and places aside."""

    name: str
    space: Space
    base: RunConfig
    """The configuration that every trial shares, with the sweep's own `name` and `output`."""
    metric: str
    mode: str
    interval: int
    """Steps to the first rung, or of a generation; 0 for the other methods."""

    def config_of(self, parameters: dict[str, Any]) -> RunConfig:
        """The configuration with a trial's parameters in it."""
        config = self.base
        for key, value in parameters.items():
            config = set_path(config, key, value)
        return config

    def to_json(self) -> str:
        """As text that `from_json` reads, without credentials in URLs."""
        plain = {"name": self.name, "metric": self.metric, "mode": self.mode, "interval": self.interval}
        return json.dumps(
            plain | {"space": self.space.model_dump(mode="json"), "base": json.loads(self.base.to_json(public=True))}, indent=2
        )

    @classmethod
    def from_json(cls, text: str) -> Definition:
        """Read `sweep.json`."""
        data = json.loads(text)
        space, base = build(Space, data.pop("space")), RunConfig.from_json(json.dumps(data.pop("base")))
        return cls(space=space, base=base, **data)


@dataclass
class TrialRecord:
    """A trial as the sweep knows it; what it learned stands in its run folder."""

    name: str
    parameters: dict[str, Any]
    status: str = "waiting"
    """`waiting`, `running`, `cloning` (its donor's checkpoint is being copied), `paused` (between generations), `stopped`, or one of `ENDED`."""
    step: int = 0
    samples: int = 0
    """Trained on in all, in generations that were thrown away too."""
    value: float | None = None
    """Best value of the metric so far."""
    best_step: int = 0
    last: float | None = None
    """Its newest value."""
    run_id: str = ""
    error: str = ""
    generation: int = 0
    donor: str = ""
    """Checkpoint to be copied, while `cloning`."""
    clones: list[dict[str, Any]] = field(default_factory=list)
    """`{generation, step, donor, parameters}` for each time that it cloned another."""


class SweepFolder:
    """The folder of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials: list[TrialRecord] = []
        self.seconds = 0.0
        """Spent by all drivers so far."""

    @property
    def begun(self) -> bool:
        """Whether a sweep stands here already."""
        return (self.path / "sweep.json").is_file()

    def begin(self, definition: Definition) -> None:
        """Write the definition of a new sweep."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._replace("sweep.json", definition.to_json())

    def read(self) -> Definition:
        """Open the sweep that stands here."""
        if (self.path / "trials.json").is_file():
            state = json.loads((self.path / "trials.json").read_text())
            self.trials, self.seconds = [TrialRecord(**each) for each in state["trials"]], state["seconds"]
        return Definition.from_json((self.path / "sweep.json").read_text())

    def save(self) -> None:
        """Bring the trials to disk."""
        self._replace("trials.json", json.dumps({"seconds": self.seconds, "trials": [asdict(trial) for trial in self.trials]}, indent=1))

    def _replace(self, name: str, text: str) -> None:
        runs_folder.replace_text(self.path / name, text)

    def report(self, name: str, step: int, value: float, go_on: bool) -> None:
        """Append a judged value."""
        with (self.path / "reports.jsonl").open("a") as file:
            file.write(json.dumps({"trial": name, "step": step, "value": value, "go_on": go_on}) + "\n")

    def reports(self) -> list[dict[str, Any]]:
        """Every judged value, oldest first; a line that a killed driver left torn is passed over."""
        file = self.path / "reports.jsonl"
        found = []
        for line in file.read_text().splitlines() if file.is_file() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def run_dir(self, name: str) -> Path:
        """The run folder of a trial."""
        return self.path / name

    def add(self, parameters: dict[str, Any]) -> TrialRecord:
        """A new trial."""
        self.trials.append(TrialRecord(f"t{len(self.trials):03d}", parameters))
        return self.trials[-1]


def values_of(run_dir: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every finite value of `metric` that a run logged."""
    from diptych.trainers.journal import read_metrics

    lines = read_metrics(runs_folder.records(run_dir)) if run_dir.is_dir() else []
    return [(line["step"], line["metrics"][metric]) for line in lines if math.isfinite(line["metrics"].get(metric, math.nan))]


def best_of(values: list[tuple[int, float]], mode: str) -> tuple[int, float] | None:
    """The (step, value) that is best, the first of equals."""
    if not values:
        return None
    return (min if mode == "min" else max)(values, key=lambda pair: pair[1])


def ranked(trials: list[TrialRecord], mode: str) -> list[TrialRecord]:
    """Trials with a value, best first; failed ones do not count, whatever they reached before."""
    known = [trial for trial in trials if trial.value is not None and trial.status not in ("failed", "refused")]
    return sorted(known, key=lambda trial: (trial.value or 0.0) * (1 if mode == "min" else -1))
