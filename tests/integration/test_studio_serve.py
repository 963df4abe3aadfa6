"""The studio's models in replicas of Ray Serve give what they give in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support_runs import make_shards

from diptych.config import apply_overrides, load_recipe
from diptych.pipelines.local import train_here
from diptych.pipelines.studio_models import ServedModels, StudioModels, studio_spec
from diptych.trainers.pictures import PictureRequest, PictureSettings


def test_replicas_answer_like_models_in_this_process(ray_session, tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "shards")
    for task, *overrides in (("gpt2", "task.tokenizer=train:128"), ("stable_diffusion", "validation.samples=0")):
        train_here(apply_overrides(load_recipe(task, "smoke"), [f"data.shards={shards}", "train.steps=2", *overrides]), tmp_path / task)
    spec = studio_spec([str(tmp_path / "gpt2"), str(tmp_path / "stable_diffusion")], device="cpu")
    here, served = StudioModels(spec), ServedModels(spec, 2)
    try:
        assert served.facts() == here.facts()
        assert served.complete("a red", 3, "top-k 50", 4) == here.complete("a red", 3, "top-k 50", 4)
        requests, settings = [PictureRequest("a red circle", 1), PictureRequest("a blue star", 2)], PictureSettings(steps=2)
        np.testing.assert_array_equal(served.paint(requests, settings)[0], here.paint(requests, settings)[0])
    finally:
        served.close()
