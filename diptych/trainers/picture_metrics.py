"""How good made pictures are: CLIP score and match with their captions, distances to real pictures, blank or failed ones.

Distances on CLIP features (CMMD, FID-CLIP) need no weights but those of the CLIP that judges. FID, KID, IS and LPIPS are torchmetrics'
own, on Inception's and AlexNet's published weights: measured where the files lie in torch's cache, and told apart where they do not.
Shape legend: N pictures, H and W pixels, D dimensions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diptych.config import ConfigError
from diptych.trainers.retrieval import recall_at

if TYPE_CHECKING:
    from diptych.trainers.clip_embedder import Embedder

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
LPIPS_FILE = "alexnet-owt-7be5be79.pth"
_BATCH = 64
_CMMD_SIGMA, _CMMD_SCALE = 10.0, 1000.0
_BLANK_LEVELS = 4
"""A picture whose brightest and darkest values differ by no more, in every channel, shows nothing (a safety checker's black one)."""


def embed_pictures(embedder: Embedder, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """float32 [N, D], L2-normalised, of uint8 [N, H, W, 3]."""
    parts = []
    for start in range(0, len(images), _BATCH):
        pixels = [embedder.pixels(Image.fromarray(image)) for image in images[start : start + _BATCH]]
        parts.append(embedder.images(np.stack(pixels)))
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def embed_captions(embedder: Embedder, captions: Sequence[str]) -> np.ndarray:
    """float32 [N, D], L2-normalised; a caption beyond the model's length is cut with its end token kept."""
    parts = [embedder.texts(captions[start : start + _BATCH]) for start in range(0, len(captions), _BATCH)]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def clip_scores(pictures: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """float64 [N]: max(100 · cosine, 0) of features in the same row, each [N, D] and normalised. Source: torchmetrics' `CLIPScore`."""
    return np.maximum(100 * np.einsum("nd,nd->n", pictures.astype(np.float64), captions.astype(np.float64)), 0)


def prompt_scores(embedder: Embedder | None, images: Sequence[np.ndarray | None], prompts: Sequence[str]) -> list[float | None]:
    """CLIP score of each picture, uint8 [H, W, 3], with its prompt; None without a picture, a prompt or a CLIP."""
    scores: list[float | None] = [None] * len(prompts)
    found = {index: image for index, image in enumerate(images) if image is not None and prompts[index]}
    if embedder is not None and found:
        captions = embed_captions(embedder, [prompts[index] for index in found])
        values = clip_scores(embed_pictures(embedder, list(found.values())), captions)
        for index, value in zip(found, values.tolist(), strict=True):
            scores[index] = value
    return scores


def caption_match(pictures: np.ndarray, texts: np.ndarray, captions: Sequence[str], among: int = 100) -> float:
    """Share of pictures whose own caption is the nearest of `among`; chance is 1 / `among`.

    Pictures are judged in groups of `among` neighbours (the rest, if fewer, left out; all of them where there is no whole group).
    Equal captions are each other's right answers. pictures, texts: [N, D], normalised.
    """
    size = min(among, len(captions))
    starts = range(0, len(captions) - size + 1, size) if size else ()
    same = torch.from_numpy(np.unique(np.array(captions, dtype=object).astype(str), return_inverse=True)[1])
    image, text = torch.from_numpy(pictures).double(), torch.from_numpy(texts).double()
    parts = [slice(start, start + size) for start in starts]
    shares = [recall_at(image[part], text[part], same[part], (1,))[1] for part in parts]
    return sum(shares) / len(shares) if shares else math.nan


def cmmd(real: np.ndarray, made: np.ndarray) -> float:
    """Maximum mean discrepancy of CLIP features, times 1,000, with a Gaussian kernel of width 10; real, made: [N, D], normalised.

    Source: Jayasumana et al., "Rethinking FID", 2024: the biased estimate of their published code.
    """
    real, made = real.astype(np.float64), made.astype(np.float64)
    return _CMMD_SCALE * (_mean_kernel(real, real) + _mean_kernel(made, made) - 2 * _mean_kernel(real, made))


def _mean_kernel(left: np.ndarray, right: np.ndarray) -> float:
    norms = (right**2).sum(1)
    total = 0.0
    for start in range(0, len(left), 1024):
        part = left[start : start + 1024]
        squares = (part**2).sum(1)[:, None] + norms - 2 * part @ right.T
        total += float(np.exp(-squares / (2 * _CMMD_SIGMA**2)).sum())
    return total / (len(left) * len(right))


class _Given(nn.Module):
    """Hands features through to a metric of torchmetrics that would otherwise compute them."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Features as they came."""
        return features


def frechet(real: np.ndarray, made: np.ndarray) -> float:
    """Fréchet distance of two Gaussians with the moments of the features [N, D]; on CLIP features FID-CLIP, on Inception's FID."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(real.shape[1])).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real).double(), real=True)
    metric.update(torch.from_numpy(made).double(), real=False)
    return float(metric.compute())


def clip_distances(real: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """`cmmd` and `fid_clip` between real and made pictures' CLIP features, each [N, D] and normalised."""
    return {"cmmd": cmmd(real, made), "fid_clip": frechet(real, made)}


def cached_weights(name: str) -> Path | None:
    """The file `name` where torch's hub keeps downloads, or None."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    return path if path.is_file() else None


class Inception:
    """Inception-v3 as FID knows it (torch-fidelity's port of the 2015 TensorFlow graph)."""

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        """`weights`: a file of torch-fidelity's. Raises `ConfigError` for one that holds anything but the right tensors."""
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            torch.load(weights, weights_only=True)  # torch-fidelity itself would unpickle whatever stands in the file
            self.model = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights)).to(device)
        except Exception as error:
            allowed = "torch-fidelity's file of Inception-v3 weights"
            raise ConfigError("--inception", str(weights), allowed, f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        self.device = torch.device(device)

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pooled [N, 2048], logits [N, 1008]) of uint8 [N, H, W, 3]."""
        pooled, logits = [], []
        for start in range(0, len(images), _BATCH):
            batch = torch.from_numpy(images[start : start + _BATCH]).permute(0, 3, 1, 2).to(self.device)
            # Its `forward` keeps the first of the features only; FID, KID and IS share one pass here.
            found = self.model._torch_fidelity_forward(batch)
            pooled.append(found[0].float().cpu().numpy())
            logits.append(found[1].float().cpu().numpy())
        return np.concatenate(pooled), np.concatenate(logits)


def inception_distances(real: np.ndarray, made: np.ndarray, logits: np.ndarray, seed: int = 0) -> dict[str, float]:
    """`fid`, `kid`, `inception_score` from pooled features of real and made pictures, and logits of the made ones.

    KID takes 100 subsets of at most 1,000, IS ten splits, as torchmetrics does; `seed` fixes both draws. IS is that of the made
    pictures. Scores over fewer than some thousand pictures are biased, and only comparable at one number of them.
    """
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    subset = min(1000, len(real), len(made))
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features", category=UserWarning)
        torch.manual_seed(seed)
        kid = KernelInceptionDistance(feature=_Given(real.shape[1]), subset_size=subset)
        kid.update(torch.from_numpy(real), real=True)
        kid.update(torch.from_numpy(made), real=False)
        kid_mean, kid_std = kid.compute()
        score = InceptionScore(feature=_Given(logits.shape[1]), splits=min(10, len(logits)))
        score.update(torch.from_numpy(logits))
        score_mean, score_std = score.compute()
    return {
        "fid": frechet(real, made),
        "kid": float(kid_mean),
        "kid_std": float(kid_std),
        "inception_score": float(score_mean),
        "inception_score_std": float(score_std),
    }


def lpips(real: np.ndarray, made: np.ndarray, device: torch.device | str = "cpu") -> float:
    """Mean LPIPS (AlexNet) between pictures in the same row, uint8 [N, H, W, 3] of one size of at least 32 pixels."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device)
    for start in range(0, len(real), _BATCH):
        pairs = (torch.from_numpy(images[start : start + _BATCH]).permute(0, 3, 1, 2).float().to(device) / 255 for images in (real, made))
        metric.update(*pairs)
    return float(metric.compute())


def blank(images: np.ndarray) -> np.ndarray:
    """bool [N]: pictures of one colour, such as the black ones that a safety checker leaves; uint8 [N, H, W, 3]."""
    flat = images.reshape(len(images), -1, 3)
    return (np.ptp(flat, axis=1) <= _BLANK_LEVELS).all(axis=1)


@dataclass(frozen=True)
class Judged:
    """What `judge` found."""

    figures: dict[str, float]
    """Over all pictures."""
    scores: np.ndarray
    """float64 [N]: CLIP score of each."""
    left_out: list[str]
    """A sentence for each figure that could not be measured."""


def judge(
    embedder: Embedder, made: np.ndarray, captions: Sequence[str], real: np.ndarray | None = None, inception: str = ""
) -> Judged:  # fmt: skip
    """All figures of made pictures, uint8 [N, H, W, 3], of `captions`; distances need `real` ones, [M, H, W, 3].

    `inception` is a file of Inception weights; empty = torch's cache. LPIPS takes the row's own real picture, so it needs N = M of one size.
    """
    pictures, texts = embed_pictures(embedder, made), embed_captions(embedder, captions)
    scores = clip_scores(pictures, texts)
    figures: dict[str, float] = {
        "clip_score": float(scores.mean()),
        "clip_score_std": float(scores.std()),
        "caption_match": caption_match(pictures, texts, captions),
        "blank_share": float(blank(made).mean()),
    }
    left_out: list[str] = []
    if real is not None and min(len(real), len(made)) > 1:
        figures |= clip_distances(embed_pictures(embedder, real), pictures)
        figures |= _weighted(made, real, inception, embedder.device, left_out)
    return Judged(figures, scores, left_out)


def _weighted(made: np.ndarray, real: np.ndarray, inception: str, device: Any, left_out: list[str]) -> dict[str, float]:
    """What needs published weights; what lacks them is told in `left_out`."""
    figures: dict[str, float] = {}
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if inception and not Path(inception).is_file():
        raise ConfigError("--inception", inception, "a file of Inception-v3 weights", "Check the path.")
    weights = Path(inception) if inception else cached_weights(INCEPTION_FILE)
    if weights is None:
        left_out.append(f"FID, KID and IS: no Inception weights; put torch-fidelity's {INCEPTION_FILE} into {cache}, or name it")
    else:
        model = Inception(weights, device)
        (pooled, _), (made_pooled, logits) = model.features(real), model.features(made)
        figures |= inception_distances(pooled, made_pooled, logits)
    if cached_weights(LPIPS_FILE) is None:
        left_out.append(f"LPIPS: no AlexNet weights; put torchvision's {LPIPS_FILE} into {cache}")
    elif real.shape != made.shape:
        left_out.append("LPIPS: real and made pictures do not come in pairs of one size")
    else:
        figures["lpips"] = lpips(real, made, device)
    return figures
