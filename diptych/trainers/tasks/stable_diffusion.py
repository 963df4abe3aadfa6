"""Stable Diffusion on captioned pictures: diffusers' training computation with counted noise, timesteps and caption masks.

The loss is that of diffusers' text-to-image scripts for the same draws, whether pictures and captions are encoded in each step or their
latents and states come from a cache. Under `train=vae` the VAE alone learns, from pictures.
Shape legend: B rows, L tokens, D width of the text encoder, C channels and h, w places of the latents.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_snr
from torch import Tensor

from diptych.config import ConfigError
from diptych.recipes.stable_diffusion import StableDiffusionConfig
from diptych.trainers import randomness
from diptych.trainers.latent_encoder import encode_posterior, encode_states
from diptych.trainers.sd_export import export_parts, usage
from diptych.trainers.sd_lora import add_adapters
from diptych.trainers.sd_model import build_parts, freeze_but, vae_factor, vae_terms
from diptych.trainers.sd_show import show_pictures, show_reconstructions
from diptych.trainers.task import Batch, Output, Table, Task, Term, synthetic_rows
from diptych.vocabulary import Vocabulary, load_vocabulary

log = logging.getLogger(__name__)

_SMALLEST_LOG_VARIANCE, _LARGEST_LOG_VARIANCE = -30.0, 20.0
"""diffusers' bounds on a posterior's log-variance."""


class StableDiffusionTask(Task):
    """Predict the noise in latents (or the velocity) from the caption."""

    name: ClassVar[str] = "stable_diffusion"
    config: StableDiffusionConfig

    def __init__(self, config: StableDiffusionConfig, seed: int) -> None:
        """Raises `ConfigError` where weights, sizes, tokenizer or adapters do not belong together."""
        super().__init__(config, seed)
        self.vocabulary = _vocabulary(config) if config.train != "vae" else None
        self.parts = build_parts(config, self.vocabulary, seed)
        freeze_but(config, self.parts)
        if config.train == "lora":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                add_adapters(self.parts, config.lora)
        # Convolutions are several times faster so, on CPUs and on GPUs.
        for name in ("vae", "unet", "text_encoder"):
            part = getattr(self.parts, name)
            self.add_module(name, part if part is None or name == "text_encoder" else part.to(memory_format=torch.channels_last))
        self.schedule = self.parts.noise_schedule
        self.shown_base: Any = None

    @property
    def coefficients(self) -> dict[str, float]:
        """Of the VAE's terms."""
        return {"kl": self.config.kl_weight, "variance": 0.1} if self.config.train == "vae" else {}

    def restorable(self) -> frozenset[str]:
        """Frozen parameters of published or exported parts: built again from the configuration, so no checkpoint holds them."""
        sources = {"vae": self.config.vae_source, "unet": self.config.pretrained, "text_encoder": self.config.pretrained}
        return frozenset(
            name for name, parameter in self.named_parameters() if not parameter.requires_grad and sources[name.partition(".")[0]]
        )

    def _latent_shape(self, batch: Batch) -> tuple[int, ...]:
        if "latent_mean" in batch:
            return tuple(batch["latent_mean"].shape[1:])
        factor = vae_factor(self.parts.vae)
        return (self.parts.vae.config.latent_channels, *(side // factor for side in batch["image"].shape[1:3]))

    def draws(self, batch: Batch) -> Batch:
        """`noise` and `posterior_noise` `[B, C, h, w]`, `timestep` `[B]`, `keep_caption` bool `[B]`, and the noise that options ask for."""
        config, slots, shape = self.config, batch["slot"], self._latent_shape(batch)
        drawn = {"posterior_noise": randomness.normal(self.seed, "posterior", slots, shape)}
        if config.train == "vae":
            return drawn
        drawn |= {
            "noise": randomness.normal(self.seed, "noise", slots, shape),
            "timestep": randomness.integers(self.seed, "timestep", slots, (), 0, self.schedule.config.num_train_timesteps),
            "keep_caption": ~randomness.bernoulli(self.seed, "drop_caption", slots, (), config.caption_drop),
        }
        if config.noise_offset:
            drawn["offset_noise"] = randomness.normal(self.seed, "offset", slots, (shape[0], 1, 1))
        if config.input_perturbation:
            drawn["perturbation"] = randomness.normal(self.seed, "perturbation", slots, shape)
        return drawn

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Samples."""
        terms = ("reconstruction", "kl", "variance") if self.config.train == "vae" else ("diffusion",)
        return dict.fromkeys(terms, batch["weight"].sum())

    def forward(self, batch: Batch) -> Output:
        """Mean squared error over a latent, weighted by its timestep under `snr_gamma`, summed over samples."""
        if self.config.train == "vae":
            losses = vae_terms(self.parts.vae, batch["image"], batch["posterior_noise"])
        else:
            losses = {"diffusion": self._diffusion_loss(batch)}
        weight = batch["weight"]
        return Output(terms={name: Term((loss * weight).sum(), weight.sum()) for name, loss in losses.items()})

    def _diffusion_loss(self, batch: Batch) -> Tensor:
        """`[B]`; the computation of diffusers' `train_text_to_image.py` (and its LoRA sibling)."""
        config, times, noise = self.config, batch["timestep"], batch["noise"]
        latents = self.latents(batch)
        if config.noise_offset:
            noise = noise + config.noise_offset * batch["offset_noise"]
        added = noise + config.input_perturbation * batch["perturbation"] if config.input_perturbation else noise
        noisy = self.schedule.add_noise(latents, added, times)
        predicted = self.parts.unet(noisy, times, encoder_hidden_states=self.states(batch)).sample.float()
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, times) if velocity else noise
        loss = F.mse_loss(predicted, target, reduction="none").flatten(1).mean(dim=1)
        if config.snr_gamma:
            snr = compute_snr(self.schedule, times)
            loss = loss * snr.clamp(max=config.snr_gamma) / (snr + 1 if velocity else snr)
        return loss

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents `[B, C, h, w]`, drawn from the VAE's posterior: of the picture, or of its cached mean and log-variance."""
        if "latent_mean" in batch:
            mean, log_variance = batch["latent_mean"].float(), batch["latent_logvar"].float()
        else:
            posterior = encode_posterior(self.parts.vae, batch["image"])
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        deviation = torch.exp(0.5 * log_variance.clamp(_SMALLEST_LOG_VARIANCE, _LARGEST_LOG_VARIANCE))
        return (mean + deviation * batch["posterior_noise"]) * self.parts.vae.config.scaling_factor

    def states(self, batch: Batch) -> Tensor:
        """States of the captions `[B, L, D]`, those of the empty caption where the caption is withheld."""
        keep = batch["keep_caption"][:, None]
        if "text_states" in batch:
            states = batch["text_states"].float()
            if not self.config.caption_drop:
                return states
            with torch.no_grad():
                empty = self.encode_tokens(self._encode_ids([""]).to(states.device)).float()
            return torch.where(keep[..., None], states, empty)
        tokens = torch.where(keep, batch["tokens"], self._encode_ids([""]).to(batch["tokens"].device))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._text_learns):
            return self.encode_tokens(tokens)

    @property
    def _text_learns(self) -> bool:
        return self.config.train == "unet_text" or (self.config.train == "lora" and bool(self.config.lora.text_targets))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """States `[B, L, D]` of token ids `[B, L]`; as Stable Diffusion does, padding is not masked."""
        return encode_states(self.parts.text_encoder, tokens)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """States `[B, L, D]` of texts. One that is too long is cut, and the log says so."""
        return self.encode_tokens(self._encode_ids(texts).to(next(self.parts.unet.parameters()).device))

    def _encode_ids(self, texts: Sequence[str]) -> Tensor:
        """Start, text, end and padding `[B, L]`, as the data plane lays them out."""
        vocabulary, length = self.vocabulary, self.config.context_length
        assert vocabulary is not None
        rows = torch.full((len(texts), length), vocabulary.pad)
        for row, text in zip(rows, texts, strict=True):
            ids = vocabulary.encode(text) if text else []
            if len(ids) > length - 2:
                log.warning("a prompt of %d tokens was cut to %d: %r", len(ids) + 2, length, text[:80])
            ids = [vocabulary.start, *ids[: length - 2], vocabulary.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def set_gradient_checkpointing(self) -> None:
        """Recompute each block of what learns."""
        if self.config.train == "vae":
            self.parts.vae.enable_gradient_checkpointing()
            return
        self.parts.unet.enable_gradient_checkpointing()
        if self._text_learns:
            self.parts.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def show(self, batch: Batch) -> Table | None:
        """Grids over prompts and over seeds, the base model's pictures beside; under `train=vae` pictures and their reconstructions."""
        if self.config.train == "vae":
            return show_reconstructions(self, batch)
        return show_pictures(self, batch) if self.config.show_count else None

    def example_batch(self, batch_size: int, seed: int = 0) -> Batch:
        """Random pixels or latents, and captions of random words and unequal lengths, or random states."""
        generator = torch.Generator().manual_seed(seed)
        side, needs, batch = self.config.image_size, self.needs, synthetic_rows(batch_size)
        if self.config.shape_buckets is not None:
            batch["bucket"] = torch.full((batch_size,), self.config.shape_buckets.nearest(side, side))
        if needs.image is not None:
            batch["image"] = torch.randint(0, 256, (batch_size, side, side, 3), generator=generator, dtype=torch.uint8)
        if needs.tokens is not None:
            batch |= self._example_captions(batch_size, generator)
        if needs.cached is not None and "latent_mean" in needs.cached.keys:
            places = side // vae_factor(self.parts.vae)
            shape = (batch_size, self.parts.vae.config.latent_channels, places, places)
            batch["latent_mean"] = torch.randn(shape, generator=generator).half()
            batch["latent_logvar"] = torch.full(shape, -4.0).half()
        if needs.cached is not None and "text_states" in needs.cached.keys:
            width = self.parts.text_encoder.config.hidden_size
            batch["text_states"] = torch.randn(batch_size, self.config.context_length, width, generator=generator).half()
        return batch

    def _example_captions(self, batch_size: int, generator: torch.Generator) -> Batch:
        vocabulary, length = self.vocabulary, self.config.context_length
        assert vocabulary is not None
        tokens = torch.full((batch_size, length), vocabulary.pad)
        mask = torch.zeros(batch_size, length, dtype=torch.bool)
        special = {vocabulary.pad, vocabulary.start, vocabulary.end}
        words = torch.tensor([token for token in range(min(vocabulary.size, 1000)) if token not in special])
        for row in range(batch_size):
            count = int(torch.randint(1, length - 1, (), generator=generator))
            tokens[row, 0], tokens[row, count + 1] = vocabulary.start, vocabulary.end
            tokens[row, 1 : count + 1] = words[torch.randint(len(words), (count,), generator=generator)]
            mask[row, : count + 2] = True
        return {"tokens": tokens, "token_mask": mask}

    def export(self, folder: Path) -> None:
        """Write a pipeline's folder; adapters alone under `train=lora`, `vae/` alone under `train=vae`."""
        export_parts(self, folder)

    @property
    def usage(self) -> str:
        """See `Task.usage`."""
        return usage(self.config)


def _vocabulary(config: StableDiffusionConfig) -> Vocabulary:
    try:
        return load_vocabulary(config.tokenizer_source)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        key, value = ("task.tokenizer", config.tokenizer) if config.tokenizer else ("task.pretrained", config.pretrained)
        raise ConfigError(key, value, "a folder or hub name that holds a tokenizer", str(error).strip().splitlines()[0]) from error
