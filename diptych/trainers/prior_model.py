"""dalle2-pytorch's diffusion prior: built from a configuration or published weights, sampled with given noise, exported.

The peer's pieces are called, its random draws are not: noise, timesteps and condition masks are inputs here.
Shape legend: B rows, D embedding dimension.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diptych.config import ConfigError
from diptych.recipes.dalle2_prior import Dalle2PriorConfig
from diptych.trainers.foreign_checkpoints import locate_weights, read_state

if TYPE_CHECKING:
    from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

WEIGHTS = "prior.pth"
CONFIG = "prior_config.json"
Noise = Callable[[str], Tensor]
"""`noise(purpose)` → `[B, D]` standard normal numbers that belong to the rows."""


def build_prior(config: Dalle2PriorConfig, seed: int) -> tuple[DiffusionPrior, dict[str, Any]]:
    """The model that `config` asks for and the section `prior` of the peer's configuration that describes it.

    Fresh weights are a function of `seed`. Raises `ConfigError` where weights and sizes do not belong together.
    """
    weights = locate_weights("task.pretrained", config.pretrained, WEIGHTS, CONFIG) if config.pretrained else None
    stored = weights.parent / CONFIG if weights else None
    if stored is not None and stored.is_file():
        section = _stored_section(config, stored)
    elif config.embed_dim is None:
        raise ConfigError("task.embed_dim", None, "the dimension of the embeddings", "`diptych train` fills it in from data.embeddings.")
    else:
        section = _section(config, config.embed_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = create_prior(section)
    if weights:
        _load(prior, weights)
    return prior, section


def create_prior(section: dict[str, Any]) -> DiffusionPrior:
    """The peer's model from the section `prior` of its configuration."""
    from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

    options = {key: value for key, value in section.items() if key not in ("net", "clip")}
    return DiffusionPrior(DiffusionPriorNetwork(**section["net"]), clip=None, **options)


def _section(config: Dalle2PriorConfig, dim: int) -> dict[str, Any]:
    net = {
        "dim": dim,
        "depth": config.depth,
        "heads": config.heads,
        "dim_head": config.dim_head,
        "ff_mult": config.ff_mult,
        "normformer": config.normformer,
        "attn_dropout": config.attn_dropout,
        "ff_dropout": config.ff_dropout,
        "num_timesteps": config.timesteps if config.learned_timesteps else None,
        "num_time_embeds": config.num_time_embeds,
        "num_image_embeds": config.num_image_embeds,
        "num_text_embeds": config.num_text_embeds,
        "max_text_len": config.max_text_len,
    }
    return {
        "net": net,
        "image_embed_dim": dim,
        # Required by the peer's configuration, used only where it embeds images itself.
        "image_size": 224,
        "timesteps": config.timesteps,
        "sample_timesteps": config.sample_timesteps,
        "beta_schedule": config.beta_schedule,
        "predict_x_start": config.predict_x_start,
        "predict_v": config.predict_v,
        "image_embed_scale": config.image_embed_scale or dim**0.5,
        "sampling_clamp_l2norm": config.sampling_clamp_l2norm,
        "sampling_final_clamp_l2norm": config.sampling_final_clamp_l2norm,
        "init_image_embed_l2norm": config.init_image_embed_l2norm,
        **_training_options(config),
    }


def _training_options(config: Dalle2PriorConfig) -> dict[str, Any]:
    """What a fine-tune may choose anew; everything else says what the weights mean."""
    return {
        "text_cond_drop_prob": config.text_cond_drop_prob,
        "image_cond_drop_prob": config.image_cond_drop_prob,
        "loss_type": config.loss_type,
        "training_clamp_l2norm": config.training_clamp_l2norm,
        "condition_on_text_encodings": config.condition_on_text_encodings,
    }


def _stored_section(config: Dalle2PriorConfig, stored: Path) -> dict[str, Any]:
    try:
        data = json.loads(stored.read_text())
        section = data.get("prior", data)
        dim = section["image_embed_dim"]
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ConfigError("task.pretrained", str(stored), "a configuration of dalle2-pytorch's prior", repr(error)) from error
    if config.embed_dim not in (None, dim):
        raise ConfigError(
            "task.embed_dim", config.embed_dim, f"{dim}, the dimension of task.pretrained", "Embed the data with the same model."
        )
    net = dict(section["net"]) | {"attn_dropout": config.attn_dropout, "ff_dropout": config.ff_dropout}
    section = {key: value for key, value in section.items() if key not in ("clip", "cond_drop_prob")} | {"net": net}
    return section | _training_options(config)


def _load(prior: DiffusionPrior, path: Path) -> None:
    state = read_state(path, ("ema_model", "model"))
    state = {key: value for key, value in state.items() if not key.startswith("clip.")}
    try:
        prior.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:500]
        raise ConfigError("task.pretrained", str(path), "weights of the configured prior", reason) from error


@contextlib.contextmanager
def condition_masks(net: DiffusionPriorNetwork, keep_text: Tensor, keep_image: Tensor) -> Iterator[None]:
    """Within, the network sees null embeddings where the bool masks `[B]` are False: the peer draws these masks itself."""

    def withhold(keep: Tensor, null: Tensor) -> Callable[..., Tensor]:
        return lambda _module, _inputs, output: torch.where(keep[:, None, None], output, null.to(output.dtype))

    hooks = [
        net.to_text_embeds.register_forward_hook(withhold(keep_text, net.null_text_embeds)),
        net.to_image_embeds.register_forward_hook(withhold(keep_image, net.null_image_embed)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def choose_nearest(candidates: Tensor, text_embedding: Tensor) -> Tensor:
    """Of candidates `[B, N, D]` the one nearest to the text `[B, D]` by cosine (Ramesh et al., section 2.2), `[B, D]`."""
    nearness = torch.cosine_similarity(candidates, text_embedding[:, None], dim=-1)
    return candidates[torch.arange(len(candidates), device=candidates.device), nearness.argmax(dim=1)]


def sample_prior(
    prior: DiffusionPrior, text_embedding: Tensor, noise: Noise, steps: int, cond_scale: float = 1.0, text_states: Tensor | None = None
) -> Tensor:
    """Image embeddings `[B, D]` for text embeddings `[B, D]`, as the peer's `p_sample_loop` with its draws given.

    `text_states` `[B, L, D]` for a prior that reads them.

    `steps` below the model's timesteps is DDIM with eta 1 (Song et al. 2020, arXiv:2010.02502); else ancestral sampling.
    """
    scheduler, total = prior.noise_scheduler, prior.noise_scheduler.num_timesteps
    ddim = steps < total
    times = torch.linspace(-1.0, total, steps + 1)[:-1].int().tolist()[::-1] if ddim else list(range(total - 1, -2, -1))
    x = noise("start")
    if prior.init_image_embed_l2norm:
        x = prior.l2norm_clamp_embed(x)
    for time, following in itertools.pairwise(times):
        t = torch.full((len(x),), time, device=x.device)
        start = _predict_start(prior, x, t, {"text_embed": text_embedding, "text_encodings": text_states}, cond_scale)
        if not ddim:
            mean, _, log_variance = scheduler.q_posterior(x_start=start, x_t=x, t=t)
            x = mean + (0.5 * log_variance).exp() * noise(f"step{time}") if time > 0 else mean
        elif following < 0:
            x = start
        else:
            now, then = scheduler.alphas_cumprod_prev[time], scheduler.alphas_cumprod_prev[following]
            random_part = ((1 - now / then) * (1 - then) / (1 - now)).sqrt()
            kept_part = (1 - then - random_part**2).sqrt()
            fresh = noise(f"step{time}") if following > 0 else 0.0
            direction = scheduler.predict_noise_from_start(x, t=t, x0=start)
            x = start * then.sqrt() + random_part * fresh + kept_part * direction
    if prior.sampling_final_clamp_l2norm and prior.predict_x_start:
        x = prior.l2norm_clamp_embed(x)
    return x / prior.image_embed_scale


def _predict_start(prior: DiffusionPrior, x: Tensor, t: Tensor, text: dict[str, Tensor | None], cond_scale: float) -> Tensor:
    predicted = prior.net.forward_with_cond_scale(x, t, cond_scale=cond_scale, **text).float()
    if prior.predict_v:
        start = prior.noise_scheduler.predict_start_from_v(x, t=t, v=predicted)
    elif prior.predict_x_start:
        start = predicted
    else:
        start = prior.noise_scheduler.predict_start_from_noise(x, t=t, noise=predicted)
    if not prior.predict_x_start:
        return start.clamp(-1.0, 1.0)
    return prior.l2norm_clamp_embed(start) if prior.sampling_clamp_l2norm else start


def export_prior(prior: DiffusionPrior, section: dict[str, Any], folder: Path) -> None:
    """Write `prior.pth` and `prior_config.json`: the peer's model classes load them, and its `DiffusionPriorTrainer` starts from them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().clone() for key, value in prior.state_dict().items()}
    torch.save({"model": state, "ema_model": state} | _trainer_state(prior, state), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"prior": section}, indent=2))


def _trainer_state(prior: DiffusionPrior, state: dict[str, Tensor]) -> dict[str, Any]:
    """What `DiffusionPriorTrainer.load` asks for beside the weights, as of step 0, in types that `weights_only` loading accepts.

    Its own checkpoints hold a version object and so fail there; weights alone cannot start a fine-tune with it.
    """
    from dalle2_pytorch.optimizer import get_optimizer
    from dalle2_pytorch.version import __version__

    optimizer = get_optimizer(prior.parameters(), lr=1.1e-4, wd=6.02e-2, eps=1e-6, group_wd_params=True)
    averaged = {f"{owner}.{key}": value for owner in ("online_model", "ema_model") for key, value in state.items()}
    return {
        "version": __version__,
        "step": torch.tensor([0]),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0).state_dict(),
        "warmup_scheduler": None,
        "ema": {"initted": torch.tensor([True]), "step": torch.tensor([0])} | averaged,
    }
