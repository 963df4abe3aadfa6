"""A sweep in MLflow: one parent run, whose children are the trials; each trial's run is `train.run`'s own.

MLflow is a copy of what stands in the sweep's folder, so a server that is away costs the copy and not the sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diptych.pipelines import tracking
from diptych.pipelines.sweep_record import Definition, TrialRecord

logger = logging.getLogger(__name__)

_ARTIFACTS = ("best.json", "table.csv", "sweep.html", "grid.jpg", "sweep.json", "trials.json")


class SweepTracker:
    """The parent run."""

    def __init__(self, definition: Definition, folder: Path, driver: dict[str, Any], facts: dict[str, Any]) -> None:
        """Make the parent, or reopen the one that `driver` knows; it carries the shared configuration, the space, and the data's digest."""
        self.definition, self.folder = definition, folder
        self._tracker = tracking.Tracker(definition.base, folder, driver["run_id"], facts, mark=driver["mark"])
        self.run_id, self.uri = self._tracker.run_id, self._tracker.uri
        self._done = 0
        if not driver["run_id"]:
            task, space = definition.base.task.name, definition.space
            tags = {"mlflow.source.name": f"diptych tune {task}", "diptych.sweep": space.method, "diptych.metric": definition.metric}
            tags |= {f"diptych.space/{key}": str(domain) for key, domain in space.parameters.items()}
            for key, value in tags.items():
                self._tracker.store.set_tag(self.run_id, key, value)

    def trial_changed(self, trial: TrialRecord) -> None:
        """Note in the parent what a trial reached, and in the trial what it searched with."""
        try:
            store = self._tracker.store
            self._done += 1
            if trial.last is not None:
                store.log_metric(self.run_id, f"trial/{self.definition.metric}", trial.last, step=self._done)
            if trial.run_id and trial.step:
                store.set_tag(trial.run_id, "diptych.trial", trial.name)
                for key, value in trial.parameters.items():
                    if isinstance(value, int | float):
                        store.log_metric(trial.run_id, f"searched/{key}", float(value), step=trial.step)
                for clone in trial.clones:
                    store.set_tag(
                        trial.run_id, f"diptych.generation_{clone['generation']}", f"from {clone['donor']} at step {clone['step']}"
                    )
        except Exception as error:
            logger.warning("MLflow does not answer (%s); the sweep goes on", tracking.explain(error, self.uri))

    def log_results(self, folder: Path, best: TrialRecord | None) -> None:
        """Copy table, plots, pictures and the best configuration to the parent."""
        try:
            for name in _ARTIFACTS:
                if (folder / name).is_file():
                    self._tracker.store.log_artifact(self.run_id, str(folder / name))
            if best is not None and best.value is not None:
                self._tracker.store.log_metric(self.run_id, f"best/{self.definition.metric}", best.value)
                self._tracker.store.set_tag(self.run_id, "diptych.best", best.name)
        except Exception as error:
            logger.warning("results not copied to MLflow (%s); they stand in %s", tracking.explain(error, self.uri), folder)

    def close(self, trials: Iterable[TrialRecord], status: str) -> None:
        """End the parent, and trials that wait for a generation that does not come."""
        for trial in trials:
            if trial.run_id and trial.status in ("paused", "waiting", "cloning", "running"):
                try:
                    self._tracker.store.set_terminated(trial.run_id, "KILLED")
                except Exception as error:
                    logger.warning("MLflow does not answer (%s)", tracking.explain(error, self.uri))
        self._tracker.end(tracking.mlflow_status(status))
