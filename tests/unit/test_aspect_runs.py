"""Runs of Stable Diffusion on aspect buckets keep the promises: each sample counts the same, any workers, resumption, caches, pictures."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from support_distributed import run_workers
from support_sd import tiny_pipeline
from support_training import assert_identical, final_state, losses_by_step, trace_rows

from diptych import provenance
from diptych.config import ConfigError, RunConfig, TrainConfig, apply_overrides
from diptych.datasets import cached, embed_layout, scenes
from diptych.datasets.shards import ShardWriter
from diptych.datasets.stream import LocalStream
from diptych.pipelines import cache, train
from diptych.pipelines.embed_worker import EmbedWorker
from diptych.pipelines.local import train_here
from diptych.pipelines.prepare import prepare
from diptych.pipelines.samples import write_samples
from diptych.pipelines.session import payload_of, run_session
from diptych.trainers.micro_batches import make_micro_batches, to_device
from diptych.trainers.objective import accumulate, local_weights
from diptych.trainers.pictures import PictureRequest, PictureSettings, seeded_noise
from diptych.trainers.sd_painter import SdPainter
from diptych.trainers.strategies import make_strategy
from diptych.trainers.tasks.stable_diffusion import StableDiffusionTask
from diptych.trainers.validation import mean_terms

SAMPLES, BATCH = 40, 7
SIZES = [(32, 32), (60, 36), (36, 60), (30, 45), (200, 60)]
BUCKETS = ["task.aspect_buckets=true", "task.bucket_reso_steps=4"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Captioned scenes in five sizes, wide to tall."""
    folder, rows = tmp_path_factory.mktemp("shards"), []
    for number, row in enumerate(scenes.samples(0, 0, SAMPLES, size=64)):
        file = io.BytesIO()
        Image.open(io.BytesIO(row["jpg"])).resize(SIZES[number % 5]).save(file, "PNG")
        rows.append({"png": file.getvalue(), "txt": row["txt"]})
    ShardWriter(str(folder), 16).write_all(rows)
    return str(folder)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def configured(shards: str, *overrides: str) -> RunConfig:
    """The recipe `smoke` on buckets; a global batch that no number of workers divides."""
    common = [f"data.shards={shards}", "data.trace=true", "data.shuffle_chunk=2", f"train.global_batch_size={BATCH}", "task.show_count=0"]
    common += ["validation.batch_size=5", "train.steps=6", "task.caption_drop=0.2", "seed=1"]
    return train.resolve("stable_diffusion", "smoke", "", [*common, *BUCKETS, *overrides])


def first_share(config: RunConfig, folder: Path) -> tuple[StableDiffusionTask, dict[str, np.ndarray]]:
    """A task and the first global batch, whose pictures have all three shapes."""
    prepared = prepare(config, folder)
    task = StableDiffusionTask(prepared.config.task, config.seed).eval()
    return task, next(iter(LocalStream(prepared.train, 0, 1, 0, 1))).arrays


def test_the_loss_of_a_mixed_batch_is_the_mean_over_its_samples_one_by_one(shards: str, tmp_path: Path) -> None:
    task, arrays = first_share(configured(shards), tmp_path)
    assert set(arrays["bucket"].tolist()) == {0, 1, 2}
    losses = {}
    for row in range(BATCH):
        one = {key: values[row : row + 1] for key, values in arrays.items()}
        (micro,) = make_micro_batches(task, one, 1, torch.device("cpu"))
        height, width = micro["image"].shape[1:3]
        assert micro["noise"].shape[2:] == (height // 2, width // 2)
        losses[int(arrays["slot"][row])] = task(micro).terms["diffusion"].sum.item()
    strategy = make_strategy(RunConfig(task=task.config, train=TrainConfig(precision="fp32")), task)
    micros = make_micro_batches(task, arrays, 1, torch.device("cpu"))
    assert len(micros) == 3
    terms, _ = accumulate(strategy, micros, local_weights(task, micros), seed=0, step=0)
    assert float(terms["diffusion"].weight) == BATCH
    assert float(terms["diffusion"].sum) == pytest.approx(sum(losses.values()), rel=1e-5)


def gradients(config: RunConfig, folder: str, strategies: list[str]) -> dict[str, Any]:
    """Loss, gradients and number of micro-batches of the first step, or the weights after it under ZeRO; on every worker."""
    found = {}
    for name in strategies:
        # Adam's first step is of the rate's size whatever the gradient's; with so large an epsilon it is in proportion to it.
        changed = apply_overrides(config, [f"train.strategy={name}", "optim.eps=1"])
        prepared = prepare(changed, Path(folder))
        strategy = make_strategy(changed, StableDiffusionTask(prepared.config.task, 0))
        task, world = strategy.task, strategy.world
        task.eval()
        share = next(iter(LocalStream(prepared.train, world.rank, world.size, 0, 1)))
        micros = make_micro_batches(task, share.arrays, 1, world.device)
        totals = {term: world.sum_(weight).float() for term, weight in local_weights(task, micros).items()}
        terms, _ = accumulate(strategy, micros, totals, seed=0, step=0)
        grads = {key: value.grad.clone() for key, value in task.named_parameters() if value.grad is not None} if name == "ddp" else {}
        strategy.step(0, 1.0)
        found[name] = (len(micros), mean_terms(world, terms), grads, strategy.state())
    return found


def test_workers_with_different_numbers_of_micro_batches_are_one_worker(shards: str, tmp_path: Path) -> None:
    config = configured(shards)
    prepare(config, tmp_path)
    (_, expected_loss, expected, _) = gradients(config, str(tmp_path), ["ddp"])["ddp"]
    ranks = run_workers(gradients, 2, config, str(tmp_path), ["ddp", "zero1"], deadline_seconds=240)
    assert len({rank["ddp"][0] for rank in ranks}) > 1, "the test's own premise"
    for rank in ranks:
        _, loss, found, _ = rank["ddp"]
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert rank["zero1"][1] == pytest.approx(expected_loss, abs=1e-5)
        worst = max(float((found[key] - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1)) for key in expected)
        assert worst < 1e-5
    weights = [ranks[0][name][3].weights for name in ("ddp", "zero1")]
    for key, value in weights[0].items():
        assert torch.allclose(weights[1][key], value, atol=1e-6)


def session(config: RunConfig, folder: str) -> dict[str, Any]:
    """This worker's part of a run."""
    run_dir = Path(folder)
    return run_session(payload_of(prepare(config, run_dir), run_dir), config, torch.device("cpu"), LocalStream)


def test_resumed_is_uninterrupted_and_two_workers_are_one(shards: str, tmp_path: Path) -> None:
    whole, resumed, together = (tmp_path / name for name in ("whole", "resumed", "together"))
    result = train_here(configured(shards), whole)
    assert result["status"] == "finished"
    for steps in (2, 6):
        train_here(configured(shards, f"train.steps={steps}"), resumed)
    assert_identical(final_state(whole), final_state(resumed))
    assert losses_by_step(resumed) == losses_by_step(whole)
    assert trace_rows(resumed) == trace_rows(whole)
    # Three steps on one worker, the rest on two.
    train_here(configured(shards, "train.steps=3"), together)
    config = apply_overrides(RunConfig.from_json((together / "config.json").read_text()), ["train.steps=6"])
    results = run_workers(session, 2, config, str(together), deadline_seconds=240)
    assert [result["status"] for result in results] == ["finished"] * 2
    assert trace_rows(together) == trace_rows(whole)
    assert losses_by_step(together) == pytest.approx(losses_by_step(whole), abs=1e-4)
    assert results[0]["metrics"]["val/loss"] == pytest.approx(result["metrics"]["val/loss"], abs=1e-4)


def test_the_order_is_that_of_squares(shards: str, tmp_path: Path) -> None:
    train_here(configured(shards, "train.steps=2"), tmp_path / "buckets")
    train_here(configured(shards, "train.steps=2", "task.aspect_buckets=false"), tmp_path / "squares")
    assert trace_rows(tmp_path / "buckets") == trace_rows(tmp_path / "squares")


def make_cache(shards: str, out: Path, model: Path, **options: Any) -> str:
    """A cache of latents, computed in this process."""
    chosen = cache.CacheOptions(model=str(model), size=16, cpus_per_actor=1, partition_size=9, **options)
    spec, about = cache.prepare("latents", shards, str(out), chosen)
    embed_layout.claim(str(out), about, cached.PROVENANCE)
    worker = EmbedWorker(spec)
    for partition in range(spec.layout.partitions):
        worker.compute(partition)
    return str(out)


def test_cached_latents_give_the_losses_of_encoding_in_each_step(shards: str, pipeline: Path, tmp_path: Path) -> None:
    folder = make_cache(shards, tmp_path / "cache", pipeline, aspect_buckets=True, bucket_reso_steps=4, flips=True)
    common = [f"task.pretrained={pipeline}", "task.tokenizer=", "task.context_length=77", "task.train=unet"]
    online = configured(shards, *common)
    read = configured(shards, *common, "task.cached=latents", f"data.caches={folder}")
    assert read.task.needs().keys == ("slot", "row", "weight", "bucket", "tokens", "token_mask", "latent_mean", "latent_logvar")
    train_here(online, tmp_path / "online")
    train_here(read, tmp_path / "cached")
    assert trace_rows(tmp_path / "cached") == trace_rows(tmp_path / "online")
    # Half precision rounds the cached values.
    assert losses_by_step(tmp_path / "cached") == pytest.approx(losses_by_step(tmp_path / "online"), rel=2e-3)


@pytest.mark.parametrize(
    "made_with", [{}, {"aspect_buckets": True, "bucket_reso_steps": 4, "max_aspect": 4.0}], ids=["squares", "other shapes"]
)
def test_a_cache_of_other_shapes_is_refused(shards: str, pipeline: Path, tmp_path: Path, made_with: dict[str, Any]) -> None:
    folder = make_cache(shards, tmp_path / "cache", pipeline, **made_with)
    common = [f"task.pretrained={pipeline}", "task.tokenizer=", "task.train=unet", "task.cached=latents", f"data.caches={folder}"]
    with pytest.raises(ConfigError, match=r"buckets=.*20x12.*stale") as caught:
        prepare(configured(shards, *common), tmp_path)
    assert caught.value.key == "data.caches"


def test_a_run_on_squares_refuses_a_cache_of_buckets_and_takes_one_older_than_buckets(shards: str, pipeline: Path, tmp_path: Path) -> None:
    folder = make_cache(shards, tmp_path / "cache", pipeline, aspect_buckets=True, bucket_reso_steps=4)
    common = [f"task.pretrained={pipeline}", "task.tokenizer=", "task.train=unet", "task.cached=latents", f"data.caches={folder}"]
    with pytest.raises(ConfigError, match="buckets=None"):
        prepare(configured(shards, *common, "task.aspect_buckets=false"), tmp_path)
    assert provenance.latents(str(pipeline), 16)["buckets"] is None


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["task.train=vae"], "task.aspect_buckets"),
        (["task.bucket_reso_steps=6"], "task.bucket_reso_steps"),
        (["task.bucket_reso_steps=2"], "task.bucket_reso_steps"),
        (["task.max_aspect=1.5"], "task.max_aspect"),
        (["workers=2", "train.strategy=zero3"], "train.strategy"),
        (["workers=1..2", "train.strategy=zero2"], "train.strategy"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(shards: str, overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(shards, *overrides)
    assert caught.value.key == key


def test_steps_that_a_published_model_does_not_divide_are_refused(shards: str, pipeline: Path) -> None:
    config = configured(shards, f"task.pretrained={pipeline}", "task.tokenizer=", "task.bucket_reso_steps=2")
    with pytest.raises(ConfigError, match="a multiple of 4"):
        StableDiffusionTask(config.task, 0)


def test_validation_shows_whole_pictures(shards: str, tmp_path: Path) -> None:
    task, arrays = first_share(configured(shards, "task.show_count=3"), tmp_path)
    wide = np.argsort(arrays["bucket"], kind="stable")
    batch = to_device({key: values[wide] for key, values in arrays.items()}, torch.device("cpu"))
    with torch.no_grad():
        table = task.show(batch)
        write_samples(tmp_path / "samples", 1, task, batch)
    assert table is not None
    prompts = table.grids[0]
    assert (prompts.columns, prompts.images.shape[1:]) == (2, (16, 16, 3))
    first = prompts.images[0]
    assert (first[[0, -1]] == 255).all(), "a wide picture has white above and below"
    assert (first[8] < 255).any()
    assert len(list((tmp_path / "samples").iterdir())) == 3


@pytest.mark.parametrize("shape", [(16, 24), (24, 8)])
def test_pictures_of_any_shape_are_those_of_diffusers(pipeline: Path, shape: tuple[int, int]) -> None:
    config = train.resolve(
        "stable_diffusion", "lora_reports", "", [f"task.pretrained={pipeline}", "task.image_size=16", "data.shards=shards"]
    )
    painter = SdPainter(StableDiffusionTask(config.task, 3).eval(), base=True)
    height, width = shape
    requests = [PictureRequest("a red thing", 1), PictureRequest("blue", 2)]
    settings = PictureSettings(steps=4, guidance=(3.0,), height=height, width=width)
    found = painter.paint(requests, settings)
    peer = StableDiffusionPipeline.from_pretrained(str(pipeline), safety_checker=None)
    peer.set_progress_bar_config(disable=True)
    expected = peer(
        prompt=[request.prompt for request in requests],
        latents=seeded_noise(requests, "start", (4, height // 2, width // 2)),
        num_inference_steps=4,
        guidance_scale=3.0,
        height=height,
        width=width,
        output_type="np",
    ).images
    assert found.shape == (2, height, width, 3)
    assert np.abs(found.astype(int) - (expected * 255).round()).max() <= 1


def test_kept_pixels_of_a_tall_picture_stay_and_wrong_sides_are_refused(pipeline: Path) -> None:
    config = train.resolve(
        "stable_diffusion", "lora_reports", "", [f"task.pretrained={pipeline}", "task.image_size=16", "data.shards=shards"]
    )
    painter = SdPainter(StableDiffusionTask(config.task, 3).eval())
    image = np.random.default_rng(0).integers(0, 256, (24, 8, 3), np.uint8)
    keep = np.zeros((24, 8), bool)
    keep[:10] = True
    settings = PictureSettings(steps=2, guidance=(1.0,), height=24, width=8)
    made = painter.paint([PictureRequest("red", 1, image, keep), PictureRequest("red", 1, image), PictureRequest("red", 1)], settings)
    assert np.array_equal(made[0][keep], image[keep])
    for key, wrong in itertools.product(("height", "width"), (18,)):
        with pytest.raises(ConfigError, match="a multiple of 4") as caught:
            painter.paint([PictureRequest("red", 1)], PictureSettings(**{key: wrong}))
        assert caught.value.key == key
