"""AdamW with moments in 8 bits (bitsandbytes; Dettmers et al. 2022, arXiv:2110.02861), and its moments as the full tensors of a checkpoint.

A moment is stored as codes and the largest value of each block of 256. Making it full and storing it again gives the same codes, since the largest
value's own code is exact, so a resumed run goes on from the same state. Small parameters keep full moments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diptych.config import ConfigError, OptimConfig
from diptych.trainers.state import MOMENTS

_BLOCK = 256


def adamw_8bit(groups: list[dict[str, Any]], config: OptimConfig) -> Any:
    """bitsandbytes' AdamW8bit; `ConfigError` without a GPU or without the package."""
    device = groups[0]["params"][0].device
    if device.type != "cuda":
        raise ConfigError("optim.eight_bit", True, "false without a GPU", f"The weights are on {device}; set cluster.gpus_per_worker=1.")
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("optim.eight_bit", True, "false without bitsandbytes", "Install it with the extra gpu.") from error
    return bitsandbytes.optim.AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def full_moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """`exp_avg`, `exp_avg_sq` and `step` of one parameter's state, in full."""
    from bitsandbytes import functional

    full = {}
    for number, name in enumerate(MOMENTS, start=1):
        value = state[f"state{number}"]
        if value.dtype == torch.uint8:
            value = functional.dequantize_blockwise(value, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=_BLOCK)
        full[name] = value.float()
    return full | {"step": torch.tensor(float(state["step"]))}


def store_moments(optimizer: Any, parameter: nn.Parameter, moments: dict[str, Tensor], step: float) -> None:
    """Store full moments as the optimizer keeps them."""
    from bitsandbytes import functional

    places = [
        (group, group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, one in enumerate(group["params"])
        if one is parameter
    ]
    ((group, group_index, index),) = places
    optimizer.init_state(group, parameter, group_index, index)
    state = optimizer.state[parameter]
    for number, name in enumerate(MOMENTS, start=1):
        place, value = state[f"state{number}"], moments[name].to(parameter.device)
        if place.dtype == torch.uint8:
            absmax = state[f"absmax{number}"]
            functional.quantize_blockwise(value, code=state[f"qmap{number}"], absmax=absmax, out=place, blocksize=_BLOCK)
        else:
            place.copy_(value)
    state["step"] = int(step)
