"""Files of prompts through a pool of Ray Data actors: the same texts as in one process, in the order of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_runs import make_shards

from diptych.config import ConfigError, apply_overrides, load_recipe
from diptych.pipelines import generate, pack
from diptych.pipelines.local import train_here


def test_actors_write_the_texts_of_one_process(ray_session, tmp_path: Path):
    prompts = [f"a {colour} {thing}, oil painting, 8k" for colour in ("red", "blue", "pale") for thing in ("cat", "ship", "castle")] * 20
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    pack.run(str(tmp_path / "prompts.txt"), str(tmp_path / "shards"), jobs=1)
    config = apply_overrides(load_recipe("gpt2", "smoke"), [f"data.shards={tmp_path}/shards", "task.tokenizer=train:64", "train.steps=5"])
    train_here(config, tmp_path / "run")
    decoding = ["sample=true", "num_samples=2", "max_new_tokens=6"]
    outputs = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}.jsonl"
        result = generate.run(str(tmp_path / "run"), [], str(tmp_path / "prompts.txt"), str(out), decoding, workers=workers, device="cpu")
        assert (result["samples_in"], result["samples_out"], result["faults"]) == (180, 360, [])
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1]


def test_actors_make_the_shards_of_one_process(ray_session, tmp_path: Path):
    """Stable Diffusion with prompts that a gpt2 run wrote: pairs as a data set, the same bytes from a pool, refusals said plainly."""
    shards = make_shards(tmp_path / "shards")
    for task, *overrides in (("gpt2", "task.tokenizer=train:128"), ("stable_diffusion", "validation.samples=0")):
        train_here(apply_overrides(load_recipe(task, "smoke"), [f"data.shards={shards}", "train.steps=2", *overrides]), tmp_path / task)
    settings = ["steps=2", "sample=true", "num_samples=5", "max_new_tokens=6", "seed=3"]
    found = []
    for workers in (0, 2):
        options = {"shards": str(tmp_path / f"pairs{workers}"), "samples_per_shard": 4, "prompts_from": str(tmp_path / "gpt2"), "seed": 11}
        result = generate.run(
            str(tmp_path / "stable_diffusion"), ["a red", "a blue"], decoding=settings, workers=workers, device="cpu", pictures=options
        )
        assert (result["samples_in"], result["samples_out"], result["faults"]) == (10, 10, [])
        found.append({tar.name: tar.read_bytes() for tar in (tmp_path / f"pairs{workers}").glob("*.tar")})
    assert len(found[0]) == 3
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match="sampler"):
        generate.run(
            str(tmp_path / "stable_diffusion"), ["a red"] * 3, out=str(tmp_path / "out"), decoding=["sampler=best"], workers=1, device="cpu"
        )
