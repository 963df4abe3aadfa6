"""Models that turn pictures and captions into embeddings: open_clip's, exported CoCas, Hugging Face CLIPs, sentence models.

Each is told by one string (`model_name.parse_model`), loads from the hub or a local folder, and preprocesses exactly as its own library
does at inference. Shape legend: B rows, S pixels of the square input, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diptych.config import ConfigError
from diptych.trainers.model_name import ALLOWED, ModelName
from diptych.trainers.precision import resolve_precision


class Embedder:
    """A loaded model in evaluation mode. `pixels` may be called from many threads, the others from one at a time."""

    def __init__(self, name: ModelName, device: str = "cpu", precision: str = "auto") -> None:
        """Raises `ConfigError` if the weights cannot be loaded."""
        self.device = torch.device(device)
        self.precision = resolve_precision(precision, self.device)
        try:
            parts = {"open_clip": _load_open_clip, "hf": _load_hugging_face, "sentence": _load_sentence}[name.kind](name)
        except ConfigError:
            raise
        except Exception as error:  # Three libraries and their transports raise what they like.
            raise ConfigError("--model", name.name, ALLOWED, f"It cannot be loaded: {type(error).__name__}: {error}") from error
        self.model = parts.model.to(self.device).eval()
        self.parts = parts
        self.mean = torch.tensor(parts.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(parts.std, device=self.device).view(1, 3, 1, 1)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it embeds: `image`, `text`."""
        return ("image", "text") if self.parts.fit is not None else ("text",)

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """A picture → uint8 `[S, S, 3]`, resized and cropped as the model's library does. Raises what decoding it raises."""
        assert self.parts.fit is not None
        picture.load()
        return np.array(self.parts.fit(picture if picture.mode in ("RGB", "L") else picture.convert("RGB")).convert("RGB"))

    def warm_up(self, modalities: Sequence[str]) -> dict[str, int]:
        """Dimension of each modality, from one blank sample. Raises `ConfigError` if the model lacks one."""
        for name in modalities:
            if name not in self.modalities:
                raise ConfigError("--modality", name, ", ".join(self.modalities), "A sentence model embeds texts alone: --modality text.")
        found = {"text": self.texts(["a"])} if "text" in modalities else {}
        if "image" in modalities:
            found["image"] = self.images(self.pixels(Image.new("RGB", (64, 64)))[None])
        return {name: vectors.shape[1] for name, vectors in found.items()}

    @torch.inference_mode()
    def images(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 `[B, S, S, 3]` → float32 `[B, D]`, L2-normalised."""
        batch = torch.from_numpy(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        batch.div_(255).sub_(self.mean).div_(self.std)
        with self.precision.autocast():
            assert self.parts.encode_image is not None
            found = self.parts.encode_image(batch)
        return F.normalize(found.float(), dim=-1).cpu().numpy()

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """B captions → float32 `[B, D]`, L2-normalised."""
        with self.precision.autocast():
            found = self.parts.encode_text(list(captions), self.device)
        return F.normalize(found.float(), dim=-1).cpu().numpy()


@dataclass
class _Parts:
    model: nn.Module
    fit: Callable[[Image.Image], Image.Image] | None
    mean: Sequence[float]
    std: Sequence[float]
    encode_image: Callable[[Tensor], Tensor] | None
    encode_text: Callable[[list[str], torch.device], Tensor]


def _load_open_clip(name: ModelName) -> _Parts:
    from diptych import clip_library
    from diptych.clip_library import open_clip

    if name.config_file:
        open_clip.add_model_config(name.config_file)
    clip_library.complete(open_clip.get_model_config(name.name) or {})
    model, _, preprocess = open_clip.create_model_and_transforms(name.name, pretrained=name.weights or None)
    tokenizer = open_clip.get_tokenizer(name.name)
    # All but the last two steps (to tensor, normalise), which run on the device.
    fit, normalise = open_clip.transform.Compose(preprocess.transforms[:-2]), preprocess.transforms[-1]

    # Towers that take the state of a caption's end under a causal mask: nothing that counts sees the padding behind it.
    cuts = type(model) is open_clip.CLIP and model.text_pool_type == "argmax" and model.attn_mask is not None

    def encode_text(captions: list[str], device: torch.device) -> Tensor:
        tokens = tokenizer(captions).to(device)
        return _encode_without_padding(model, tokens) if cuts else model.encode_text(tokens)

    return _Parts(model, fit, normalise.mean, normalise.std, model.encode_image, encode_text)


def _encode_without_padding(model: Any, tokens: Tensor) -> Tensor:
    """`encode_text` of an open_clip `CLIP` on `tokens` [B, T], of which only the columns up to the longest caption's end are computed."""
    length = int(tokens.argmax(dim=-1).max()) + 1  # the end has the highest number
    whole = model.positional_embedding, model.attn_mask
    model.positional_embedding = nn.Parameter(whole[0][:length], requires_grad=False)
    model.attn_mask = whole[1][:length, :length]
    try:
        found: Tensor = model.encode_text(tokens[:, :length])
    finally:
        model.positional_embedding, model.attn_mask = whole
    return found


def _load_hugging_face(name: ModelName) -> _Parts:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    from diptych.clip_library import open_clip

    model = AutoModel.from_pretrained(name.name)
    if not hasattr(model, "get_image_features"):
        raise ConfigError("--model", name.name, "a model with an image and a text tower, such as openai/clip-vit-base-patch32")
    processor, tokenizer = AutoImageProcessor.from_pretrained(name.name), AutoTokenizer.from_pretrained(name.name)
    crop = processor.crop_size or processor.size
    side = int(crop["height"] if "height" in crop else crop["shortest_edge"])
    mode = "shortest" if getattr(processor, "do_center_crop", False) else "squash"
    steps = open_clip.image_transform(
        side, False, processor.image_mean, processor.image_std, resize_mode=mode, interpolation="bicubic"
    ).transforms
    length = model.config.text_config.max_position_embeddings
    # See `_load_open_clip`; other models of this layout, such as SigLIP, see their padding.
    padding = "longest" if model.config.model_type == "clip" else "max_length"

    def features(found: Any) -> Tensor:
        return found if isinstance(found, Tensor) else found.pooler_output

    def encode_image(batch: Tensor) -> Tensor:
        return features(model.get_image_features(pixel_values=batch))

    def encode_text(captions: list[str], device: torch.device) -> Tensor:
        tokens = tokenizer(captions, padding=padding, truncation=True, max_length=length, return_tensors="pt").to(device)
        return features(model.get_text_features(**tokens))

    return _Parts(model, open_clip.transform.Compose(steps[:-2]), processor.image_mean, processor.image_std, encode_image, encode_text)


def _load_sentence(name: ModelName) -> _Parts:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(name.name, device="cpu")

    def encode_text(captions: list[str], _: torch.device) -> Tensor:
        return model.encode(captions, convert_to_tensor=True, show_progress_bar=False)

    return _Parts(model, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), None, encode_text)
