"""A Ray of several nodes with token authentication: jobs that are submitted, and training that follows the nodes that there are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support_cluster import NodesOfRay, nodes_of_ray
from support_runs import final_bytes, logged_step, make_shards, overrides, trace_of, wait_for

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines.local import train_here
from diptych.pipelines.trace import write_trace
from diptych.trainers.attempts import read_attempts
from diptych.trainers.runfolder import RunFolder

SECRET = "sesame-open-4711"
SECRETS = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD"), SECRET)
REPOSITORY = Path(__file__).resolve().parents[2]
# Jobs call `python`, and find it where this interpreter lies.
PROGRAMS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", PROGRAMS)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # On the nodes, where they belong: drivers and workers have them.
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, environment: None) -> Iterator[NodesOfRay]:
    with nodes_of_ray(monkeypatch, dashboard=True) as started:
        yield started


def call(arguments: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in variables or variables[key]}
    changed = {key: value for key, value in variables.items() if value}
    return subprocess.run(
        arguments, cwd=cwd, env=inherited | changed, capture_output=True, text=True, timeout=1200, check=False, stdin=subprocess.DEVNULL
    )


def folder_to_send(tmp_path: Path) -> Path:
    """What a user's checkout holds of the package, with something that must not travel."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "diptych").symlink_to(REPOSITORY / "diptych")
    (folder / ".env").write_text(f"HF_TOKEN={SECRET}")
    return folder


def arguments_of(tmp_path: Path, shards: Path, name: str, **changes: object) -> list[str]:
    store = f"sqlite:///{tmp_path / 'shared' / 'mlflow.db'}"
    given = {"output": tmp_path / "shared" / "runs", "tracking__uri": store, "train__steps": 12, "checkpoint__every_steps": 6}
    return overrides(shards, name, **given | changes)


def files_with(text: str, *folders: Path) -> list[Path]:
    """Every file below `folders` that holds `text`."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert files
    found = []
    for file in files:
        with suppress(FileNotFoundError):  # Ray goes on, and removes files of its own.
            found += [file] if text.encode() in file.read_bytes() else []
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_jobs_with_and_without_the_token(nodes: NodesOfRay, shards: Path, tmp_path: Path) -> None:
    """`diptych submit` and `ray job submit`: logs are followed, run and checkpoints lie in the shared folder; no token, no job."""
    nodes.add(cpus=4)
    (tmp_path / "shared").mkdir()
    checkout = folder_to_send(tmp_path)
    submit = [sys.executable, "-m", "diptych.pipelines.submit", "--address", nodes.dashboard]
    tokenless = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "", "HOME": str(tmp_path)}
    begin = time.monotonic()
    refused = call([*submit, "train", "coca"], checkout, **tokenless)
    assert refused.returncode == 2, refused.stderr
    assert time.monotonic() - begin < 120
    assert "RAY_AUTH_TOKEN: received 'no token'; allowed: the token of the cluster" in refused.stderr
    wrong = call([*submit, "train", "coca"], checkout, RAY_AUTH_TOKEN="f" * 64)
    assert wrong.returncode == 2
    assert "a wrong token" in wrong.stderr
    assert "f" * 64 not in wrong.stderr

    mine = arguments_of(tmp_path, shards, "mine")
    done = call([*submit, "--json", "train", "coca", "--recipe", "smoke", *mine], checkout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "finished at step 12" in done.stdout, "the job's own output is followed"
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert (told["status"], told["exit_status"]) == ("SUCCEEDED", 0)
    assert set(final_bytes(tmp_path / "shared/runs/mine")) == {"model.safetensors", "optimizer.safetensors", "ema.safetensors"}

    begin = time.monotonic()
    missing = call(
        [sys.executable, "-m", "diptych.pipelines.train", "coca", *mine, "cluster.gpus_per_worker=1"], checkout, **nodes.environment
    )
    assert missing.returncode == 2
    assert "what the cluster can schedule: 2 GPU needed, 0 there" in missing.stderr
    assert time.monotonic() - begin < 120, "5 s and what the imports take on a busy machine"
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert not files_with(SECRET, tmp_path / "shared", nodes.folder), "neither run, nor MLflow, nor Ray's logs and packages"
    assert not files_with(token, tmp_path / "shared", *nodes.folder.glob("*/session_latest/logs"))
    assert token not in done.stdout + done.stderr
    # A wrong call inside the job comes back as one, and a run that would vanish with the job's folder is refused.
    lost = call([*submit, "train", "coca", f"data.shards={shards}", "name=lost"], checkout)
    assert lost.returncode == 2, lost.stdout + lost.stderr
    assert "output: received 'runs'" in lost.stdout

    plain = ["ray", "job", "submit", "--address", nodes.dashboard, "--working-dir", ".", "--", "python", "-m", "diptych.pipelines.train"]
    answer = call([*plain, "coca", "--recipe", "smoke", *arguments_of(tmp_path, shards, "plain")], checkout)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    assert trace_of(tmp_path / "shared/runs/plain") == trace_of(tmp_path / "shared/runs/mine")
    from mlflow import MlflowClient

    store = MlflowClient(f"sqlite:///{tmp_path / 'shared' / 'mlflow.db'}")
    runs = store.search_runs([experiment.experiment_id for experiment in store.search_experiments()])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [("mine", "FINISHED"), ("plain", "FINISHED")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ctrl_c_leaves_a_job_and_stop_leaves_its_checkpoint(nodes: NodesOfRay, shards: Path, tmp_path: Path) -> None:
    """In a terminal: Ctrl-C asks and the job goes on; `--stop` ends it in order, and the same job again goes on from there."""
    nodes.add(cpus=4)
    (tmp_path / "shared").mkdir()
    checkout, run_dir = folder_to_send(tmp_path), tmp_path / "shared" / "runs" / "long"
    submit = [sys.executable, "-m", "diptych.pipelines.submit", "--address", nodes.dashboard]
    train = ["train", "coca", "--recipe", "smoke", *arguments_of(tmp_path, shards, "long", checkpoint__every_steps=0)]
    keyboard, terminal = os.openpty()
    with (tmp_path / "submit.log").open("w") as log:
        words = [*submit, "--name", "long", *train, "train.steps=1000000"]
        process = subprocess.Popen(words, cwd=checkout, stdin=terminal, stdout=log, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: run_dir.is_dir() and logged_step(run_dir) >= 20, process, 900)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "[l]eave it running" in (tmp_path / "submit.log").read_text(), process, 60)
    os.write(keyboard, b"l\n")
    assert process.wait(300) == 0, (tmp_path / "submit.log").read_text()[-3000:]
    step = logged_step(run_dir)
    wait_for(lambda: logged_step(run_dir) > step + 20, None, 300)
    stopped = call([*submit, "--stop", "long", "--follow", "long"], checkout)
    assert stopped.returncode == 1, stopped.stdout[-3000:] + stopped.stderr[-3000:]
    assert "job long: STOPPED" in stopped.stderr
    (checkpoint,) = run_dir.glob("checkpoints/step_*")
    reached = int(checkpoint.name.split("_")[1].split("-")[0])
    assert reached > step
    again = call([*submit, *train, f"train.steps={reached + 5}"], checkout)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert attempts_of(run_dir) == [(2, 0), (2, reached)]


def attempts_of(run_dir: Path) -> list[tuple[int, int]]:
    """(workers, first step) of every attempt."""
    return [(attempt.world_size, attempt.start_step) for attempt in read_attempts(RunFolder(str(run_dir))).values()]


@contextmanager
def start(arguments: list[str], cwd: Path, nodes: NodesOfRay) -> Iterator[subprocess.Popen[str]]:
    """`diptych train coca …` on these nodes; gone at the end, whatever happens."""
    command = [sys.executable, "-m", "diptych.pipelines.train", "coca", *arguments, "--json"]
    with (cwd / "driver.log").open("w") as log:
        driver = subprocess.Popen(command, cwd=cwd, env=os.environ | nodes.environment, stdout=log, stderr=subprocess.STDOUT, text=True)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_training_follows_the_nodes(
    monkeypatch: pytest.MonkeyPatch, environment: None, shards: Path, tmp_path: Path, strategy: str
) -> None:
    """Three nodes; one is killed: two go on; one is added: three again. Every slot once, by the samples that one worker alone sees."""
    run_dir = tmp_path / "runs" / "elastic"
    changes: dict[str, Any] = {"workers": "2..3", "train__steps": 100_000, "train__strategy": strategy, "cluster__resize_seconds": 2}
    with nodes_of_ray(monkeypatch) as nodes:
        first, *_ = [nodes.add() for _ in range(3)]
        with start(overrides(shards, "elastic", checkpoint__every_steps=20, **changes), tmp_path, nodes) as driver:
            wait_for(lambda: logged_step(run_dir) >= 45, driver, 900)
            nodes.kill(first)
            wait_for(lambda: len(attempts_of(run_dir)) > 1 and logged_step(run_dir) > attempts_of(run_dir)[-1][1] + 25, driver, 900)
            assert [workers for workers, _ in attempts_of(run_dir)] == [3, 2]
            nodes.add()
            wait_for(lambda: attempts_of(run_dir)[-1][0] == 3 and logged_step(run_dir) > attempts_of(run_dir)[-1][1] + 5, driver, 900)
            (run_dir / "stop").touch()
            assert driver.wait(600) == 0, (tmp_path / "driver.log").read_text()[-5000:]
    told = (tmp_path / "driver.log").read_text()
    result = json.loads(told.strip().splitlines()[-1])
    assert (result["status"], result["world_size"]) == ("stopped", 3)
    assert "attempt 2: 2 workers, from step_" in told
    assert "workers failed: " in told
    steps = result["step"]
    rows = trace_of(run_dir)
    assert [slot for _, slot, _, _ in rows] == list(range(steps * 8)), "every slot once, in order"
    alone = tmp_path / "alone"
    given = overrides(shards, "alone", workers=1, train__steps=steps, validation__samples=0)
    config = apply_overrides(load_recipe("coca", "smoke"), given)
    train_here(config, alone)
    from diptych.datasets.manifest import open_manifest

    write_trace(alone, open_manifest(str(shards)))
    assert rows == trace_of(alone), "by the same samples"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_node_that_is_taken_back_with_notice(monkeypatch: pytest.MonkeyPatch, environment: None, shards: Path, tmp_path: Path) -> None:
    """The notice makes a checkpoint, long before the next one is due; the node goes, and the run goes on from there."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    run_dir = tmp_path / "runs" / "warned"
    changes: dict[str, Any] = {
        "workers": "1..2",
        "train__steps": 100_000,
        "checkpoint__every_steps": 50_000,
        "cluster__resize_seconds": 600,
    }
    with nodes_of_ray(monkeypatch) as nodes:
        _, second = nodes.add(), nodes.add()
        with start(overrides(shards, "warned", **changes), tmp_path, nodes) as driver:
            wait_for(lambda: logged_step(run_dir) >= 20, driver, 900)
            assert not list(run_dir.glob("checkpoints/step_*"))
            words = ["--node-id", second.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            drain = ["ray", "drain-node", "--address", str(nodes.cluster.address), *words, "--deadline-remaining-seconds", "30"]
            answer = call(drain, tmp_path)
            assert answer.returncode == 0, answer.stdout + answer.stderr
            wait_for(lambda: bool(list(run_dir.glob("checkpoints/step_*"))), driver, 120)
            nodes.kill(second)
            wait_for(lambda: len(attempts_of(run_dir)) > 1, driver, 900)
            assert attempts_of(run_dir)[1][1] >= 20, "from the notice's checkpoint, not from the beginning"
            (run_dir / "stop").touch()
            assert driver.wait(600) == 0, (tmp_path / "driver.log").read_text()[-5000:]
    rows = trace_of(run_dir)
    assert [slot for _, slot, _, _ in rows] == list(range(len(rows)))
