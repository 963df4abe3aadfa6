"""What comes from others is data: a pickle is never run, whatever place it takes, and no secret is written down."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from support_runs import make_shards
from support_training import pair_config, train_in

import diptych
from diptych.config import ConfigError
from diptych.trainers.checkpoint import load
from diptych.trainers.runfolder import RunFolder


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.fixture
def exploded(tmp_path: Path) -> Path:
    """The file that must not appear."""
    return tmp_path / "exploded"


def bomb(target: Path) -> bytes:
    data = pickle.dumps(Bomb(target))
    pickle.loads(data)
    assert target.exists(), "the bomb works"
    target.unlink()
    return data


@pytest.mark.parametrize("saved_by", ["pickle", "torch"])
def test_as_the_weights_of_a_checkpoint_with_the_right_hashes(tmp_path: Path, exploded: Path, saved_by: str) -> None:
    """Somebody who can write a run folder can make its hashes right too."""
    train_in(tmp_path / "run", pair_config(train__steps=2))
    place = tmp_path / "run/checkpoints/step_00000002-a0001"
    data = bomb(exploded)
    if saved_by == "torch":
        buffer = io.BytesIO()
        torch.save({"weight": Bomb(exploded)}, buffer)
        data = buffer.getvalue()
    (place / "model.safetensors").write_bytes(data)
    commit = json.loads((place / "commit.json").read_text())
    commit["files"]["model.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (place / "commit.json").write_text(json.dumps(commit))
    with pytest.raises(ConfigError, match=r"model.safetensors'.*a file in safetensors format"):
        load(RunFolder(str(tmp_path / "run")), place.name)
    with pytest.raises(ConfigError, match="safetensors"):
        train_in(tmp_path / "run", pair_config(train__steps=4))
    assert not exploded.exists()


def test_as_a_published_checkpoint(tmp_path: Path, exploded: Path) -> None:
    from diptych.trainers.foreign_checkpoints import read_state

    bomb(exploded)
    torch.save({"model": {"weight": torch.ones(2)}, "trainer": Bomb(exploded)}, tmp_path / "prior.pth")
    found = read_state(tmp_path / "prior.pth", ("model",))
    assert torch.equal(found["weight"], torch.ones(2)), "the tensors are read, the rest stays inert"
    assert not exploded.exists()


def test_as_an_array_of_embeddings(tmp_path: Path, exploded: Path) -> None:
    from diptych.datasets.npy import open_npy

    bomb(exploded)
    np.save(tmp_path / "img_emb_0.npy", np.array([Bomb(exploded)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickled"):
        open_npy(str(tmp_path / "img_emb_0.npy"))
    assert not exploded.exists()


SECRET = "sesame-open-4711"


@pytest.mark.parametrize("ends", ["finished", "failed"])
def test_secrets_of_the_environment_are_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, ends: str
) -> None:
    """Of a run, its evaluation, export, registered model and report: no file, no line of a log, nothing in MLflow."""
    from diptych.config import apply_overrides, load_recipe
    from diptych.pipelines import evaluate, export, report, runs, runs_folder, tracking
    from diptych.pipelines.local import train_here

    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    shards = make_shards(tmp_path / "shards", 24)
    changes = [f"data.shards={shards}", f"tracking.uri={uri}", "task.tokenizer=train:520", "train.steps=4", "train.log_every=1"]
    config = apply_overrides(load_recipe("gpt2", "smoke"), [*changes, *(["optim.lr=1e30"] if ends == "failed" else [])])
    run_dir = tmp_path / "runs" / "run"
    run_dir.mkdir(parents=True)
    tracker = tracking.Tracker(config, run_dir, None, {"digest": "d" * 64, "samples": 24})
    with tracker:
        tracker.log_environment({"resources": {"CPU": 2.0}})
        ended = train_here(config, run_dir)
    tracker.end(tracking.mlflow_status(ended["status"]))
    assert ended["status"] == ends, ended["error"]
    runs_folder.write_driver(run_dir, runs_folder.read_driver(run_dir) | {"run_id": tracker.run_id, "uri": uri})
    if ends == "finished":
        evaluate.run([str(run_dir)], samples=4)
        export.run(str(run_dir), str(tmp_path / "export"), register="writer")
    report.run([str(run_dir)], str(tmp_path / "report.html"))
    told = json.dumps(runs.run(str(tmp_path / "runs")), default=str)
    printed = capfd.readouterr()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"mlflow.db", "config.json", "driver.json", "report.html"} <= {file.name for file in files}
    assert len(list((tmp_path / "mlartifacts").rglob("*.json"))) > 1
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    assert SECRET not in told + printed.out + printed.err + caplog.text


def test_no_module_loads_pickles_of_others() -> None:
    """`pickle.load(s)` nowhere; `torch.load` with weights_only or our own unpickler; `np.load` without pickle."""
    found, calls = [], 0
    for path in Path(diptych.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)):
                continue
            call = f"{node.func.value.id}.{node.func.attr}"
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if call in ("pickle.load", "pickle.loads", "dill.loads", "joblib.load", "yaml.load", "yaml.unsafe_load"):
                found.append(f"{path.name}:{node.lineno} {call}")
            elif call == "torch.load":
                calls += 1
                if given.get("weights_only") != "True" and given.get("pickle_module") != "_TENSORS_ONLY":
                    found.append(f"{path.name}:{node.lineno} {call}")
            elif call == "np.load":
                calls += 1
                if given.get("allow_pickle") != "False":
                    found.append(f"{path.name}:{node.lineno} {call}")
    assert calls > 2
    assert not found
