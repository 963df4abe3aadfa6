"""What MLflow is told of a run, against a real server: also while it is away, and after drivers that died."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support_runs import logged_step, make_shards, overrides

from diptych.config import ConfigError, RunConfig, apply_overrides, load_recipe
from diptych.pipelines import tracking
from diptych.pipelines.environment import environment
from diptych.pipelines.local import train_here
from diptych.redaction import clean_text, is_secret_name, without_credentials
from diptych.trainers.attempts import record_attempt
from diptych.trainers.journal import MetricsLog
from diptych.trainers.runfolder import RunFolder

FACTS: dict[str, Any] = {"digest": "d" * 64, "samples": 10}


class Server:
    """An MLflow server as a process, over a SQLite store, that can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store, artifacts = f"sqlite:///{self.folder / 'server.db'}", self.folder / "artifacts"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--artifacts-destination", str(artifacts)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("ab") as log:
            # Its job queue starts processes of its own, which nothing here needs.
            variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self.process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        deadline = time.monotonic() + 400
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).read()
                return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-3000:]
                time.sleep(0.2)

    def stop(self) -> None:
        if self.process is not None:
            import psutil

            below = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            self.process.wait(30)
            for child in below:
                if child.is_running():
                    child.kill()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def config_for(uri: str, *more: str) -> RunConfig:
    given = [f"tracking.uri={uri}", "tracking.system_metrics=false", "data.shards=/shards", *more]
    return apply_overrides(load_recipe("coca", "smoke"), given)


def commit(run_dir: Path, attempt: int, steps: list[int], checkpoint: int) -> None:
    """Log steps as rank 0 does, and a checkpoint that commits them."""
    log = MetricsLog(RunFolder(str(run_dir)), attempt)
    for step in steps:
        log.add(step, {"train/loss": float(step)})
    (run_dir / "checkpoints" / f"step_{checkpoint:08d}-a{attempt:04d}").mkdir(parents=True)


def history(tracker: tracking.Tracker) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in tracker.store.get_metric_history(tracker.run_id, "train/loss"))


def test_a_server_that_is_away_for_a_while_misses_nothing(server: Server, tmp_path: Path) -> None:
    """Away in the middle of a run, and when its driver starts again: all figures are there afterwards, each once."""
    record_attempt(RunFolder(str(tmp_path)), 1, None, 1)
    config = config_for(server.uri)
    tracker = tracking.Tracker(config, tmp_path, None, FACTS)
    with tracker:
        commit(tmp_path, 1, [1, 2], 2)
        tracker.sync()
        server.stop()
        commit(tmp_path, 1, [3, 4], 4)
        with pytest.raises(Exception, match="Max retries|Connection"):
            tracker.sync()
        tracker.log_environment({"ray": "none"})
        again = tracking.Tracker(config, tmp_path, tracker.run_id, FACTS)
        server.start()
        commit(tmp_path, 1, [5, 6], 6)
    again.end("FINISHED")
    assert history(again) == [(step, float(step)) for step in range(1, 7)]
    run = again.store.get_run(again.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags[tracking.TAG_DRIVER] == tracking.driver_identity()
    # The first driver's environment waited with it; whoever comes later logs its own.
    tracker.sync()
    assert again.store.list_artifacts(again.run_id, "environment")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_server_that_stops_for_a_minute_while_a_run_trains(server: Server, tmp_path: Path) -> None:
    """The run does not wait for it, and ends with every figure in MLflow, each once."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    changes = overrides(make_shards(tmp_path / "shards", 24), "run", workers=1, train__steps=1_000_000, tracking__uri=server.uri)
    config = apply_overrides(load_recipe("coca", "smoke"), changes)
    tracker = tracking.Tracker(config, run_dir, None, FACTS)
    seen: list[int] = []

    def disturb() -> None:
        while logged_step(run_dir) < 20:
            time.sleep(0.1)
        server.stop()
        seen.append(logged_step(run_dir))
        time.sleep(60)
        seen.append(logged_step(run_dir))
        server.start()
        (run_dir / "stop").touch()

    thread = threading.Thread(target=disturb)
    thread.start()
    with tracker:
        ended = train_here(config, run_dir)
    thread.join()
    tracker.end("FINISHED")
    assert ended["status"] == "stopped"
    assert seen[0] + 20 < seen[1] <= ended["step"], "it went on meanwhile"
    assert [step for step, _ in history(tracker)] == sorted({*range(5, ended["step"] + 1, 5), ended["step"]})
    assert tracker.store.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_driver_killed_before_it_noted_the_id_finds_its_run_again(server: Server, tmp_path: Path) -> None:
    config = config_for(server.uri)
    first = tracking.Tracker(config, tmp_path, None, FACTS, None, "mark-of-this-run")
    second = tracking.Tracker(config, tmp_path, "", FACTS, None, "mark-of-this-run")
    other = tracking.Tracker(config, tmp_path, None, FACTS, None, "mark-of-another")
    assert second.run_id == first.run_id != other.run_id


def test_a_store_that_is_away_when_a_run_begins_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"tracking.uri: received 'http://127.0.0.1:1'.*tracking.enabled=false") as caught:
        tracking.Tracker(config_for("http://user:hunter2@127.0.0.1:1"), tmp_path, None, FACTS)
    assert "hunter2" not in str(caught.value)


def test_code_packages_and_machine_are_logged_and_no_variable(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-open")
    tracker = tracking.Tracker(config_for(server.uri, "data.shards=https://me:sesame-open@host/a.tar"), tmp_path, None, FACTS)
    tracker.log_environment({"resources": {"CPU": 4.0}})
    (listed,) = tracker.store.list_artifacts(tracker.run_id, "environment")
    local = tracker.store.download_artifacts(tracker.run_id, listed.path, str(tmp_path))
    told = json.loads(Path(local).read_text())
    assert told["packages"]["torch"]
    assert told["cluster"]["resources"] == {"CPU": 4.0}
    assert told["code_digest"] == environment()["code_digest"] == tracker.store.get_run(tracker.run_id).data.tags["diptych.code_digest"]
    stored = Path(tracker.store.download_artifacts(tracker.run_id, "config.json", str(tmp_path))).read_text()
    everything = stored + json.dumps(told) + json.dumps(tracker.store.get_run(tracker.run_id).to_dictionary())
    assert "sesame-open" not in everything
    assert "https://host/a.tar" in stored


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host:8/a?b=1", "https://host:8/a?b=1"),
        ("https://host/a.tar?X-Amz-Signature=secret&x=1", "https://host/a.tar"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("https://host/{0..9}.tar?token=secret", "https://host/{0..9}.tar"),
        ("/local/path?token=1", "/local/path?token=1"),
        ("a castle: on a hill", "a castle: on a hill"),
    ],
)
def test_urls_are_shown_without_credentials(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


def test_names_of_secrets_are_told_from_others() -> None:
    secret = (
        "RAY_AUTH_TOKEN",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "MLFLOW_TRACKING_PASSWORD",
        "WANDB_API_KEY",
        "token",
    )
    plain = ("MLFLOW_TRACKING_URI", "TOKENIZERS_PARALLELISM", "KEYWORD", "OMP_NUM_THREADS", "MONKEY")
    assert [name for name in (*secret, *plain) if is_secret_name(name)] == list(secret)


def test_urls_in_messages_are_shown_so_too() -> None:
    text = clean_text("ReadError: https://me:secret@host/a.tar?sig=secret, tried 5 times; see s3://bucket/b")
    assert text == "ReadError: https://host/a.tar tried 5 times; see s3://bucket/b"
