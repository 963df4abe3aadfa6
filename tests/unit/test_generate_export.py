"""From a trained run to texts and to an exported folder: loads elsewhere, says where it comes from, refuses wrong calls."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from support_hub import hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from diptych.cli import main
from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.pipelines import export, generate, pack, tracking
from diptych.pipelines.local import train_here
from diptych.pipelines.trained import load_trained

PROMPTS = [f"a {colour} {thing}, {style}, highly detailed, 8k" for colour in ("red", "blue", "green", "pale", "dark") for thing in
           ("castle", "cat", "ship", "forest", "robot", "portrait") for style in ("oil painting", "photo", "sketch")]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A small gpt2 run with averaged weights."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    pack.run(str(folder / "prompts.txt"), str(folder / "shards"), jobs=1)
    overrides = [f"data.shards={folder}/shards", "task.tokenizer=train:520", "train.steps=40", "optim.lr=0.01", "optim.ema_decay=0.5"]
    config = apply_overrides(load_recipe("gpt2", "smoke"), overrides)
    assert train_here(config, folder / "prompts")["status"] == "finished"
    return folder / "prompts"


def test_an_export_loads_in_transformers_and_writes_the_same_texts(run_dir, tmp_path):
    result = export.run(str(run_dir), str(tmp_path / "out"))
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(result["files"])
    assert result["averaged"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(result["folder"]).eval(), AutoTokenizer.from_pretrained(result["folder"])
    given = tokenizer("<start>a red castle,", return_tensors="pt", add_special_tokens=False)
    expected = tokenizer.decode(model.generate(**given, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    (row,) = generate.run(str(run_dir), ["a red castle,"], decoding=["max_new_tokens=20"], device="cpu")["texts"]
    assert row["text"] == expected
    assert row["ended"]


def test_averaged_weights_are_exported_unless_refused(run_dir, tmp_path):
    export.run(str(run_dir), str(tmp_path / "raw"), averaged=False)
    export.run(str(run_dir), str(tmp_path / "averaged"))
    raw, averaged = (AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight for name in ("raw", "averaged"))
    assert not torch.equal(raw, averaged)
    torch.testing.assert_close(averaged, load_trained(run_dir).task.gpt2.lm_head.weight, rtol=0, atol=0)


def test_the_card_says_where_the_model_comes_from(run_dir, tmp_path):
    export.run(str(run_dir), str(tmp_path / "card"))
    card = (tmp_path / "card" / "README.md").read_text()
    digest = json.loads((run_dir / "driver.json").read_text())["digest"]
    for needed in (digest, "val/perplexity", "40 steps of 8 samples", 'pipeline("text-generation", "card")', '"global_batch_size": 8'):
        assert needed in card, needed


def test_a_run_that_was_moved_keeps_its_tokenizer(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "moved")
    stored = tmp_path / "moved" / "config.json"
    stored.write_text(stored.read_text().replace(str(run_dir), "/nowhere"))
    (row,) = generate.run(str(tmp_path / "moved"), ["a red castle,"], device="cpu")["texts"]
    assert row == generate.run(str(run_dir), ["a red castle,"], device="cpu")["texts"][0]


def test_a_registered_export_is_opened_by_mlflow_and_holds_no_pickle(run_dir, tmp_path, monkeypatch):
    import mlflow
    import pandas as pd

    copy = tmp_path / "prompts"
    shutil.copytree(run_dir, copy)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    store = tracking.client(uri)
    run = store.create_run(store.create_experiment("registry", artifact_location=(tmp_path / "artifacts").as_uri()))
    driver = json.loads((copy / "driver.json").read_text())
    with pytest.raises(ConfigError, match="a run that was tracked in MLflow"):
        export.run(str(copy), register="writer")
    (copy / "driver.json").write_text(json.dumps(driver | {"run_id": run.info.run_id, "uri": uri}))
    first, second = (export.run(str(copy), str(tmp_path / name), register="writer", track=False) for name in ("one", "two"))
    assert (first["registered"], second["registered"]) == ("models:/writer/1", "models:/writer/2")
    version = store.get_model_version("writer", "2")
    assert (version.run_id, version.tags["diptych.checkpoint"]) == (run.info.run_id, second["checkpoint"])
    assert store.get_run(run.info.run_id).info.status == "RUNNING", "as it was"
    assert not list((tmp_path / "artifacts").rglob("*.pkl"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    try:
        model = mlflow.pyfunc.load_model("models:/writer/2")
        told = model.predict(pd.DataFrame({"prompt": ["a red castle,"]}), params={"max_new_tokens": 20})
    finally:
        mlflow.set_tracking_uri(None)
    (row,) = generate.run(str(copy), ["a red castle,"], decoding=["max_new_tokens=20"], device="cpu")["texts"]
    assert told == [row["text"]]


def test_an_export_replaces_nothing_but_an_export(run_dir, tmp_path):
    first = export.run(str(run_dir))
    assert first["folder"] == str(run_dir / "export")
    assert export.run(str(run_dir))["files"] == first["files"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="an earlier export"):
        export.run(str(run_dir), str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_a_pushed_export_arrives_whole_and_private(run_dir, tmp_path):
    with hub() as server:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "diptych.pipelines.export", str(run_dir), str(tmp_path / "out"), "--push-to-hub", "me/prompts"]
        answer = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert answer.returncode == 0, answer.stderr
        assert json.loads(answer.stdout.splitlines()[-1])["pushed"].endswith("me/prompts")
        request, files = server.repositories["me/prompts"], server.files["me/prompts"]
    assert request.get("private") is True or request.get("visibility") == "private"
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_hub_that_refuses_leaves_the_export(run_dir, tmp_path, monkeypatch):
    class Answer:
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None

    def refuse(*_: object, **__: object) -> None:
        raise HfHubHTTPError("401 Unauthorized", response=Answer())  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"401 Unauthorized.*The export stands in .*pushed"):
        export.run(str(run_dir), str(tmp_path / "pushed"), push_to_hub="me/prompts")
    assert (tmp_path / "pushed" / "model.safetensors").is_file()


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_files_of_prompts_become_files_of_texts(run_dir, tmp_path, suffix):
    (tmp_path / "in.csv").write_text("id,prompt\n1,a red castle\n2,\n3," + "cat " * 90 + "\n4,a blue ship\n")
    out = tmp_path / f"out.{suffix}"
    result = generate.run(str(run_dir), [], str(tmp_path / "in.csv"), str(out), ["max_new_tokens=8"], workers=0)
    assert (result["samples_in"], result["samples_out"]) == (4, 3)
    (fault,) = result["faults"]
    assert (fault["key"], fault["kind"]) == ("2", "unusable_prompt")
    assert "92 tokens, the model holds 64" in fault["detail"]
    lines = out.read_text().splitlines()
    if suffix == "txt":
        assert lines[0].startswith("a red castle")
    elif suffix == "csv":
        assert [row["prompt"] for row in csv.DictReader(lines)] == ["a red castle", "", "a blue ship"]
    else:
        assert json.loads(lines[2])["text"].startswith("a blue ship")


def test_keywords_count_the_given_ones_and_seeds_repeat(run_dir):
    decoding = ["sample=true", "num_samples=3", "keywords=2", "with_prompt=true", "seed=7"]
    one, two = (generate.run(str(run_dir), ["a red castle"], decoding=decoding)["texts"] for _ in range(2))
    assert one == two
    assert all(row["text"].count(",") <= 1 for row in one)


def test_wrong_calls_end_with_status_2(run_dir, tmp_path, capsys):
    calls = [
        (["generate", str(run_dir), "--strategy", "greed"], "--strategy: received 'greed'"),
        (["generate", str(run_dir), "top_q=1"], "Did you mean top_"),
        (["generate", str(run_dir), "--prompt", "cat " * 90], "--prompt: received"),
        (["generate", str(run_dir), "--out", str(tmp_path / "x.doc")], "--out: received"),
        (["generate", str(tmp_path)], "RUN: received"),
        (["export", str(run_dir), str(tmp_path / "o"), "--checkpoint", "step_1"], "step_1"),
    ]
    for call, message in calls:
        with pytest.raises(SystemExit) as end:
            main(call)
        assert end.value.code == 2, call
        assert message in capsys.readouterr().err.replace("\n", ""), call


def test_the_command_prints_texts_and_json(run_dir, capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", str(run_dir), "--prompt", "a blue cat,", "--json", "max_new_tokens=5"])
    assert end.value.code == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("a blue cat,")
    assert json.loads(last)["samples_out"] == 1
