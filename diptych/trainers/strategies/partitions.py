"""ZeRO's partitions of the fp32 weights and of AdamW's moments, read and written as full tensors per parameter.

DeepSpeed's own checkpoints are pickles that fit one world size and hold no averages. `deepspeed.utils.safe_get_*` reach
every full tensor; here they are completed by what version 0.19 leaves out: moments before the first step, writing under
stage 3 where the workers do not divide a parameter, and bringing changed fp32 partitions back into the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.trainers.state import MOMENTS


@contextmanager
def scalars_carried(module: nn.Module) -> Iterator[None]:
    """Lets `deepspeed.initialize` work on parameters without dimensions, such as a learned temperature.

    DeepSpeed 0.19 broadcasts weights viewed as bytes, which torch refuses for `[]`. They are broadcast here instead, and
    DeepSpeed's own broadcasts skip them inside the block.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    scalars = [parameter for parameter in module.parameters() if parameter.ndim == 0]
    for parameter in scalars:
        dist.broadcast(parameter.data, src=0)
        parameter.ds_optim_param = True  # type: ignore[attr-defined]
    convert = Init._zero_init_param

    def convert_scalars_too(init: Any, parameter: nn.Parameter) -> None:
        if parameter.ndim:
            convert(init, parameter)
        else:
            init._convert_to_deepspeed_param(parameter)
            parameter.partition()  # type: ignore[attr-defined]

    Init._zero_init_param = convert_scalars_too
    try:
        yield
    finally:
        Init._zero_init_param = convert
        for parameter in scalars:
            del parameter.ds_optim_param  # type: ignore[attr-defined]


class Partitions:
    """What one worker's DeepSpeed optimizer holds. Every worker calls `read`, `write` and `refresh` in the same order."""

    def __init__(self, optimizer: Any, stage: int) -> None:
        self.optimizer, self.stage = optimizer, stage
        self.flats: list[Tensor] = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        # AdamW makes its moments in the first step; they are needed before it, to load them.
        for flat in self.flats:
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self._adamw.state[flat] = {"step": torch.zeros(())} | moments
        if stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _adamw(self) -> torch.optim.AdamW:
        return self.optimizer.optimizer

    @property
    def steps(self) -> float:
        """AdamW's counter, the same for every parameter."""
        return float(self._adamw.state[self.flats[0]]["step"])

    @steps.setter
    def steps(self, value: float) -> None:
        for flat in self.flats:
            self._adamw.state[flat]["step"].fill_(value)

    def bytes_of_moments(self) -> int:
        """Bytes of both moments on this worker."""
        return sum(self._adamw.state[flat][key].nbytes for flat in self.flats for key in MOMENTS)

    def read(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """The full fp32 weights, or a moment, of a trainable parameter, on every worker."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = safe_get_full_optimizer_state(parameter, moment) if moment else safe_get_full_fp32_param(parameter)
        assert found is not None, "DeepSpeed knows no state of this parameter"
        return found

    def write(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Put this worker's part of a full tensor in its place."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.stage < 3:
            if moment:
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                safe_set_full_fp32_param(parameter, value)
            return
        part = self._part(parameter, value)
        if moment:
            safe_set_local_optimizer_state(parameter, part, moment)
        else:
            safe_set_local_fp32_param(parameter, part)

    def write_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Put a full tensor in the place of a parameter that no optimizer knows."""
        if self.stage == 3:
            parameter.ds_tensor.copy_(self._part(parameter, value))  # type: ignore[attr-defined]
        if self.stage < 3 or parameter.numel() == value.numel():
            parameter.copy_(value)

    def _part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This worker's part of `value` under stage 3. Parts are equal, so the last one is padded, which DeepSpeed's full setter forgets."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        rank = self.optimizer._get_param_partition_rank(parameter)
        part = torch.zeros(size, dtype=torch.float32)
        mine = value.flatten()[rank * size : (rank + 1) * size]
        part[: mine.numel()] = mine
        return part

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring changed fp32 partitions into the model's weights, on all workers."""
        optimizer = self.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for index in range(len(self.flats)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
