"""Muon for the matrices of hidden layers (torch's own; Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982), AdamW for all else.

Muon steps along the orthogonalised momentum of a matrix. Its steps are scaled to the root mean square of AdamW's, so both share
one rate and decay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diptych.config import ConfigError, OptimConfig

MOMENTUM = "momentum"
"""What a checkpoint calls Muon's only moment, beside `state.MOMENTS`."""


def hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """The matrices inside blocks (`ModuleList`, `Sequential`): embeddings are tables, not maps, and a head stands outside of blocks."""
    tables = {one.weight for one in module.modules() if isinstance(one, nn.Embedding)}
    blocks = [one for one in module.modules() if isinstance(one, nn.ModuleList | nn.Sequential)]
    inside = {parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2}
    return inside - tables


class MuonWithAdamW(torch.optim.Optimizer):
    """Both optimizers behind one: its `param_groups` are theirs, and its `step` steps both. Their states are their own."""

    def __init__(self, groups: list[dict[str, Any]], matrices: set[nn.Parameter], config: OptimConfig, fused: bool | None) -> None:
        """`groups`: the task's; `matrices`: which of their parameters are Muon's; `fused`: as AdamW's.

        Raises `ConfigError` on `optim.name` where no matrix is among them, or where torch has no Muon.
        """
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError("optim.name", "muon", "adamw under this torch", f"torch {torch.__version__} has no Muon; 2.9 and later have.")
        theirs, others = (
            [group | {"params": chosen} for group in groups if (chosen := [one for one in group["params"] if (one in matrices) == wanted])]
            for wanted in (True, False)
        )
        if not theirs:
            raise ConfigError("optim.name", "muon", "adamw for this task", "It trains no matrix inside of blocks.")
        self.muon = torch.optim.Muon(theirs, lr=config.lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused) if others else None
        self.matrices = {one for group in theirs for one in group["params"]}
        self._both = [one for one in (self.muon, self.adamw) if one is not None]
        super().__init__(groups, {"lr": config.lr})
        self.param_groups = [group for one in self._both for group in one.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step both."""
        for one in self._both:
            one.step()

    def momentum(self, parameter: nn.Parameter) -> Tensor:
        """Of one of `matrices`; zeros before its first gradient, kept from then on."""
        state = self.muon.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        momentum: Tensor = state["momentum_buffer"]
        return momentum
