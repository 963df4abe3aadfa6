"""Metrics of pictures against torchmetrics, the papers' formulas and values known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel

from diptych.config import ConfigError
from diptych.datasets import scenes
from diptych.datasets.tokens import train_tokenizer
from diptych.trainers import picture_metrics
from diptych.trainers.clip_embedder import Embedder
from diptych.trainers.model_name import parse_model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIP of random weights in Hugging Face's layout, 24 tokens long."""
    folder = tmp_path_factory.mktemp("clip")
    train_tokenizer([scenes.describe(0, index).caption for index in range(50)], 256, folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 256, "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=8)).save_pretrained(
        folder
    )
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(clip_folder) -> Embedder:
    return Embedder(parse_model(str(clip_folder)), precision="fp32")


def pictures_of(count: int, size: int = 32, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    found = [scenes.render(seed, index, size) for index in range(count)]
    return np.stack([np.asarray(picture) for picture, _ in found]), [caption for _, caption in found]


def test_clip_score_is_that_of_torchmetrics(clip_folder, embedder):
    from torchmetrics.multimodal.clip_score import CLIPScore

    class Pooled(CLIPModel):
        """torchmetrics 1.9 expects the features themselves, as transformers 4 gave them."""

        def get_image_features(self, *args, **kwargs):
            return super().get_image_features(*args, **kwargs).pooler_output

        def get_text_features(self, *args, **kwargs):
            return super().get_text_features(*args, **kwargs).pooler_output

    images, captions = pictures_of(6)
    metric = CLIPScore(model_name_or_path=lambda: (Pooled.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)))
    scores = []
    for image, caption in zip(images, captions, strict=True):
        metric.reset()
        metric.update(torch.from_numpy(image).permute(2, 0, 1), caption)
        scores.append(float(metric.compute()))
    found = picture_metrics.judge(embedder, images, captions)
    np.testing.assert_allclose(found.scores, scores, atol=1e-3)
    assert found.figures["clip_score"] == pytest.approx(np.mean(scores), abs=1e-3)


def test_a_long_caption_is_cut_with_its_end_token_kept(embedder):
    """What counts is the text up to the limit: torchmetrics 1.9 cuts the end token off, from which CLIP reads the caption."""
    start = " ".join(["red circle"] * 60)
    texts = picture_metrics.embed_captions(embedder, [start, start + " and a blue ring", "a red circle"])
    np.testing.assert_allclose(texts[0], texts[1], atol=1e-6)
    assert texts[0] @ texts[2] < 0.999


def test_scores_are_never_negative():
    features = np.eye(3, dtype=np.float32)
    np.testing.assert_allclose(picture_metrics.clip_scores(features, np.stack([features[0], -features[1], features[0]])), [100, 0, 0])


def test_match_counts_the_nearest_caption_and_equal_ones():
    texts = np.eye(8, dtype=np.float32)
    captions = [f"caption {index}" for index in range(8)]
    assert picture_metrics.caption_match(texts, texts, captions, among=4) == 1
    swapped = texts[[1, 0, 2, 3, 4, 5, 6, 7]]
    assert picture_metrics.caption_match(swapped, texts, captions, among=4) == 0.75
    assert picture_metrics.caption_match(swapped, texts, ["same", "same", *captions[2:]], among=4) == 1
    collapsed = np.tile(texts[:1], (8, 1))
    assert picture_metrics.caption_match(collapsed, collapsed, captions, among=4) == pytest.approx(1 / 4)


def test_frechet_distance_is_the_formula():
    random = np.random.default_rng(0)
    real, made = random.normal(size=(300, 5)), random.normal(size=(200, 5)) @ random.normal(size=(5, 5)) + 1
    gap, left, right = real.mean(0) - made.mean(0), np.cov(real.T), np.cov(made.T)
    expected = gap @ gap + np.trace(left + right - 2 * scipy.linalg.sqrtm(left @ right).real)
    assert picture_metrics.frechet(real, made) == pytest.approx(expected, rel=1e-6)
    assert picture_metrics.frechet(real, real) == pytest.approx(0, abs=1e-6)


def test_cmmd_is_the_formula():
    random = np.random.default_rng(0)
    real, made = random.normal(size=(30, 4)), random.normal(size=(20, 4)) + 0.5
    kernel = lambda x, y: np.mean([[np.exp(-np.sum((a - b) ** 2) / 200) for b in y] for a in x])  # noqa: E731
    expected = 1000 * (kernel(real, real) + kernel(made, made) - 2 * kernel(real, made))
    assert picture_metrics.cmmd(real, made) == pytest.approx(expected, rel=1e-9)
    assert picture_metrics.cmmd(real, real) == pytest.approx(0, abs=1e-9)


def test_inception_score_and_kid_on_values_known_by_hand():
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 16)).astype(np.float32)
    # Each picture surely of one of six classes, all equally often: the score is six. All of one class: one.
    sure = np.repeat(np.eye(6, dtype=np.float32) * 100, 10, axis=0)
    apart = picture_metrics.inception_distances(features, features, np.repeat(sure, 20, axis=0))
    assert apart["inception_score"] == pytest.approx(6, rel=0.05)
    alike = picture_metrics.inception_distances(features, features + 3, sure[:10])
    assert alike["inception_score"] == pytest.approx(1)
    assert alike["kid"] > 1 > apart["kid"]
    assert apart == picture_metrics.inception_distances(features, features, np.repeat(sure, 20, axis=0)), "draws are seeded"


def test_made_pictures_are_compared_with_real_ones(embedder):
    real, captions = pictures_of(24)
    noise = np.random.default_rng(0).integers(0, 255, real.shape, np.uint8)
    same = picture_metrics.judge(embedder, real, captions, real).figures
    worse = picture_metrics.judge(embedder, noise, captions, real)
    assert same["cmmd"] == pytest.approx(0, abs=1e-6)
    assert worse.figures["cmmd"] > 1e-3
    assert worse.figures["fid_clip"] > same["fid_clip"] + 0.01


def test_missing_weights_are_told_and_a_wrong_file_refused(embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    real, captions = pictures_of(4)
    found = picture_metrics.judge(embedder, real, captions, real)
    assert [text.split(":")[0] for text in found.left_out] == ["FID, KID and IS", "LPIPS"]
    assert "fid" not in found.figures
    with pytest.raises(ConfigError, match="Check the path"):
        picture_metrics.judge(embedder, real, captions, real, inception=str(tmp_path / "none.pth"))
    (tmp_path / "w.pth").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="--inception"):
        picture_metrics.judge(embedder, real, captions, real, inception=str(tmp_path / "w.pth"))


def test_blank_pictures_are_flagged():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[1] = (200, 10, 10)
    images[2, 0, 0] = 255
    assert picture_metrics.blank(images).tolist() == [True, True, False]


@pytest.mark.slow
def test_inception_and_lpips_are_those_of_torchmetrics(embedder, tmp_path, monkeypatch):
    """With random weights in the published layout: our one pass gives what each metric of torchmetrics computes by itself."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import alexnet

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = tmp_path / "checkpoints" / picture_metrics.INCEPTION_FILE
    weights.parent.mkdir()
    torch.manual_seed(0)
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
    with monkeypatch.context() as patched:
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), weights)
    torch.save(alexnet(weights=None).state_dict(), weights.parent / picture_metrics.LPIPS_FILE)
    real, captions = pictures_of(6, 64)
    made = np.stack([np.asarray(Image.fromarray(image).rotate(90)) for image in real])
    found = picture_metrics.judge(embedder, made, captions, real)
    assert found.left_out == []
    fid = FrechetInceptionDistance(feature_extractor_weights_path=str(weights)).set_dtype(torch.float64)
    perceptual = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    tensors = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (real, made)]
    fid.update(tensors[0], real=True)
    fid.update(tensors[1], real=False)
    perceptual.update(*(tensor.float() / 255 for tensor in tensors))
    assert found.figures["fid"] == pytest.approx(float(fid.compute()), rel=1e-3)
    assert found.figures["lpips"] == pytest.approx(float(perceptual.compute()), rel=1e-5)
    assert found.figures["inception_score"] >= 1
