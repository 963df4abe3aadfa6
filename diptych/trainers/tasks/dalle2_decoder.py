"""The DALL-E 2 decoder on pictures and their embeddings: dalle2-pytorch's cascade of U-Nets with counted draws.

The loss is the sum of the losses of the U-Nets that learn; each equals `Decoder.forward` for the same draws.
Shape legend: B rows, S pixels of a square picture, L tokens, D dimensions.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diptych.recipes.dalle2_decoder import Dalle2DecoderConfig
from diptych.trainers import randomness
from diptych.trainers.decoder_loss import stage_draws, stage_losses
from diptych.trainers.decoder_model import build_decoder, effective_config, export_decoder
from diptych.trainers.decoder_sampling import Sampling, sample_decoder
from diptych.trainers.task import Batch, Grid, Output, Table, Task, Term, synthetic_rows
from diptych.trainers.text_tower import example_text, text_states, text_tower


class Dalle2DecoderTask(Task):
    """Make the picture that belongs to an image embedding, by diffusion."""

    name: ClassVar[str] = "dalle2_decoder"
    config: Dalle2DecoderConfig

    def __init__(self, config: Dalle2DecoderConfig, seed: int) -> None:
        """Raises `ConfigError` where the dimension is unknown, or weights and sizes do not belong together."""
        config, files = effective_config(config)
        self.tower = text_tower(config.text_tower if config.reads_text else "", config.text_embed_dim, "task.text_embed_dim")
        if self.tower is not None:
            config = config.model_copy(update={"text_embed_dim": self.tower.width})
        super().__init__(config, seed)
        self.decoder = build_decoder(config, files, seed)

    @property
    def coefficients(self) -> dict[str, float]:
        """The variance's loss counts `vb_loss_weight`."""
        return {
            _variance(number): self.config.vb_loss_weight for number in self.config.trained if self.decoder.learned_variance[number - 1]
        }

    def draws(self, batch: Batch) -> Batch:
        """Noise, timesteps, condition masks, and what upsamplers' smaller pictures go through, for each U-Net that learns."""
        found: Batch = {}
        for number in self.config.trained:
            found |= stage_draws(self.config, number, self.seed, batch["slot"])
        return found

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Samples."""
        names = [_distance(number) for number in self.config.trained]
        return dict.fromkeys([*names, *self.coefficients], batch["weight"].sum())

    def forward(self, batch: Batch) -> Output:
        """For each U-Net the mean distance between prediction and target over pixels, and the variance's loss, summed over samples."""
        image = pixels(batch["image"])
        states = text_states(self.tower, batch) if self.config.reads_text else None
        conditions = {"image_embed": batch["image_embedding"], "text_encodings": states}
        weight, terms = batch["weight"], {}
        for number in self.config.trained:
            draws = {key.removesuffix(str(number)): value for key, value in batch.items() if key.endswith(str(number))}
            distance, variance = stage_losses(self.decoder, self.config, number, image, conditions, draws)
            terms[_distance(number)] = Term((distance * weight).sum(), weight.sum())
            if variance is not None:
                terms[_variance(number)] = Term((variance * weight).sum(), weight.sum())
        return Output(terms=terms)

    def show(self, batch: Batch) -> Table | None:
        """Pictures made of held-out embeddings, beside the true ones."""
        if any(isinstance(unet, nn.Identity) for unet in self.decoder.unets):
            return None
        config, slots = self.config, batch["slot"]
        stages = range(len(config.image_sizes))
        steps, scales = ([config.of_stage(key, stage) for stage in stages] for key in ("sample_timesteps", "cond_scale"))

        def noise(purpose: str, shape: tuple[int, ...]) -> Tensor:
            return randomness.normal(self.seed, f"show/{purpose}", slots, shape)

        states = text_states(self.tower, batch) if config.reads_text else None
        sampling = Sampling(steps, scales, config.ddim_sampling_eta)
        made = sample_decoder(self.decoder, batch["image_embedding"], states, noise, sampling).clamp(0, 1).nan_to_num()
        pairs = torch.stack([pixels(batch["image"]), made.float()], dim=1).flatten(0, 1)
        images = (pairs * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        rows = [[int(slot)] for slot in slots.tolist()]
        return Table("True pictures, and those made of their embeddings", ["slot"], rows, (Grid("made", images, 8),))

    def set_gradient_checkpointing(self) -> None:
        """Recompute each residual block."""
        from dalle2_pytorch.dalle2_pytorch import ResnetBlock

        for module in self.decoder.modules():
            if isinstance(module, ResnetBlock):
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)

    def example_batch(self, batch_size: int, seed: int = 0) -> Batch:
        """Blurred noise as pictures, unit vectors as embeddings."""
        generator = torch.Generator().manual_seed(seed)
        side, dim = self.config.image_sizes[-1], self.config.image_embed_dim
        coarse = torch.rand(batch_size, 3, 4, 4, generator=generator)
        image = F.interpolate(coarse, side, mode="bilinear").mul(255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        embedding = F.normalize(torch.randn(batch_size, dim or 0, generator=generator), dim=-1)
        rows = synthetic_rows(batch_size) | {"image": image, "image_embedding": embedding}
        return rows | example_text(self.needs, self.config.text_embed_dim or 0, generator, batch_size)

    def restorable(self) -> frozenset[str]:
        """U-Nets of `task.pretrained` that do not learn."""
        frozen = [f"decoder.unets.{index}." for index in range(len(self.decoder.unets)) if index + 1 not in self.config.trained]
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(tuple(frozen)))

    def export(self, folder: Path) -> None:
        """Write `decoder.pth` and `decoder_config.json` in dalle2-pytorch's own terms."""
        export_decoder(self.decoder, self.config, folder)

    @property
    def usage(self) -> str:
        """See `Task.usage`."""
        return (
            "import json\nimport torch\nfrom dalle2_pytorch.train_configs import DecoderConfig\n\n"
            'decoder = DecoderConfig(**json.load(open("{folder}/decoder_config.json"))["decoder"]).create()\n'
            'decoder.load_state_dict(torch.load("{folder}/decoder.pth", weights_only=True)["model"])'
        )


def _distance(number: int) -> str:
    return f"unet{number}"


def _variance(number: int) -> str:
    return f"unet{number}_variance"


def pixels(image: Tensor) -> Tensor:
    """uint8 `[B, S, S, 3]` → float32 `[B, 3, S, S]` in [0, 1], channels last in memory."""
    return image.permute(0, 3, 1, 2).float() / 255
