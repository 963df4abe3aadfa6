"""A run folder that fills up, an object store that stumbles, a checkpoint with one flipped bit: survived, or ended with the reason."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support_distributed import run_workers
from support_runs import make_shards, overrides
from support_training import assert_identical, final_state, losses_by_step, pair_config, trace_rows, train_in

from diptych.config import RunConfig, apply_overrides, load_recipe
from diptych.pipelines.failures import explain, reason
from diptych.pipelines.local import train_here
from diptych.trainers.attempts import read_attempts
from diptych.trainers.runfolder import RunFolder, StorageFailed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=False).returncode:
        pytest.skip("a tmpfs can be mounted by root only")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def run_config(shards: Path, **changes: Any) -> RunConfig:
    settings = overrides(shards, "run", train__steps=12, checkpoint__every_steps=2, checkpoint__keep=100, **changes)
    return apply_overrides(load_recipe("coca", "smoke"), [*settings, "task.tokenizer=train:64", "data.validation_share=0"])


def test_a_full_disk_ends_the_run_with_the_reason_and_more_room_lets_it_go_on(small_disk: Path, tmp_path: Path) -> None:
    config = run_config(make_shards(tmp_path / "shards", 24))
    full = train_here(config, small_disk / "run")
    assert full["status"] == "failed"
    assert "No space left on device" in full["error"]
    assert str(small_disk) in full["error"]
    folder = RunFolder(str(small_disk / "run"))
    assert not [name for name in folder.names("checkpoints") if name.startswith(".")], "what was half written is gone"
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    whole = train_here(config, tmp_path / "whole")
    more = train_here(config, small_disk / "run")
    assert (more["status"], more["step"]) == ("finished", 12)
    assert read_attempts(folder)[2].start_step > 0, "it went on where the last whole checkpoint stood"
    assert trace_rows(small_disk / "run") == trace_rows(tmp_path / "whole")
    assert_identical(final_state(small_disk / "run"), final_state(tmp_path / "whole"))
    assert whole["status"] == "finished"


def fill_up(folder: str) -> str:
    """On each of the workers; only rank 0 writes checkpoints, and both must hear why there are none."""
    try:
        train_in(folder, pair_config(train__steps=40, checkpoint__every_steps=2, checkpoint__keep=100, task__hidden=64))
    except StorageFailed as error:
        return f"{error.lasting} {error}"
    return "finished"


def test_every_worker_hears_that_the_disk_is_full(small_disk: Path) -> None:
    told = run_workers(fill_up, 2, str(small_disk / "run"))
    assert told[0] == told[1]
    assert told[0].startswith("True rank 0 cannot write to "), told


class EveryThird:
    """A WSGI application that answers 503 to every third request, as an overloaded S3 does."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application, self.count, self.refused = application, 0, 0
        self.lock = threading.Lock()
        self.stumbles = False

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            self.count += 1
            refuse = self.stumbles and self.count % 3 == 0
            self.refused += refuse
        if not refuse:
            return self.application(environ, start_response)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"].read(length)
        start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
        return [b"<Error><Code>ServiceUnavailable</Code><Message>Please try again.</Message></Error>"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EveryThird]:
    """moto's S3 behind `EveryThird`, as the endpoint of this process's S3 clients."""
    pytest.importorskip("s3fs", reason="extra `s3` is not installed")
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    import fsspec
    from werkzeug.serving import make_server

    front = EveryThird(moto_server.DomainDispatcherApplication(moto_server.create_backend_app))
    server = make_server("127.0.0.1", 0, front, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").clear_instance_cache()
        fsspec.filesystem("s3").mkdir("checkpoints")
        yield front
        fsspec.filesystem("s3").clear_instance_cache()
    server.shutdown()
    thread.join()


@pytest.mark.slow
def test_a_run_in_an_object_store_that_stumbles(store: EveryThird, tmp_path: Path) -> None:
    """Checkpoints, metrics and trace in S3, which refuses every third request: the same run as on a disk, interrupted once."""
    store.stumbles = True
    url = "s3://checkpoints/stumbling"
    for steps in (4, 6):
        config = pair_config(train__steps=steps, checkpoint__every_steps=2)
        train_in(url, config)
    train_in(tmp_path, config)
    assert store.refused > 5
    assert trace_rows(url) == trace_rows(tmp_path)
    assert losses_by_step(url) == losses_by_step(tmp_path)
    assert_identical(final_state(url), final_state(tmp_path))
    assert read_attempts(RunFolder(url))[2].start_step == 4


def test_a_run_keeps_its_checkpoints_in_an_object_store(store: EveryThird, tmp_path: Path) -> None:
    """`checkpoint.storage`: whoever reads the run folder finds them there, and the folder itself stays small."""
    from diptych.pipelines.runs import run as list_runs
    from diptych.pipelines.trained import load_trained

    store.stumbles = False
    config = run_config(make_shards(tmp_path / "shards", 24), checkpoint__storage="s3://checkpoints/runs")
    assert train_here(config, tmp_path / "runs" / "run")["status"] == "finished"
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()
    assert load_trained(tmp_path / "runs" / "run").state["step"] == 12
    (facts,) = list_runs(str(tmp_path / "runs"))["runs"]
    assert facts["step"] == 12


def test_a_flipped_bit_costs_the_steps_since_the_checkpoint_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_in(tmp_path / "run", pair_config(train__steps=6, checkpoint__every_steps=2))
    newest = tmp_path / "run/checkpoints/step_00000006-a0001/optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    train_in(tmp_path / "run", pair_config(train__steps=8, checkpoint__every_steps=2))
    train_in(tmp_path / "whole", pair_config(train__steps=8, checkpoint__every_steps=2))
    attempt = read_attempts(RunFolder(str(tmp_path / "run")))[2]
    assert attempt.resumed_from == "step_00000004-a0001"
    (torn,) = attempt.passed_over
    assert "step_00000006-a0001/optimizer.safetensors is damaged" in torn
    assert "Passing over a torn checkpoint" in caplog.text
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_failures_are_told_with_their_remedy() -> None:
    from ray.exceptions import ActorDiedError, OutOfMemoryError
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    full = OSError(28, "No space left on device", "/runs/a/metrics")
    assert explain(full).startswith("The disk is full. Free space there, lower checkpoint.keep")
    memory = explain(OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert memory.startswith("out of memory: Lower train.global_batch_size")
    assert "the system does when memory runs out" in explain(ActorDiedError())
    start = ControllerError(WorkerGroupStartupFailedError("its node is lost"))
    assert explain(start) == "WorkerGroupStartupFailedError: its node is lost", "without Ray's words around it"
    peers = {0: RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"), 1: ActorDiedError()}
    assert reason(peers).startswith("rank 1: the process was killed"), "who only saw it vanish has nothing to add"
    assert reason({2: full, 0: full}).startswith("rank 0, 2: The disk is full")
