"""Checkpoints that are whole or do not count, attempts that fence each other, and the history that they leave."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_distributed import start_workers
from support_training import assert_identical, final_state, losses_by_step, pair_config, stream_from, trace_rows, train_in

from diptych.config import ConfigError
from diptych.trainers.attempts import Fenced, Span, check_fence, checkpoint_name, history, read_attempts, record_attempt
from diptych.trainers.checkpoint import CheckpointWriter, TornCheckpoint, begin_attempt, load, newest_whole, verify
from diptych.trainers.journal import MetricsLog, Trace, read_metrics, read_trace
from diptych.trainers.runfolder import RunFolder
from diptych.trainers.state import TrainState


def tiny_state(value: float = 1.0) -> TrainState:
    weights = {"w": torch.full((3, 2), value), "b": torch.full((), value)}
    return TrainState(weights, {f"exp_avg/{name}": tensor / 2 for name, tensor in weights.items()}, {"w": weights["w"] * 2})


def save(folder: RunFolder, attempt: int, step: int, keep: int = 10, best: str | None = None) -> str:
    writer = CheckpointWriter(folder, attempt, keep)
    name = writer.save(tiny_state(step), {"step": step, "attempt": attempt}, best)
    writer.wait()
    return name


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path))


def test_what_is_saved_is_loaded_and_no_file_is_a_pickle(folder: RunFolder, tmp_path: Path) -> None:
    assert begin_attempt(folder, 2).resumed_from is None
    name = save(folder, 1, 100)
    assert name == "step_00000100-a0001"
    loaded = load(folder, name)
    assert_identical(loaded.tensors, tiny_state(100))
    assert loaded.state["step"] == 100
    files = sorted(path.name for path in (tmp_path / "checkpoints" / name).iterdir())
    assert files == ["commit.json", "ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_in_the_place_of_weights_is_not_run(folder: RunFolder, tmp_path: Path) -> None:
    begin_attempt(folder, 1)
    name = save(folder, 1, 1)
    target = tmp_path / "checkpoints" / name
    data = pickle.dumps(Bomb(tmp_path / "ran"))
    (target / "model.safetensors").write_bytes(data)
    commit = json.loads((target / "commit.json").read_text())
    commit["files"]["model.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (target / "commit.json").write_text(json.dumps(commit))
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        load(folder, name)
    assert not (tmp_path / "ran").exists()


def flip_a_byte(target: Path) -> None:
    data = bytearray((target / "optimizer.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (target / "optimizer.safetensors").write_bytes(bytes(data))


def cut(target: Path) -> None:
    data = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(data[:-5])


def garble_commit(target: Path) -> None:
    (target / "commit.json").write_text('{"files": {"model.saf')


DAMAGES = {
    "flipped byte": (flip_a_byte, "SHA-256"),
    "cut file": (cut, "bytes, its commit record says"),
    "missing file": (lambda target: (target / "ema.safetensors").unlink(), "no whole commit"),
    "no commit record": (lambda target: (target / "commit.json").unlink(), "no whole commit"),
    "half a commit record": (garble_commit, "cannot be read"),
    "commit record of another kind": (lambda target: (target / "commit.json").write_text("[]"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_passed_over_aloud(folder: RunFolder, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    begin_attempt(folder, 1)
    save(folder, 1, 10)
    name = save(folder, 1, 20)
    harm, complaint = DAMAGES[damage]
    harm(tmp_path / "checkpoints" / name)
    with pytest.raises(TornCheckpoint, match=complaint):
        verify(folder, name)
    attempt = begin_attempt(folder, 1)
    assert (attempt.attempt, attempt.resumed_from, attempt.start_step) == (2, "step_00000010-a0001", 10)
    assert name in caplog.text
    assert complaint in caplog.text
    # The step is redone under a name of its own, and the torn one goes when that counts.
    save(folder, 2, 20)
    assert folder.names("checkpoints") == ["step_00000010-a0001", "step_00000020-a0002"]


def test_with_every_checkpoint_torn_a_run_starts_over(folder: RunFolder, tmp_path: Path) -> None:
    begin_attempt(folder, 1)
    cut(tmp_path / "checkpoints" / save(folder, 1, 10))
    assert begin_attempt(folder, 1).start_step == 0


def test_attempts_are_numbered_once_whoever_asks_at_the_same_time(folder: RunFolder) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(begin_attempt(folder, 1).attempt)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 13))
    assert not [name for name in folder.names("attempts") if name.startswith(".")]


def test_a_superseded_attempt_can_write_nothing_more(folder: RunFolder) -> None:
    begin_attempt(folder, 2)
    writer = CheckpointWriter(folder, 1, keep=3)
    writer.save(tiny_state(), {"step": 10})
    writer.wait()
    assert begin_attempt(folder, 2).start_step == 10
    with pytest.raises(Fenced, match=r"attempt 1 .* superseded by attempt 2"):
        writer.save(tiny_state(), {"step": 20})
    check_fence(folder, 2)
    assert folder.names("checkpoints") == ["step_00000010-a0001"]


def test_an_attempt_superseded_during_its_write_does_not_commit(folder: RunFolder) -> None:
    """The orphan has passed the first check and is writing when the resumed run starts."""
    begin_attempt(folder, 1)
    save(folder, 1, 10)
    writer = CheckpointWriter(folder, 1, keep=3)
    reached, go_on = threading.Event(), threading.Event()
    inner = folder.write_folder

    def slow(name, files, last, before_commit):
        def wait_then_check() -> None:
            reached.set()
            assert go_on.wait(10)
            before_commit()

        inner(name, files, last, wait_then_check)

    writer.folder.write_folder = slow  # type: ignore[method-assign]
    writer.save(tiny_state(), {"step": 20})
    assert reached.wait(10)
    assert begin_attempt(RunFolder(folder.url), 1).start_step == 10
    go_on.set()
    with pytest.raises(Fenced):
        writer.wait()
    assert folder.names("checkpoints") == ["step_00000010-a0001"]


def test_what_an_orphan_wrote_beyond_the_takeover_is_never_considered(folder: RunFolder) -> None:
    """Even if it slipped past every check, by renaming its folder at the very moment."""
    begin_attempt(folder, 1)
    save(folder, 1, 10)
    begin_attempt(folder, 1)
    os.rename(folder.path("attempts/0002.json"), folder.path("hidden"))
    save(folder, 1, 20)
    os.rename(folder.path("hidden"), folder.path("attempts/0002.json"))
    assert newest_whole(folder) == "step_00000010-a0001"
    save(folder, 2, 15)
    assert newest_whole(folder) == "step_00000015-a0002"
    assert folder.names("checkpoints") == ["step_00000010-a0001", "step_00000015-a0002"]


def test_the_newest_and_the_best_are_kept(folder: RunFolder) -> None:
    begin_attempt(folder, 1)
    for step in range(1, 7):
        save(folder, 1, step, keep=2, best=checkpoint_name(min(step, 3), 1))
    assert folder.names("checkpoints") == [checkpoint_name(step, 1) for step in (3, 5, 6)]


def test_the_best_by_the_monitor_survives_a_run(tmp_path: Path) -> None:
    """With the sign turned round, the earliest validation is the best one."""
    config = pair_config(
        train__steps=8,
        train__monitor_mode="max",
        validation__samples=32,
        validation__every_steps=2,
        checkpoint__every_steps=2,
        checkpoint__keep=1,
    )
    train_in(tmp_path, config)
    losses = {line["step"]: line["metrics"]["val/loss"] for line in read_metrics(str(tmp_path)) if "val/loss" in line["metrics"]}
    best = max(losses, key=losses.__getitem__)
    assert best < 8
    assert RunFolder(str(tmp_path)).names("checkpoints") == [checkpoint_name(best, 1), checkpoint_name(8, 1)]


def test_the_state_is_copied_before_the_next_step(tmp_path: Path) -> None:
    """Weights that are changed while the write waits do not reach the file."""
    _, strategy = train_in(tmp_path, pair_config(train__steps=2))
    state = strategy.state()
    assert state is not None
    before = {name: value.clone() for name, value in state.weights.items()}
    with torch.no_grad():
        for parameter in strategy.task.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], state.weights[name]) for name in before)


def limited(folder: str) -> None:
    """Writes of more than 20 kB fail as they do on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    config = pair_config(train__steps=8, checkpoint__every_steps=2, task__hidden=32)

    def stream(first: int):
        for share in stream_from(config, 0, 1, first):
            if share.step == 5:
                # The writer is behind the loop: the checkpoint before the disk fills must be whole.
                while checkpoint_name(4, 1) not in RunFolder(folder).names("checkpoints"):
                    time.sleep(0.01)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            yield share

    train_in(folder, config, stream=stream)


def test_a_full_disk_ends_the_run_aloud_and_the_next_one_goes_on(tmp_path: Path) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    (process,) = start_workers(limited, 1, str(run), folder=scratch)
    process.join(60)
    assert process.exitcode == 1
    assert "File too large" in (scratch / "error-0").read_text()
    folder = RunFolder(str(run))
    assert folder.names("checkpoints") == [checkpoint_name(2, 1), checkpoint_name(4, 1)]
    config = pair_config(train__steps=8, checkpoint__every_steps=2, task__hidden=32)
    train_in(run, config)
    train_in(tmp_path / "whole", config)
    assert read_attempts(folder)[2].start_step == 4
    assert_identical(final_state(run), final_state(tmp_path / "whole"))


def killed_while_writing(folder: str) -> None:
    """SIGKILL when two of the files of the checkpoint at step 4 are on disk."""
    inner = RunFolder.write_folder

    def slow(self, name, files, last, before_commit):
        if name.startswith("checkpoints/step_00000004"):
            count = iter(range(10))
            real = dict(files)

            def dying(content):
                def make() -> bytes:
                    if next(count) == 2:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return content()

                return make

            files = {file: dying(content) for file, content in real.items()}
        inner(self, name, files, last, before_commit)

    RunFolder.write_folder = slow  # type: ignore[method-assign]
    train_in(folder, pair_config(train__steps=8, checkpoint__every_steps=2))


def test_killed_during_the_write_of_a_checkpoint(tmp_path: Path) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    (process,) = start_workers(killed_while_writing, 1, str(run), folder=scratch)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    folder = RunFolder(str(run))
    assert [name for name in folder.names("checkpoints") if name.startswith(".")]
    config = pair_config(train__steps=8, checkpoint__every_steps=2)
    train_in(run, config)
    train_in(tmp_path / "whole", config)
    assert read_attempts(folder)[2].resumed_from == checkpoint_name(2, 1)
    assert_identical(final_state(run), final_state(tmp_path / "whole"))
    assert losses_by_step(run) == losses_by_step(tmp_path / "whole")
    assert trace_rows(run) == trace_rows(tmp_path / "whole")
    assert not [name for name in folder.names("checkpoints") if name.startswith(".")]


def test_what_would_break_the_stream_of_a_run_is_refused(tmp_path: Path) -> None:
    train_in(tmp_path, pair_config(train__steps=2))
    with pytest.raises(ConfigError, match=r"train\.global_batch_size: received 4; allowed: 8"):
        train_in(tmp_path, pair_config(train__steps=4, train__global_batch_size=4))
    with pytest.raises(ConfigError, match=r"seed: received 4; allowed: 3"):
        train_in(tmp_path, pair_config(train__steps=4, seed=4))
    target = tmp_path / "checkpoints" / "step_00000002-a0001"
    text = (target / "state.json").read_text().replace('"digest": "digest"', '"digest": "d1gest"')
    (target / "state.json").write_text(text)
    commit = json.loads((target / "commit.json").read_text())
    commit["files"]["state.json"] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (target / "commit.json").write_text(json.dumps(commit))
    with pytest.raises(ConfigError, match=r"data\.shards: .*digest digest.*allowed: data of digest d1gest"):
        train_in(tmp_path, pair_config(train__steps=4))


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    train_in(tmp_path, pair_config(train__steps=1))
    with pytest.raises(ConfigError, match=r"task: .* of shape .* as in the checkpoint"):
        train_in(tmp_path, pair_config(train__steps=2, task__hidden=24))
    with pytest.raises(ConfigError, match=r"lacks .'frozen.bias', 'frozen.weight', 'idle'. and holds unknown nothing"):
        train_in(tmp_path, pair_config(train__steps=2, task__idle=True))


def test_a_run_lives_in_an_object_store_too(tmp_path: Path) -> None:
    import fsspec

    url = f"memory://runs/{tmp_path.name}"
    config = pair_config(train__steps=6, checkpoint__every_steps=2, checkpoint__keep=2)
    train_in(url, pair_config(train__steps=4, checkpoint__every_steps=2, checkpoint__keep=2))
    train_in(url, config)
    train_in(tmp_path, config)
    assert history(url) == [Span(1, 0, 4), Span(2, 4, None)]
    assert_identical(final_state(url), final_state(tmp_path))
    assert losses_by_step(url) == losses_by_step(tmp_path)
    assert trace_rows(url) == trace_rows(tmp_path)
    assert RunFolder(url).names("checkpoints") == ["step_00000004-a0001", "step_00000006-a0002"]
    assert not RunFolder(url).create("attempts/0002.json", b"{}")
    fsspec.filesystem("memory").rm(f"/runs/{tmp_path.name}", recursive=True)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=6))
def test_histories_merge_to_one_try_of_every_step(tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, bool]]) -> None:
    """Each attempt lives some steps, checkpoints every fourth, and may tear its last checkpoint; the last one runs to step 40."""
    folder = RunFolder(str(tmp_path_factory.mktemp("run")))
    for life, tears in [*lives, (40, False)]:
        attempt = begin_attempt(folder, 1)
        metrics, trace = MetricsLog(folder, attempt.attempt), Trace(folder, attempt.attempt, 0)
        last = None
        for step in range(attempt.start_step, min(attempt.start_step + life, 40)):
            trace.add(
                step,
                {
                    "weight": torch.ones(2).numpy(),
                    "slot": torch.tensor([2 * step, 2 * step + 1]).numpy(),
                    "row": torch.tensor([7, step]).numpy(),
                },
            )
            metrics.add(step + 1, {"train/loss": float(step)})
            if (step + 1) % 4 == 0:
                trace.flush(step + 1)
                last = save(folder, attempt.attempt, step + 1)
        if tears and last:
            cut(Path(folder.path(f"checkpoints/{last}")))
    trace.flush(40)
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, 41))
    table = read_trace(folder)
    assert table["slot"].to_pylist() == list(range(80))
    assert table["row"].to_pylist() == [row for step in range(40) for row in (7, step)]
    spans = history(folder)
    assert spans[0].first == 0
    assert [span.end for span in spans[:-1]] == [span.first for span in spans[1:]]
    for line in read_metrics(folder):
        assert line["attempt"] == next(span.attempt for span in spans if span.end is None or line["step"] <= span.end)


def test_a_line_cut_by_a_kill_is_left_out(folder: RunFolder, tmp_path: Path) -> None:
    begin_attempt(folder, 1)
    log = MetricsLog(folder, 1)
    log.add(1, {"train/loss": 2.0})
    log.add(1, {"val/loss": 3.0})
    log.committed(1)
    with (tmp_path / "metrics" / "a0001.jsonl").open("a") as file:
        file.write('{"step": 2, "metr')
    (line,) = read_metrics(folder)
    assert line["metrics"] == {"train/loss": 2.0, "val/loss": 3.0}


def test_an_attempt_number_is_taken_once(folder: RunFolder) -> None:
    assert record_attempt(folder, 1, None, 1) is not None
    assert record_attempt(folder, 1, None, 1) is None
