"""The DALL-E 2 prior: configuration and recipes.

A diffusion model predicts the CLIP image embedding that belongs to a CLIP text embedding (Ramesh et al. 2022,
arXiv:2204.06125, section 2.2). It learns from precomputed pairs of embeddings. The model is dalle2-pytorch's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pydantic

from diptych.batches import CachedNeed, EmbeddingNeed, Needs, TokenNeed
from diptych.config import ConfigError, DataConfig, OptimConfig, RunConfig, TaskConfig, TrainConfig, ValidationConfig


class Dalle2PriorConfig(TaskConfig):
    """dalle2-pytorch's `DiffusionPrior` over `DiffusionPriorNetwork`, on pairs of embeddings."""

    name: ClassVar[str] = "dalle2_prior"

    pretrained: str = ""
    """Weights: empty = fresh; a folder that `diptych export` wrote; a checkpoint in dalle2-pytorch's layout; a hub name `org/repo`,
    or `org/repo/path/in/repo.pth`. A `prior_config.json` beside the weights gives the sizes, otherwise the keys below do."""
    embed_dim: int | None = pydantic.Field(None, ge=2)
    """Dimension of both embeddings; empty = what the data has."""
    depth: int = pydantic.Field(6, ge=1)
    """Transformer blocks."""
    heads: int = pydantic.Field(8, ge=1)
    """Attention heads."""
    dim_head: int = pydantic.Field(64, ge=4)
    """Channels of an attention head."""
    ff_mult: int = pydantic.Field(4, ge=1)
    """Width of the feed-forward layers, in multiples of the dimension."""
    normformer: bool = False
    """Normalise inside the feed-forward layers too (arXiv:2110.09456)."""
    attn_dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Dropout of attention weights."""
    ff_dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Dropout of feed-forward activations."""
    num_text_embeds: int = pydantic.Field(1, ge=1)
    """Tokens that the text embedding is spread over."""
    num_image_embeds: int = pydantic.Field(1, ge=1)
    """Tokens that the noised image embedding is spread over."""
    num_time_embeds: int = pydantic.Field(1, ge=1)
    """Tokens that the timestep is spread over."""
    learned_timesteps: bool = False
    """A learned vector per timestep, as in the published weights, instead of sinusoids."""
    max_text_len: int = pydantic.Field(1, ge=1)
    """Token states attended to; learned null states fill shorter captions, and stand for all of them where none are given."""
    condition_on_text_encodings: bool = False
    """Attend to the caption's token states beside its embedding; their channels must equal the embedding's dimension."""
    text_tower: str = ""
    """CLIP whose text tower turns captions into token states: an open_clip NAME/TAG, a folder that `diptych export` wrote of a CoCa,
    or a Hugging Face CLIP by name or folder. Empty = states from a cache (`data.caches`), where they are attended to."""
    tokenizer: str = "open_clip"
    """Tokenizer of `text_tower`: `open_clip`, a hub name, or a folder with a Hugging Face tokenizer."""
    text_length: int = pydantic.Field(77, ge=4)
    """Tokens of a caption for `text_tower`."""
    timesteps: int = pydantic.Field(1000, ge=2)
    """Diffusion timesteps."""
    beta_schedule: Literal["cosine", "linear", "quadratic", "jsd", "sigmoid"] = "cosine"
    """Noise schedule."""
    loss_type: Literal["l1", "l2", "huber"] = "l2"
    """Distance between prediction and target."""
    predict_x_start: bool = True
    """Predict the embedding itself, not the noise."""
    predict_v: bool = False
    """Predict the velocity; takes precedence over `predict_x_start`."""
    text_cond_drop_prob: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of samples whose text embedding is withheld; above 0 (with `image_cond_drop_prob`) for guidance."""
    image_cond_drop_prob: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of samples whose noised image embedding is withheld."""
    image_embed_scale: float | None = pydantic.Field(None, gt=0)
    """Factor on the L2-normalised image embedding; empty = square root of the dimension."""
    training_clamp_l2norm: bool = False
    """Normalise the prediction before the loss."""
    sampling_clamp_l2norm: bool = False
    """Normalise the predicted embedding at each sampling step."""
    sampling_final_clamp_l2norm: bool = False
    """Normalise the sampled embedding."""
    init_image_embed_l2norm: bool = False
    """Normalise the noise that sampling starts from."""
    sample_timesteps: int = pydantic.Field(64, ge=2)
    """Denoising steps of a sample (DDIM below `timesteps`)."""
    cond_scale: float = pydantic.Field(1.0, ge=0)
    """Guidance of validation samples; other than 1 needs both drop probabilities above 0."""
    best_of: int = pydantic.Field(1, ge=1)
    """Candidates for a validation sample, of which the nearest to the text by cosine is taken."""
    validation_samples: int = pydantic.Field(1, ge=1)
    """Samples drawn per text in validation; their cosines are averaged."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Dalle2PriorConfig:
        if self.cond_scale != 1 and not (self.text_cond_drop_prob and self.image_cond_drop_prob):
            raise ConfigError(
                "task.cond_scale",
                self.cond_scale,
                "1 without condition dropout",
                "Set task.text_cond_drop_prob and task.image_cond_drop_prob.",
            )
        if self.beta_schedule in ("linear", "quadratic", "sigmoid") and self.timesteps <= 20:
            # These schedules are stretched so that the last beta is 20 / timesteps.
            raise ConfigError("task.timesteps", self.timesteps, f"more than 20 under task.beta_schedule={self.beta_schedule}")
        if self.sample_timesteps > self.timesteps:
            raise ConfigError("task.sample_timesteps", self.sample_timesteps, f"at most task.timesteps = {self.timesteps}")
        return self

    def needs(self) -> Needs:
        """Both embeddings; with token states also token ids, or the states from a cache."""
        reads, dim = self.condition_on_text_encodings, EmbeddingNeed(self.embed_dim)
        tokens = TokenNeed(self.tokenizer, self.text_length) if reads and self.text_tower else None
        cached = CachedNeed(("text_states",)) if reads and not self.text_tower else None
        return Needs(image_embedding=dim, text_embedding=dim, tokens=tokens, cached=cached)

    def resolve(self, facts: dict[str, Any]) -> Dalle2PriorConfig:
        """With the dimension of the data, where `embed_dim` is empty."""
        if self.embed_dim is not None or facts.get("image_dim") is None:
            return self
        return self.model_copy(update={"embed_dim": facts["image_dim"]})

    def check_data(self, facts: dict[str, Any]) -> None:
        """Refuse missing embeddings, and dimensions that differ from each other or from `embed_dim`."""
        image, text = facts.get("image_dim"), facts.get("text_dim")
        for what, dim in (("image", image), ("text", text)):
            if dim is None:
                raise ConfigError(
                    "data.embeddings", f"no {what} embeddings", f"a folder with {what}_emb", "`diptych embed SHARDS OUT` computes them."
                )
        if image != text:
            raise ConfigError(
                "data.embeddings", f"images of {image} and texts of {text} dimensions", "one dimension", "Embed both with the same model."
            )
        states = (facts.get("text_states_shape") or (image,))[-1]
        if self.condition_on_text_encodings and states != image:
            raise ConfigError("data.caches", f"token states of {states} channels", f"{image}, the dimension of the embeddings")
        if self.embed_dim not in (None, image):
            raise ConfigError(
                "task.embed_dim", self.embed_dim, f"{image}, the dimension of the embeddings", "Leave it empty to take what the data has."
            )


def smoke() -> RunConfig:
    """A prior of 25 thousand parameters at 32 dimensions, for tests and first calls.

    Source: none. Command: diptych train dalle2_prior --recipe smoke data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: one CPU core, seconds. Expected: it runs; the loss falls.
    """
    return RunConfig(
        task=Dalle2PriorConfig(
            depth=1, heads=2, dim_head=16, timesteps=100, sample_timesteps=4, text_cond_drop_prob=0.1, image_cond_drop_prob=0.1
        ),
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(lr=1e-3, weight_decay=6.02e-2, clip_norm=0.5, ema_decay=0.99),
        train=TrainConfig(steps=10, global_batch_size=8, precision="fp32", log_every=1),
        validation=ValidationConfig(samples=16),
    )


def demo() -> RunConfig:
    """A prior of half a million parameters on the demo's CoCa embeddings (96 dimensions).

    Source: none; sized for a laptop. Command: diptych demo, or
    diptych train dalle2_prior --recipe demo data.shards=SHARDS data.embeddings=EMBEDDINGS workers=2
    Hardware: 2 CPU cores, about a minute. Expected: cosine of image and prediction at least 0.75, and at least 0.3 above
    that of an unrelated text and the prediction.
    """
    return RunConfig(
        task=Dalle2PriorConfig(depth=3, heads=4, dim_head=32, timesteps=1000, sample_timesteps=16),
        workers=2,
        data=DataConfig(validation_share=0.1),
        optim=OptimConfig(
            lr=1e-3, betas=(0.9, 0.98), weight_decay=6.02e-2, warmup_steps=20, schedule="cosine", clip_norm=0.5, ema_decay=0.99
        ),
        train=TrainConfig(steps=250, global_batch_size=256),
        validation=ValidationConfig(every_steps=100, samples=200, batch_size=200),
    )


def base() -> RunConfig:
    """A prior for embeddings of one's own, up to some hundred thousand pairs, any dimension.

    Source: dalle2-pytorch's defaults (lr 1.1e-4, weight decay 6.02e-2, clipping 0.5, EMA 0.99) on a small network.
    Command: diptych train dalle2_prior --recipe base data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: 2 CPU cores for 64 dimensions, one GPU from 512. Expected: the loss and the cosine of image and prediction
    improve until the data is learned by heart; watch `val/cosine_image_predicted`.
    """
    return RunConfig(
        task=Dalle2PriorConfig(normformer=True, text_cond_drop_prob=0.1, image_cond_drop_prob=0.1),
        optim=OptimConfig(lr=1.1e-4, weight_decay=6.02e-2, clip_norm=0.5, ema_decay=0.99),
        train=TrainConfig(steps=2_000, global_batch_size=256),
        validation=ValidationConfig(every_steps=500),
    )


def published() -> RunConfig:
    """Fine-tune LAION's published prior for CLIP ViT-L/14 embeddings (768 dimensions).

    Source: hub laion/DALLE2-PyTorch, prior/latest.pth, and its prior_config.json. It was trained with token states of the
    caption beside the embedding; here its learned null tokens stand for them.
    Command: diptych train dalle2_prior --recipe published data.shards=SHARDS data.embeddings=EMBEDDINGS
    Hardware: one GPU of 24 GB. Expected, of the published training: cosine of image and prediction at least 0.75, of
    unrelated texts below 0.1, difference to the baseline within 0.01.
    """
    return RunConfig(
        task=Dalle2PriorConfig(
            pretrained="laion/DALLE2-PyTorch/prior/latest.pth",
            embed_dim=768,
            depth=12,
            heads=12,
            dim_head=64,
            normformer=True,
            attn_dropout=0.05,
            ff_dropout=0.05,
            learned_timesteps=True,
            max_text_len=77,
            text_cond_drop_prob=0.1,
            image_cond_drop_prob=0.1,
        ),
        optim=OptimConfig(lr=1.1e-4, weight_decay=6.02e-2, clip_norm=0.5, ema_decay=0.99),
        train=TrainConfig(steps=20_000, global_batch_size=512),
        validation=ValidationConfig(every_steps=1_000, samples=2_048),
    )
