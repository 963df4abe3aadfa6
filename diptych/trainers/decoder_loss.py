"""The losses of one U-Net of dalle2-pytorch's decoder, with every random draw given.

The peer's forward draws timesteps, noise, condition masks, blur and crops itself, some of them once for a whole batch. Its pieces are
called here with draws that belong to the rows. Shape legend: B rows, S pixels of a square picture, L tokens, D dimensions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diptych.recipes.dalle2_decoder import Dalle2DecoderConfig
from diptych.trainers import randomness

if TYPE_CHECKING:
    from dalle2_pytorch import Decoder, Unet

NOISE_LEVELS = 1000
"""Of the noise on an upsampler's smaller picture; fixed in the peer."""


def stage_draws(config: Dalle2DecoderConfig, number: int, seed: int, slots: Tensor) -> dict[str, Tensor]:
    """The draws of U-Net `number` (from 1) for `slots` `[B]`; keys end in its number."""
    index, side = number - 1, config.image_sizes[number - 1]
    unet, crop = config.unets[index], config.random_crop_sizes[index] if config.random_crop_sizes else 0

    def named(what: str) -> str:
        return f"unet{number}/{what}"

    seen = crop or side
    draws = {
        "noise": randomness.normal(seed, named("noise"), slots, (3, seen, seen)),
        "timestep": randomness.integers(seed, named("timestep"), slots, (), 0, config.timesteps),
    }
    if index == 0:
        draws["keep_image"] = ~randomness.bernoulli(seed, named("drop_image"), slots, (), config.image_cond_drop_prob)
    if unet.cond_on_text_encodings:
        draws["keep_text"] = ~randomness.bernoulli(seed, named("drop_text"), slots, (), config.text_cond_drop_prob)
    if unet.self_cond:
        draws["self_cond"] = randomness.bernoulli(seed, named("self_cond"), slots, (), 0.5)
    if crop:
        draws["crop"] = randomness.integers(seed, named("crop"), slots, (2,), 0, side - crop + 1)
    if index and config.of_stage("use_blur_for_lowres_cond", index - 1):
        draws |= _blur_draws(config, named, seed, slots)
    if index and config.of_stage("use_noise_for_lowres_cond", index - 1):
        draws["lowres_noise"] = randomness.normal(seed, named("lowres_noise"), slots, (3, side, side))
        draws["lowres_level"] = randomness.integers(seed, named("lowres_level"), slots, (), 0, NOISE_LEVELS)
    return {f"{key}{number}": value for key, value in draws.items()}


def _blur_draws(config: Dalle2DecoderConfig, named: Callable[[str], str], seed: int, slots: Tensor) -> dict[str, Tensor]:
    low, high = config.blur_sigma[0], config.blur_sigma[-1]
    kernels = torch.tensor(_kernels(config), device=slots.device)
    return {
        "blur": randomness.bernoulli(seed, named("blur"), slots, (), config.blur_prob),
        "blur_sigma": low + (high - low) * randomness.uniform(seed, named("blur_sigma"), slots),
        "blur_kernel": kernels[randomness.integers(seed, named("blur_kernel"), slots, (), 0, len(kernels))],
    }


def _kernels(config: Dalle2DecoderConfig) -> list[int]:
    return list(range(config.blur_kernel_size[0], config.blur_kernel_size[-1] + 1, 2))


@contextlib.contextmanager
def image_mask(unet: Unet, keep: Tensor | None) -> Iterator[None]:
    """Within, the U-Net sees null embeddings where the bool mask `[B]` is False: the peer draws this mask itself."""

    def withhold(keep: Tensor, null: Tensor) -> Callable[..., Tensor]:
        return lambda _module, _inputs, output: torch.where(keep.view(-1, *[1] * (output.ndim - 1)), output, null.to(output.dtype))

    hooks = []
    if keep is not None and unet.cond_on_image_embeds:
        hooks.append(unet.image_to_tokens.register_forward_hook(withhold(keep, unet.null_image_embed)))
        if unet.to_image_hiddens is not None:
            hooks.append(unet.to_image_hiddens.register_forward_hook(withhold(keep, unet.null_image_hiddens)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def lowres_condition(
    decoder: Decoder, config: Dalle2DecoderConfig, number: int, image: Tensor, draws: dict[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """What upsampler `number` enlarges, `[B, 3, S, S]` in [0, 1], and its noise levels `[B]`, from `image` `[B, 3, H, W]`.

    Blur is drawn for each sample, where the peer draws one for the batch.
    """
    from dalle2_pytorch.dalle2_pytorch import resize_image_to

    if number == 1:
        return None, None
    conditioner, bounds = decoder.lowres_conds[number - 1], decoder.input_image_range
    small = image
    if conditioner.downsample_first:
        small = resize_image_to(small, decoder.image_sizes[number - 2], clamp_range=bounds, nearest=True)
    if "blur" in draws:
        small = _blurred(config, small, draws)
    small = resize_image_to(small, decoder.image_sizes[number - 1], clamp_range=bounds, nearest=True)
    if "lowres_level" not in draws:
        return small, None
    noisy = conditioner.noise_scheduler.q_sample(decoder.normalize_img(small), t=draws["lowres_level"], noise=draws["lowres_noise"])
    return decoder.unnormalize_img(noisy), draws["lowres_level"]


def _blurred(config: Dalle2DecoderConfig, small: Tensor, draws: dict[str, Tensor]) -> Tensor:
    from kornia.filters import gaussian_blur2d

    found = small
    for kernel in _kernels(config):
        rows = draws["blur"] & (draws["blur_kernel"] == kernel)
        blurred = gaussian_blur2d(small, (kernel, kernel), draws["blur_sigma"].clamp_min(1e-3)[:, None].expand(-1, 2))
        found = torch.where(rows[:, None, None, None], blurred, found)
    return found


def _cropped(picture: Tensor, corners: Tensor, side: int) -> Tensor:
    """`[B, 3, side, side]`: the part of each row whose upper left corner is `corners` `[B, 2]` (y, x)."""
    steps = torch.arange(side, device=picture.device)
    rows = torch.arange(len(picture), device=picture.device)[:, None, None, None]
    ys, xs = corners[:, 0, None] + steps, corners[:, 1, None] + steps
    channels = torch.arange(picture.shape[1], device=picture.device)[None, :, None, None]
    return picture[rows, channels, ys[:, None, :, None], xs[:, None, None, :]]


def stage_losses(
    decoder: Decoder,
    config: Dalle2DecoderConfig,
    number: int,
    image: Tensor,
    conditions: dict[str, Tensor | None],
    draws: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """(distance, variance loss or None), each `[B]`, of U-Net `number` on `image` `[B, 3, H, W]` in [0, 1].

    `conditions` holds `image_embed` `[B, D]` and `text_encodings` `[B, L, D]` or None; `draws` those of `stage_draws`, without the number.
    """
    from dalle2_pytorch.dalle2_pytorch import resize_image_to

    index = number - 1
    unet, scheduler = decoder.unets[index], decoder.noise_schedulers[index]
    small, level = lowres_condition(decoder, config, number, image, draws)
    clean = resize_image_to(image, decoder.image_sizes[index], nearest=True)
    if "crop" in draws:
        side = config.random_crop_sizes[index]
        clean = _cropped(clean, draws["crop"], side)
        small = None if small is None else _cropped(small, draws["crop"], side)
    clean, small = decoder.normalize_img(clean), None if small is None else decoder.normalize_img(small)
    times, noise = draws["timestep"], draws["noise"]
    noisy = scheduler.q_sample(x_start=clean, t=times, noise=noise)
    text = conditions["text_encodings"] if unet.cond_on_text_encodings else None
    options = {"image_embed": conditions["image_embed"], "text_encodings": text, "lowres_cond_img": small, "lowres_noise_level": level}
    learned = decoder.learned_variance[index]
    former = None
    if "self_cond" in draws:
        with torch.no_grad():
            former = decoder.parse_unet_output(learned, unet(noisy, times, **options).float())[0]
        former = former * draws["self_cond"][:, None, None, None]
    if text is not None:
        # Rows of zeros are padding to the peer, for which its null states stand.
        options["text_encodings"] = text * draws["keep_text"][:, None, None]
    with image_mask(unet, draws.get("keep_image")):
        output = unet(noisy, times, **options, self_cond=former).float()
    predicted = decoder.parse_unet_output(learned, output)[0]
    target = noise
    if decoder.predict_v[index]:
        target = scheduler.calculate_v(clean, times, noise)
    elif decoder.predict_x_start[index]:
        target = clean
    loss = scheduler.loss_fn(predicted, target, reduction="none").flatten(1).mean(dim=1)
    loss = scheduler.p2_reweigh_loss(loss, times)
    return loss, _variance_loss(decoder, index, clean, noisy, times, output) if learned else None


def _variance_loss(decoder: Decoder, index: int, clean: Tensor, noisy: Tensor, times: Tensor, output: Tensor) -> Tensor:
    """`[B]` in bits: how far the step's learned distribution is from the true one (Nichol and Dhariwal 2021, arXiv:2102.09672).

    The peer takes a predicted velocity or picture for noise here; we do not.
    """
    from dalle2_pytorch.dalle2_pytorch import NAT, discretized_gaussian_log_likelihood, meanflat, normal_kl

    scheduler = decoder.noise_schedulers[index]
    true_mean, _, true_log_variance = scheduler.q_posterior(x_start=clean, x_t=noisy, t=times)
    mean, _, log_variance, _ = decoder.p_mean_variance(
        None,
        x=noisy,
        t=times,
        image_embed=None,
        noise_scheduler=scheduler,
        clip_denoised=False,
        learned_variance=True,
        predict_x_start=decoder.predict_x_start[index],
        predict_v=decoder.predict_v[index],
        model_output=output,
    )
    mean = mean.detach()
    divergence = meanflat(normal_kl(true_mean, true_log_variance, mean, log_variance)) * NAT
    likelihood = meanflat(-discretized_gaussian_log_likelihood(clean, means=mean, log_scales=0.5 * log_variance)) * NAT
    return torch.where(times == 0, likelihood, divergence)
