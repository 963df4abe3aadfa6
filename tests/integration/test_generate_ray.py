"""Files of prompts through a pool of Ray Data actors: the same texts as in one process, in the order of the file."""

from __future__ import annotations

from pathlib import Path

from diptych.config import apply_overrides, load_recipe
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
