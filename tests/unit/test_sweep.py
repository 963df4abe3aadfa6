"""The parts of a sweep that need no Ray: populations, exact stops, verdicts, adoption of a donor's checkpoint, the page at the end."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support_runs import make_shards, overrides

from diptych.config import ConfigError, RunConfig, apply_overrides, load_config_file, load_recipe, set_path
from diptych.pipelines import sweep_report
from diptych.pipelines.local import train_here
from diptych.pipelines.prepare import Inputs
from diptych.pipelines.sweep import Budget, Sweep
from diptych.pipelines.sweep_population import next_generation
from diptych.pipelines.sweep_record import Definition, SweepFolder, best_of, ranked
from diptych.pipelines.trial import SweepStops, Trial, write_verdict
from diptych.trainers.adoption import adopt
from diptych.trainers.attempts import history
from diptych.trainers.checkpoint import load, newest_whole
from diptych.trainers.journal import read_metrics
from diptych.trainers.runfolder import RunFolder
from diptych.tune_spaces import Domain, Space

DOMAINS = {
    "optim.lr": Domain(kind="loguniform", low=1e-5, high=1e-2),
    "task.caption_weight": Domain(kind="uniform", low=0.5, high=4.0),
    "optim.warmup_steps": Domain(values=(0, 10, 20)),
}
START = {"optim.lr": 1e-3, "task.caption_weight": 1.0, "optim.warmup_steps": 10}
POPULATION = Space(parameters=DOMAINS, method="pbt")


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=2, max_size=12), st.sampled_from(("min", "max")), st.integers(0, 5))
def test_the_worst_clone_the_best(scores: list[float | None], mode: str, seed: int) -> None:
    named = {f"t{index:03d}": score for index, score in enumerate(scores)}
    parameters = dict.fromkeys(named, START)
    clones = next_generation(POPULATION, named, parameters, mode, seed, 1)
    assert clones == next_generation(POPULATION, named, parameters, mode, seed, 1), "a resumed sweep decides the same"
    alive = [score for score in scores if score is not None]
    if not alive:
        assert not clones
        return
    assert {name for name, score in named.items() if score is None} <= set(clones)
    for name, clone in clones.items():
        donor, own = named[clone.donor], named[name]
        assert donor is not None
        assert clone.donor not in clones, "a donor goes on"
        assert own is None or (donor <= own if mode == "min" else donor >= own)
        assert clone.parameters != START
        for key, domain in DOMAINS.items():
            value = clone.parameters[key]
            assert value in domain.values if domain.values else domain.low <= value <= domain.high


def test_a_generation_ends_at_its_step_and_a_rung_waits_for_its_verdict(tmp_path: Path) -> None:
    until = SweepStops(lambda: False, tmp_path, step=3, until=6, rungs=())
    assert [until() for _ in range(3)] == [False, False, True], "asked before steps 3, 4 and 5; the loop ends after step 5"
    rungs = SweepStops(lambda: False, tmp_path, step=0, until=0, rungs=(1, 2))
    assert not rungs()
    timer = threading.Timer(0.2, write_verdict, (tmp_path, 1, True))
    timer.start()
    assert not rungs()
    write_verdict(tmp_path, 2, go_on=False)
    assert rungs()
    assert SweepStops(lambda: True, tmp_path, step=9, until=0, rungs=(9,))(), "a stop that was asked for does not wait"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


def configured(shards: Path, name: str, **changes: object) -> RunConfig:
    settings: dict[str, Any] = {
        "workers": 1,
        "train__steps": 12,
        "train__log_every": 1,
        "validation__every_steps": 4,
        "checkpoint__every_steps": 2,
    }
    return apply_overrides(load_recipe("coca", "smoke"), overrides(shards, name, **settings | changes))


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run that was paused after 8 of 12 steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "donor"
    result = train_here(configured(shards, "donor"), run_dir, Trial(until=8))
    assert (result["status"], result["step"]) == ("stopped", 8)
    assert newest_whole(RunFolder(str(run_dir))) == "step_00000008-a0001"
    return run_dir


def loss_on_a_fixed_batch(run_dir: Path) -> float:
    from diptych.pipelines.trained import load_trained

    task = load_trained(run_dir, averaged=False).task
    with torch.no_grad():
        terms = task(task.example_batch(8)).terms
    return float(sum(term.sum for term in terms.values()))


def test_a_clone_goes_on_with_the_donor_s_weights_slot_and_its_own_rate(tmp_path: Path, shards: Path, donor: Path) -> None:
    """In a run that had gone its own way: everything but the hyperparameters is the donor's from the next step on."""
    clone = tmp_path / "clone"
    config = configured(shards, "clone", optim__lr=3e-5, seed=0)
    train_here(config, clone, Trial(until=6))
    before = loss_on_a_fixed_batch(clone)
    copy = adopt(str(clone), str(donor), config, "")
    assert loss_on_a_fixed_batch(clone) == loss_on_a_fixed_batch(donor) != before
    ours, theirs = load(str(clone), copy), load(str(donor), "step_00000008-a0001")
    for part in ("weights", "optimizer", "ema"):
        left, right = getattr(ours.tensors, part), getattr(theirs.tensors, part)
        assert set(left) == set(right) != set()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert (ours.state["step"], ours.state["slot"]) == (8, 64)

    mutated = set_path(config, "optim.lr", 7e-4)
    assert train_here(mutated, clone)["step"] == 12
    rates = {line["step"]: line["metrics"]["train/lr"] for line in read_metrics(str(clone)) if "train/lr" in line["metrics"]}
    assert rates[9] == 7e-4, "the first step after the clone"
    assert [rates[step] for step in range(1, 7)] == [3e-5] * 6, "what the run did before stays its history"
    from diptych.trainers.journal import read_trace

    slots = read_trace(str(clone)).to_pydict()
    assert [slot for step, slot in zip(slots["step"], slots["slot"], strict=True) if step >= 8] == list(range(64, 96))


def test_a_donor_may_be_gone_once_it_was_copied(tmp_path: Path, shards: Path, donor: Path) -> None:
    lent, run_dir = tmp_path / "lent", tmp_path / "run"
    shutil.copytree(donor, lent)
    config = configured(shards, "run")
    adopt(str(run_dir), str(lent), config, "")
    shutil.rmtree(lent)
    assert train_here(config, run_dir)["step"] == 12
    assert [span.first for span in history(str(run_dir))] == [8, 8]


@pytest.mark.parametrize(
    ("changes", "digest", "key"),
    [({"seed": 1}, "", "seed"), ({"train__global_batch_size": 4}, "", "train.global_batch_size"), ({}, "other", "data.shards")],
)
def test_another_order_of_samples_is_refused(
    tmp_path: Path, shards: Path, donor: Path, changes: dict[str, object], digest: str, key: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{key}"):
        adopt(str(tmp_path / "run"), str(donor), configured(shards, "run", **changes), digest)
    assert not (tmp_path / "run" / "attempts").exists()


def test_a_damaged_donor_is_refused(tmp_path: Path, shards: Path, donor: Path) -> None:
    lent = tmp_path / "lent"
    shutil.copytree(donor, lent)
    file = lent / "checkpoints" / "step_00000008-a0001" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        adopt(str(tmp_path / "run"), f"{lent}/checkpoints/step_00000008-a0001", configured(shards, "run"), "")
    with pytest.raises(ConfigError, match="a run folder with a whole checkpoint"):
        adopt(str(tmp_path / "run"), str(tmp_path / "nothing"), configured(shards, "run"), "")


@pytest.fixture
def swept(tmp_path: Path, shards: Path) -> tuple[Definition, SweepFolder]:
    """A 2 × 2 grid on disk as a sweep leaves it, one trial failed."""
    space = Space(method="grid", parameters={"optim.lr": Domain(values=(1e-4, 1e-3)), "train.steps": Domain(values=(2, 4))})
    base = configured(shards, "sweep", output=tmp_path, validation__every_steps=1)
    definition = Definition("sweep", space, base, "val/loss", "min", 0)
    folder = SweepFolder(tmp_path / "sweep")
    folder.begin(definition)
    for lr in (1e-4, 1e-3):
        for steps in (2, 4):
            trial = folder.add({"optim.lr": lr, "train.steps": steps})
            config = definition.config_of(trial.parameters)
            result = train_here(config, folder.run_dir(trial.name))
            trial.status, trial.step = result["status"], result["step"]
            trial.value = trial.last = result["metrics"]["val/loss"]
    folder.trials[0].status, folder.trials[0].error = "failed", "the loss is NaN at step 1"
    folder.save()
    return definition, folder


def test_a_sweep_ends_with_table_page_grid_and_a_configuration(swept: tuple[Definition, SweepFolder]) -> None:
    from PIL import Image

    definition, folder = swept
    reopened = SweepFolder(folder.path)
    assert reopened.read() == definition
    assert reopened.trials == folder.trials
    best = ranked(folder.trials, "min")
    assert len(best) == 3
    assert best[0].value == min(trial.value or 9e9 for trial in folder.trials[1:])
    (folder.path / "best.json").write_text(definition.config_of(best[0].parameters).to_json())
    assert load_config_file(str(folder.path / "best.json")).train.steps == best[0].parameters["train.steps"]

    columns, rows = sweep_report.table(definition, folder.trials)
    assert [row[0] for row in rows] == [*[trial.name for trial in best], "t000"]
    assert rows[-1][columns.index("val/loss")] == "the loss is NaN at step 1"
    page = sweep_report.write(definition, folder).read_text()
    assert page.count("<svg") == 3
    assert not re.findall(r'(?:src|href)="https?://', page), "the page stands alone"
    assert "data:image/jpeg;base64," in page
    with Image.open(folder.path / "grid.jpg") as grid:
        assert grid.width > 2 * 288
        assert grid.height > 2 * 60


@pytest.mark.parametrize(
    ("budget", "reason"),
    [(Budget(4, seconds=60), "budget of 60 seconds spent"), (Budget(4, samples=70), "budget of 70 samples spent")],
)
def test_a_sweep_whose_budget_is_spent_starts_no_trial(swept: tuple[Definition, SweepFolder], budget: Budget, reason: str) -> None:
    """An earlier driver ran for a minute and for 12 steps of 8 samples; a larger budget would go on."""
    definition, folder = swept
    for trial in folder.trials:
        trial.samples = 8 * trial.step
    folder.trials[3].status, folder.seconds = "waiting", 61.0
    folder.save()
    reopened = SweepFolder(folder.path)
    reopened.read()
    sweep = Sweep(definition, reopened, Inputs(folder.path / "inputs"), budget, 2, lambda _: None, None, "")
    sweep.run()
    assert sweep.reason == reason
    assert [trial.status for trial in reopened.trials] == ["failed", "finished", "finished", "waiting"]


def test_best_is_the_first_of_equals_and_torn_reports_are_passed_over(tmp_path: Path) -> None:
    assert best_of([(1, 3.0), (2, 1.0), (3, 1.0)], "min") == (2, 1.0)
    assert best_of([], "max") is None
    folder = SweepFolder(tmp_path)
    folder.report("t000", 10, 1.5, go_on=True)
    with (tmp_path / "reports.jsonl").open("a") as file:
        file.write(json.dumps({"trial": "t001"})[:7])
    assert [report["trial"] for report in folder.reports()] == ["t000"]
