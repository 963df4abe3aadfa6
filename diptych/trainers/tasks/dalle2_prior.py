"""The DALL-E 2 prior on pairs of embeddings: dalle2-pytorch's diffusion prior with counted noise, timesteps and masks.

The loss equals `DiffusionPrior.forward` for the same draws; the scaling of the image embedding does not touch the batch.
Shape legend: B rows, N rows of the validation set, S samples per text, D embedding dimension.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diptych.recipes.dalle2_prior import Dalle2PriorConfig
from diptych.trainers import randomness
from diptych.trainers.flops import matrix_flops
from diptych.trainers.prior_model import build_prior, choose_nearest, condition_masks, export_prior, sample_prior
from diptych.trainers.task import Batch, Output, Task, Term, Validation, synthetic_rows
from diptych.trainers.text_tower import example_text, text_states, text_tower


class Dalle2PriorTask(Task):
    """Predict the image embedding from the text embedding, by diffusion."""

    name: ClassVar[str] = "dalle2_prior"
    config: Dalle2PriorConfig

    def __init__(self, config: Dalle2PriorConfig, seed: int) -> None:
        """Raises `ConfigError` where the dimension is unknown, or weights and sizes do not belong together."""
        super().__init__(config, seed)
        self.prior, self.section = build_prior(config, seed)
        reads = config.condition_on_text_encodings
        self.tower = text_tower(config.text_tower if reads else "", self.prior.image_embed_dim, "the embeddings' dimension")
        # Counted now: sharded parameters have no shape later.
        net = self.prior.net
        tokens = net.max_text_len + net.num_text_embeds + net.num_time_embeds + net.num_image_embeds + 1
        self._flops = float(tokens * matrix_flops(net.causal_transformer))

    def draws(self, batch: Batch) -> Batch:
        """`noise` `[B, D]`, `timestep` `[B]`, and bool `[B]` masks of the conditions that are kept."""
        slots, dim = batch["slot"], batch["image_embedding"].shape[1]
        steps = self.prior.noise_scheduler.num_timesteps
        return {
            "noise": randomness.normal(self.seed, "noise", slots, (dim,)),
            "timestep": randomness.integers(self.seed, "timestep", slots, (), 0, steps),
            "keep_text": ~randomness.bernoulli(self.seed, "drop_text", slots, (), self.prior.text_cond_drop_prob),
            "keep_image": ~randomness.bernoulli(self.seed, "drop_image", slots, (), self.prior.image_cond_drop_prob),
        }

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Samples."""
        return {"diffusion": batch["weight"].sum()}

    def forward(self, batch: Batch) -> Output:
        """Mean over D of the distance between prediction and target, summed over samples."""
        prior, times, noise = self.prior, batch["timestep"], batch["noise"]
        clean = batch["image_embedding"] * prior.image_embed_scale
        noisy = prior.noise_scheduler.q_sample(x_start=clean, t=times, noise=noise)
        states = self._states(batch)
        # Rows of zeros are padding to the peer, for which its null states stand.
        states = None if states is None else states * batch["keep_text"][:, None, None]
        with condition_masks(prior.net, batch["keep_text"], batch["keep_image"]):
            predicted = prior.net(noisy, times, text_embed=batch["text_embedding"], text_encodings=states).float()
        if prior.predict_x_start and prior.training_clamp_l2norm:
            predicted = prior.l2norm_clamp_embed(predicted)
        target = clean if prior.predict_x_start else noise
        if prior.predict_v:
            target = prior.noise_scheduler.calculate_v(clean, times, noise)
        loss = prior.noise_scheduler.loss_fn(predicted, target, reduction="none").mean(dim=1)
        return Output(terms={"diffusion": Term((loss * batch["weight"]).sum(), batch["weight"].sum())})

    def _states(self, batch: Batch) -> Tensor | None:
        return text_states(self.tower, batch) if self.config.condition_on_text_encodings else None

    def sample(
        self,
        text_embedding: Tensor,
        slots: Tensor,
        purpose: str = "sample",
        *,
        steps: int = 0,
        cond_scale: float = 0.0,
        best_of: int = 1,
        text_states: Tensor | None = None,
    ) -> Tensor:
        """Image embeddings `[B, D]` for text embeddings `[B, D]` and, where it reads them, token states `[B, L, D]`.

        The noise of row i belongs to `slots[i]` and `purpose`. Of `best_of` candidates the nearest to the text is taken. `steps` and
        `cond_scale` of 0 take the configuration's.
        """
        dim, candidates = text_embedding.shape[1], []
        steps, cond_scale = steps or self.config.sample_timesteps, cond_scale or self.config.cond_scale
        for number in range(best_of):
            # The first candidate is the sample that there would be without others.
            name = f"{purpose}/{number}" if number else purpose

            def noise(what: str, name: str = name) -> Tensor:
                return randomness.normal(self.seed, f"{name}/{what}", slots, (dim,))

            candidates.append(sample_prior(self.prior, text_embedding, noise, steps, cond_scale, text_states))
        return choose_nearest(torch.stack(candidates, dim=1), text_embedding)

    def validate(self, batch: Batch) -> Validation:
        """The loss, and samples of every text."""
        text, slots, states, best = batch["text_embedding"], batch["slot"], self._states(batch), self.config.best_of
        count = self.config.validation_samples
        predicted = [self.sample(text, slots, f"sample{number}", best_of=best, text_states=states) for number in range(count)]
        rows = {"text": text, "image": batch["image_embedding"], "predicted": torch.stack(predicted, dim=1)}
        return Validation(terms=super().validate(batch).terms, rows=rows)

    def summarise(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Cosines on L2-normalised vectors, as dalle2-pytorch reports them, averaged over samples.

        `unrelated` pairs each prediction with the text of another row; `difference` is text to prediction minus the baseline.
        """
        text, image = F.normalize(rows["text"], dim=-1), F.normalize(rows["image"], dim=-1)
        predicted = F.normalize(rows["predicted"], dim=-1).mean(dim=1)
        baseline, found = _mean_dot(text, image), _mean_dot(text, predicted)
        return {
            "cosine_text_image": baseline,
            "cosine_text_predicted": found,
            "cosine_image_predicted": _mean_dot(image, predicted),
            "cosine_unrelated": _mean_dot(torch.roll(text, 1, dims=0), predicted),
            "cosine_difference": found - baseline,
        }

    @property
    def flops_per_sample(self) -> float:
        """Of the transformer."""
        return self._flops

    def set_gradient_checkpointing(self) -> None:
        """Recompute each attention and feed-forward layer."""
        for layer in self.prior.net.causal_transformer.layers:
            for part in layer:
                part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)

    def example_batch(self, batch_size: int, seed: int = 0) -> Batch:
        """Unit vectors, the text's near the image's."""
        generator = torch.Generator().manual_seed(seed)
        dim = self.prior.image_embed_dim
        image = F.normalize(torch.randn(batch_size, dim, generator=generator), dim=-1)
        text = F.normalize(image + 0.1 * torch.randn(batch_size, dim, generator=generator), dim=-1)
        rows = synthetic_rows(batch_size) | {"image_embedding": image, "text_embedding": text}
        return rows | example_text(self.needs, dim, generator, batch_size)

    def export(self, folder: Path) -> None:
        """Write `prior.pth` and `prior_config.json` in dalle2-pytorch's own terms."""
        export_prior(self.prior, self.section, folder)

    @property
    def usage(self) -> str:
        """See `Task.usage`."""
        return (
            "import json\nimport torch\nfrom dalle2_pytorch.train_configs import DiffusionPriorConfig\n\n"
            'prior = DiffusionPriorConfig(**json.load(open("{folder}/prior_config.json"))["prior"]).create()\n'
            'prior.load_state_dict(torch.load("{folder}/prior.pth", weights_only=True)["model"])'
        )


def _mean_dot(one: Tensor, other: Tensor) -> float:
    return (one * other).sum(dim=-1).mean().item()
