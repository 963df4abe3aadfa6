"""`cache` without Ray: what is read back equals what the models make of the same crops and captions; wrong calls are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_models import save_image_encoder, save_text_encoder, save_vae

from diptych import provenance
from diptych.batches import CachedNeed, ImageNeed, Needs, TokenNeed, check_batch
from diptych.config import ConfigError, DataConfig
from diptych.datasets import cached, embed_layout, images, scenes
from diptych.datasets.cached import choose_variants, join_caches
from diptych.datasets.manifest import Manifest, open_manifest
from diptych.datasets.reader import Samples, SampleSource, read_rows
from diptych.datasets.shards import ShardWriter
from diptych.pipelines import cache
from diptych.pipelines.embed_worker import EmbedWorker
from diptych.trainers.latent_encoder import FrozenEncoder, encode_posterior, encode_states, load_part

SAMPLES, SIZE = 14, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline's folder with VAE, text encoder, tokenizer and image encoder."""
    folder = tmp_path_factory.mktemp("model")
    save_vae(folder / "vae")
    save_image_encoder(folder / "image_encoder")
    return save_text_encoder(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Scenes that are larger than what the models see; one picture is cut, one caption missing."""
    folder = tmp_path_factory.mktemp("shards")
    rows: list[dict[str, Any]] = list(scenes.samples(0, 0, SAMPLES, size=48))
    rows[3]["jpg"] = rows[3]["jpg"][:200]
    del rows[8]["txt"]
    ShardWriter(str(folder), 5).write_all(rows)
    return str(folder)


@pytest.fixture(scope="module")
def manifest(shards: str) -> Manifest:
    return open_manifest(shards)


def make(kind: str, shards: str, out: Path, model: str, **options: Any) -> str:
    """A cache, computed in this process."""
    spec, about = cache.prepare(kind, shards, str(out), cache.CacheOptions(model=model, cpus_per_actor=1, partition_size=6, **options))
    embed_layout.claim(str(out), about, cached.PROVENANCE)
    worker = EmbedWorker(spec)
    for partition in range(spec.layout.partitions):
        worker.compute(partition)
    return str(out)


def read_back(manifest: Manifest, folder: str, need: CachedNeed, tmp_path: Path, slots: np.ndarray) -> Samples:
    """All rows of the data at `slots`."""
    joins = join_caches(manifest, [folder], need)
    for join in joins:
        join.save(tmp_path / "join")
    return read_rows(SampleSource.of(manifest, None, DataConfig(), joins), np.arange(SAMPLES), slots, Needs(cached=need), seed=9)


def test_latents_equal_those_of_the_cached_crops(shards: str, model: str, manifest: Manifest, tmp_path: Path) -> None:
    options = {"resize": "random_crop", "min_scale": 0.5, "crops": 2, "flips": True, "size": SIZE, "batch_size": 5, "seed": 4}
    folder = make("latents", shards, tmp_path / "latents", model, **options)
    need = CachedNeed(("latent_mean", "latent_logvar"), flip=0.5, expected={"latents": provenance.latents(model, SIZE, "random_crop", 0.5)})
    slots = np.arange(40, 40 + SAMPLES)
    read = read_back(manifest, folder, need, tmp_path, slots)
    check_batch(read.arrays | {"weight": np.ones(SAMPLES, np.float32)}, Needs(cached=need))
    assert read.arrays["latent_mean"].shape == (SAMPLES, 4, SIZE // 2, SIZE // 2)
    assert [(index, fault.kind) for index, fault in read.faults] == [(3, "missing_cached_row")]
    encoder, variants = FrozenEncoder(model, "vae"), choose_variants(9, slots, 0.5, 2, flips=True)
    assert len(set(variants.tolist())) == 4
    crop = ImageNeed(SIZE, "random_crop", min_scale=0.5)
    for row in [row for row in range(SAMPLES) if row != 3]:
        data = picture(manifest, row)
        made = images.decode_variants(data, crop, 4, row, 2, True, images.choose_decoder("auto"))
        np.testing.assert_array_equal(made[1], made[0][:, ::-1])
        online = encoder.latents(made[variants[row], None])
        for key, values in online.items():
            # Half precision rounds to 2^-11 of a value; other batch sizes differ in the last bits of fp32 besides.
            np.testing.assert_allclose(read.arrays[key][row].astype(np.float32), values[0], rtol=2**-10, atol=1e-5)


def test_an_uncropped_cache_equals_encoding_in_each_step(shards: str, model: str, manifest: Manifest, tmp_path: Path) -> None:
    folder = make("latents", shards, tmp_path / "latents", str(Path(model) / "vae"), batch_size=SAMPLES)
    need = CachedNeed(("latent_mean", "latent_logvar"), expected={"latents": provenance.latents(model, SIZE)})
    slots = np.arange(SAMPLES)
    read = read_back(manifest, folder, need, tmp_path, slots)
    pixels = read_rows(SampleSource.of(manifest, None, DataConfig()), slots, slots, Needs(image=ImageNeed(SIZE)), seed=0).arrays["image"]
    vae: Any = load_part(model, "vae")
    good = [row for row in range(SAMPLES) if row != 3]
    # The partitions' own batches, so that kernels sum alike: then equal to the last bit of what is stored.
    for rows in (good[:5], good[5:11], good[11:]):
        with torch.inference_mode():
            found = encode_posterior(vae, torch.from_numpy(pixels[rows]))
        np.testing.assert_array_equal(read.arrays["latent_mean"][rows], found.mean.numpy().astype(np.float16))
        np.testing.assert_array_equal(read.arrays["latent_logvar"][rows], found.logvar.numpy().astype(np.float16))


def test_text_states_are_those_of_the_tokens_that_training_sees(shards: str, model: str, manifest: Manifest, tmp_path: Path) -> None:
    folder = make("text-states", shards, tmp_path / "texts", model)
    need = CachedNeed(("text_states",), expected={"text-states": provenance.text_states(model)})
    slots = np.arange(SAMPLES)
    read = read_back(manifest, folder, need, tmp_path, slots)
    assert [(index, fault.kind) for index, fault in read.faults] == [(8, "missing_cached_row")]
    tokens = read_rows(
        SampleSource.of(manifest, None, DataConfig()), slots, slots, Needs(tokens=TokenNeed(str(Path(model) / "tokenizer"), 12)), seed=0
    ).arrays["tokens"]
    with torch.inference_mode():
        encoder: Any = load_part(model, "text_encoder")
        expected = encode_states(encoder, torch.from_numpy(tokens)).numpy()
    good = [row for row in range(SAMPLES) if row != 8]
    np.testing.assert_allclose(read.arrays["text_states"][good].astype(np.float32), expected[good], rtol=2**-10, atol=1e-4)


def test_image_states_enter_the_block_that_learns(shards: str, model: str, manifest: Manifest, tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, CLIPVisionModel

    folder = make("image-states", shards, tmp_path / "states", str(Path(model) / "image_encoder"), layer=2, decoder="pil")
    need = CachedNeed(("image_states",), expected={"image-states": provenance.image_states(model, 32, 2)})
    read = read_back(manifest, folder, need, tmp_path, np.arange(SAMPLES))
    assert read.arrays["image_states"].shape == (SAMPLES, 17, 16)
    pixels = images.decode_image(picture(manifest, 0), ImageNeed(32), np.zeros(4), "pil")
    processor, tower = (cls.from_pretrained(f"{model}/image_encoder") for cls in (AutoImageProcessor, CLIPVisionModel))
    with torch.inference_mode():
        states = tower(**processor(Image.fromarray(pixels), return_tensors="pt"), output_hidden_states=True).hidden_states
        # What was cached goes on through the last block to the tower's own output.
        last = tower.vision_model.encoder.layers[2] if hasattr(tower, "vision_model") else tower.encoder.layers[2]
        output = last(torch.from_numpy(read.arrays["image_states"][:1].astype(np.float32)), None)
        output = output[0] if isinstance(output, tuple) else output
    np.testing.assert_allclose(read.arrays["image_states"][0].astype(np.float32), states[2][0].numpy(), rtol=2**-9, atol=2e-3)
    np.testing.assert_allclose(output[0].numpy(), states[3][0].numpy(), rtol=1e-2, atol=5e-3)


def test_what_overflows_half_precision_is_a_fault_and_not_stored(shards: str, model: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(Path(model) / "vae", tmp_path / "vae")
    place = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(place)
    weights["quant_conv.bias"][0] += 1e6
    save_file(weights, place, metadata={"format": "pt"})
    folder = make("latents", shards, tmp_path / "out", str(tmp_path / "vae"))
    faults = json.loads((Path(folder) / "faults" / "faults_0.json").read_text())
    assert [fault["kind"] for fault in faults].count("not_finite") == 5
    assert np.load(Path(folder) / "latent_mean" / "latent_mean_0.npy").shape == (0, 1, 4, 16, 16)


@pytest.mark.parametrize(
    ("kind", "options", "complaint"),
    [
        ("pixels", {}, "latents, text-states, image-states"),
        ("latents", {"model": ""}, "--model"),
        ("latents", {"model": "/nowhere"}, "vae cannot be loaded"),
        ("latents", {"size": 33}, "a multiple of 2"),
        ("latents", {"crops": 2}, "random_crop"),
        ("text-states", {"length": 13}, "2 to 12"),
        ("image-states", {"layer": 4}, "0 to 3"),
    ],
)
def test_wrong_calls_are_refused_before_ray_starts(
    shards: str, model: str, tmp_path: Path, kind: str, options: dict, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        cache.run(kind, shards, str(tmp_path / "out"), {"model": model} | options)


def test_another_model_in_the_same_folder_is_refused_and_a_moved_one_is_not(shards: str, model: str, tmp_path: Path) -> None:
    folder = make("latents", shards, tmp_path / "latents", model)
    moved = shutil.copytree(model, tmp_path / "moved")
    assert provenance.latents(str(moved), SIZE) == provenance.latents(model, SIZE)
    with pytest.raises(ConfigError, match="seed=0"):
        make("latents", shards, Path(folder), model, seed=1)
    weights = moved / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert provenance.latents(str(moved), SIZE) != provenance.latents(model, SIZE)


def picture(manifest: Manifest, row: int) -> bytes:
    """The encoded picture of a row."""
    shard, offset, size = (int(values[0]) for values in manifest.members(np.array([row]), ["jpg"]))
    return Path(manifest.shard_url(shard)).read_bytes()[offset : offset + size]
