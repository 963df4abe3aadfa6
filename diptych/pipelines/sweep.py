"""Driving a sweep: which trial runs when, what becomes of it, and where it stands if the driver dies.

A trial is `train.run` in a thread of this process: one way to train, one way to resume, and no Ray actor per trial that would hold a
CPU and memory for waiting. Everything that a decision rests on is on disk before it is acted upon, so the next driver decides the same.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diptych.config import ConfigError, RunConfig, set_path
from diptych.pipelines import runs_folder, train
from diptych.pipelines.console import note
from diptych.pipelines.prepare import Inputs
from diptych.pipelines.sweep_population import next_generation
from diptych.pipelines.sweep_record import ENDED, Definition, SweepFolder, TrialRecord, best_of, values_of
from diptych.pipelines.sweep_search import Halving, OptunaSuggestions, rungs_of
from diptych.pipelines.trial import Trial, verdict_file, write_verdict

_POLL_SECONDS = 0.1
_LOOK_SECONDS, _REMOTE_LOOK_SECONDS = 0.2, 10.0
"""Between looks into the trials' metrics; a listing of an object store costs money."""


@dataclass(frozen=True)
class Budget:
    """When a sweep is over; 0 = no bound."""

    trials: int
    """Trials in all, the population under `pbt`."""
    samples: int = 0
    """Samples trained on, over all trials."""
    seconds: float = 0.0
    """Over all drivers."""


class Sweep:
    """One sweep, driven by this process."""

    def __init__(
        self,
        definition: Definition,
        folder: SweepFolder,
        inputs: Inputs,
        budget: Budget,
        places: int,
        on_change: Callable[[TrialRecord], None],
        parent_run_id: str | None,
        digest: str,
    ) -> None:
        """`places`: trials at once. `on_change` is told of every trial that has ended or paused."""
        self.definition, self.folder, self.inputs, self.budget, self.places = definition, folder, inputs, budget, places
        self.parent_run_id, self.digest, self.on_change = parent_run_id, digest, on_change
        self.reason = ""
        """Why it ended before its trials did; empty = it did not."""
        self._began: dict[str, int] = {}
        self._outcomes: queue.Queue[tuple[TrialRecord, dict[str, Any]]] = queue.Queue()
        self._since = time.monotonic()
        self._look_at = 0.0
        space = definition.space
        steps = max(definition.config_of(trial.parameters).train.steps for trial in folder.trials) if folder.trials else 0
        rungs = rungs_of(definition.interval, space.reduction, steps) if space.method == "asha" else ()
        self._halving = Halving(rungs, space.reduction, steps, definition.mode) if rungs else None
        self._optuna = self._suggestions() if space.method == "optuna" else None
        self._recover()

    def run(self) -> None:
        """Run trials until all have ended or the budget is spent."""
        while True:
            self._collect()
            if self._due():
                self._judge()
                self._close_if_over()
            self._touch_stops()
            self._turn()
            while not self.reason and len(self._began) < self.places and (trial := self._next()):
                self._start(trial)
            if not self._began:
                break
            time.sleep(_POLL_SECONDS)
        self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        self.folder.seconds += now - self._since
        self._since = now
        self.folder.save()

    # What an earlier driver left.

    def _recover(self) -> None:
        for trial in self.folder.trials:
            if trial.status in ENDED or trial.status in ("paused", "cloning"):
                continue
            known = runs_folder.read_driver(self.folder.run_dir(trial.name))
            trial.run_id = known.get("run_id", trial.run_id)
            trial.status = known["status"] if trial.status == "running" and known.get("status") in {*ENDED, "paused"} else "waiting"
            self._note_values(trial)
        for report in self.folder.reports() if self._halving else []:
            assert self._halving is not None
            self._halving.reached(report["trial"], report["step"], report["value"])
        for trial in self.folder.trials:
            if trial.status == "cloning":
                self._clone(trial)
        self._tick()

    def _suggestions(self) -> OptunaSuggestions:
        known = [
            (trial.parameters, trial.value if trial.status != "failed" else None) for trial in self.folder.trials if trial.status in ENDED
        ]
        return OptunaSuggestions(self.definition.space, self.definition.metric, self.definition.mode, self.definition.base.seed, known)

    # Starting.

    def _next(self) -> TrialRecord | None:
        waiting = next((trial for trial in self.folder.trials if trial.status == "waiting"), None)
        if waiting is None and self._optuna is not None and len(self.folder.trials) < self.budget.trials:
            waiting = self.folder.add(self._optuna.suggest(f"t{len(self.folder.trials):03d}"))
        return waiting

    def _config(self, trial: TrialRecord) -> RunConfig:
        config = self.definition.config_of(trial.parameters)
        if config.checkpoint.storage:
            # Trials of all sweeps have the same names.
            config = set_path(config, "checkpoint.storage", f"{config.checkpoint.storage.rstrip('/')}/{self.definition.name}")
        return set_path(set_path(config, "name", trial.name), "output", str(self.folder.path))

    def _start(self, trial: TrialRecord) -> None:
        try:
            config = self._config(trial)
        except ConfigError as error:
            self._ended(trial, {"status": "refused", "error": str(error)})
            return
        run_dir, until = self.folder.run_dir(trial.name), 0
        reached = int(runs_folder.latest_state(run_dir).get("step", 0)) if run_dir.is_dir() else 0
        if self.definition.space.method == "pbt" and (trial.generation + 1) * self.definition.interval < config.train.steps:
            until = (trial.generation + 1) * self.definition.interval
        self._began[trial.name] = reached
        if until and reached >= until:
            self._ended(trial, {"status": "paused", "step": reached, "run_id": trial.run_id})
            return
        rungs = tuple(rung for rung in self._halving.rungs if rung < config.train.steps) if self._halving else ()
        steered = Trial(
            until, rungs, self.inputs, frozenset(self.definition.space.parameters) if until or trial.generation else frozenset()
        )
        trial.status = "running"
        self.folder.save()
        note(f"{trial.name} starts{f' at step {reached}' if reached else ''} · {_words(trial)}")
        if rungs:
            for report in self.folder.reports():
                if report["trial"] == trial.name:
                    run_dir.mkdir(exist_ok=True)
                    write_verdict(run_dir, report["step"], report["go_on"])
        threading.Thread(target=self._train, args=(trial, config, steered), name=trial.name, daemon=True).start()

    def _train(self, trial: TrialRecord, config: RunConfig, steered: Trial) -> None:
        result: dict[str, Any]
        try:
            result = train.run(config, self.parent_run_id, steered)
        except ConfigError as error:
            result = {"status": "refused", "error": str(error)}
        except BaseException as error:  # One trial's failure is not the sweep's.
            result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        self._outcomes.put((trial, result))

    # Ending.

    def _collect(self) -> None:
        while not self._outcomes.empty():
            self._ended(*self._outcomes.get())

    def _ended(self, trial: TrialRecord, result: dict[str, Any]) -> None:
        began = self._began.pop(trial.name, trial.step)
        trial.status, trial.error = result["status"], result.get("error", "")
        trial.run_id = result.get("run_id", "") or runs_folder.read_driver(self.folder.run_dir(trial.name)).get("run_id", trial.run_id)
        trial.step = began
        self._note_values(trial)
        self._tick()
        if self._optuna is not None and trial.status in ENDED:
            self._optuna.ended(trial.name, trial.value if trial.status not in ("failed", "refused") else None)
        last = f" · {self.definition.metric} {trial.last:.5g}" if trial.last is not None else ""
        note(f"{trial.name} {trial.status} at step {trial.step}{last} · {_words(trial)}" + (f" · {trial.error}" if trial.error else ""))
        self.on_change(trial)

    def _note_values(self, trial: TrialRecord) -> None:
        """Read from its run folder where a trial stands, and count the samples since it was known to stand at `trial.step`."""
        values = values_of(self.folder.run_dir(trial.name), self.definition.metric)
        best = best_of(values, self.definition.mode)
        if best is not None:
            # A member of a population may have lost the weights of its best value to a donor's.
            (trial.best_step, trial.value), trial.last = values[-1] if self.definition.space.method == "pbt" else best, values[-1][1]
        run_dir = self.folder.run_dir(trial.name)
        began, trial.step = trial.step, int(runs_folder.latest_state(run_dir).get("step", 0)) if run_dir.is_dir() else 0
        trial.samples += max(0, trial.step - began) * self._batch(trial)

    def _batch(self, trial: TrialRecord) -> int:
        return int(trial.parameters.get("train.global_batch_size", self.definition.base.train.global_batch_size))

    def _due(self) -> bool:
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + (_REMOTE_LOOK_SECONDS if "://" in self.definition.base.checkpoint.storage else _LOOK_SECONDS)
        return True

    def _close_if_over(self) -> None:
        if not self.reason:
            self.reason = self._over()
            if self.reason:
                note(f"{self.reason}: running trials write a checkpoint and stop")

    def _touch_stops(self) -> None:
        """Again and again: a trial that is just starting removes what an earlier stop left."""
        for name in self._began if self.reason else ():
            run_dir = self.folder.run_dir(name)
            if run_dir.is_dir():
                (run_dir / "stop").touch()

    def _over(self) -> str:
        if (self.folder.path / "stop").exists():
            return "asked to stop"
        if self.budget.seconds and self.folder.seconds + time.monotonic() - self._since > self.budget.seconds:
            return f"budget of {self.budget.seconds:g} seconds spent"
        if self.budget.samples and self._samples() >= self.budget.samples:
            return f"budget of {self.budget.samples:,} samples spent"
        return ""

    def _samples(self) -> int:
        done = sum(trial.samples for trial in self.folder.trials)
        for trial in self.folder.trials:
            if trial.name in self._began:
                step = int(runs_folder.last_line(self.folder.run_dir(trial.name)).get("step", 0))
                done += max(0, step - self._began[trial.name]) * self._batch(trial)
        return done

    # Judging.

    def _judge(self) -> None:
        """Answer the trials that wait at a rung."""
        for name in list(self._began) if self._halving else []:
            assert self._halving is not None
            run_dir = self.folder.run_dir(name)
            step = int(runs_folder.last_line(run_dir).get("step", 0))
            due = [rung for rung in self._halving.rungs if rung <= step and not verdict_file(run_dir, rung).exists()]
            values = dict(values_of(run_dir, self.definition.metric)) if due else {}
            for rung in due:
                if rung in values:
                    go_on = self._halving.reached(name, rung, values[rung])
                    self.folder.report(name, rung, values[rung], go_on)
                    write_verdict(run_dir, rung, go_on)

    def _turn(self) -> None:
        """Begin the next generation once every member has ended this one."""
        population = [trial for trial in self.folder.trials if trial.status in ("paused", "failed")]
        if self.definition.space.method != "pbt" or self._began or self.reason or not any(t.status == "paused" for t in population):
            return
        if any(trial.status == "waiting" for trial in self.folder.trials):
            return
        generation = max(trial.generation for trial in population)
        members = {trial.name: trial for trial in population if trial.generation == generation}
        scores = {name: trial.last if trial.status == "paused" else None for name, trial in members.items()}
        parameters = {name: trial.parameters for name, trial in members.items()}
        definition = self.definition
        clones = next_generation(definition.space, scores, parameters, definition.mode, definition.base.seed, generation)
        for name, trial in members.items():
            if name in clones:
                donor = self._newest(clones[name].donor)
                trial.status, trial.donor, trial.parameters = "cloning", donor, clones[name].parameters
                trial.clones.append({"generation": generation + 1, "step": members[clones[name].donor].step, "donor": clones[name].donor})
                trial.clones[-1]["parameters"] = trial.parameters
            elif trial.status == "paused":
                trial.status = "waiting"
            trial.generation += trial.status != "failed"
        self.folder.save()
        # Before any donor goes on, so that its retention cannot take what is to be copied.
        for trial in members.values():
            if trial.status == "cloning":
                self._clone(trial)

    def _newest(self, name: str) -> str:
        from diptych.trainers.checkpoint import newest_whole
        from diptych.trainers.runfolder import RunFolder

        records = runs_folder.records(self.folder.run_dir(name))
        return f"{records}/checkpoints/{newest_whole(RunFolder(records))}"

    def _clone(self, trial: TrialRecord) -> None:
        from diptych.trainers.adoption import adopt

        config = self._config(trial)
        adopt(runs_folder.records_url(config, self.folder.run_dir(trial.name)), trial.donor, config, self.digest)
        note(f"{trial.name} goes on from {trial.clones[-1]['donor']} at step {trial.clones[-1]['step']}")
        trial.status, trial.donor = "waiting", ""
        self.folder.save()


def _words(trial: TrialRecord) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in trial.parameters.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)
