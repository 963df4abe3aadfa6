"""Muon for the matrices of hidden layers (torch's own; Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982), AdamW for all else.

Muon steps along the orthogonalised momentum of a matrix. Its steps are scaled to the root mean square of AdamW's, so both share
one rate and decay. The filters of a convolution are the rows of a matrix, as in the method's own experiments on pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diptych.config import ConfigError, OptimConfig

MOMENTUM = "momentum"
"""What a checkpoint calls Muon's only moment, beside `state.MOMENTS`."""


def hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """The matrices inside blocks (`ModuleList`, `Sequential`), and the filters of convolutions there.

    Embeddings are tables, not maps, a head stands outside of blocks, and filters of several groups are several maps.
    """
    tables = {one.weight for one in module.modules() if isinstance(one, nn.Embedding)}
    filters = {one.weight for one in module.modules() if isinstance(one, nn.Conv2d) and one.groups == 1}
    blocks = [one for one in module.modules() if isinstance(one, nn.ModuleList | nn.Sequential)]
    inside = {parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2 or parameter in filters}
    return inside - tables


def _as_matrix(values: Tensor) -> Tensor:
    """A view of dense `[out, …]` as `[out, n]`, in the order that the values have in memory, where channels may be last."""
    size = values[0].numel()
    return values.as_strided((len(values), size), (size, 1))


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
        self.matrices = {one: nn.Parameter(_as_matrix(one.detach())) for group in theirs for one in group["params"]}
        """What torch's Muon, which takes matrices only, steps in place of each parameter: the same memory."""
        stood_in = [group | {"params": [self.matrices[one] for one in group["params"]]} for group in theirs]
        self.muon = torch.optim.Muon(stood_in, lr=config.lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused) if others else None
        self._both = [one for one in (self.muon, self.adamw) if one is not None]
        super().__init__([*theirs, *others], {"lr": config.lr})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step both."""
        for group, stepped in zip(self.param_groups, (group for one in self._both for group in one.param_groups), strict=True):
            stepped["lr"] = group["lr"]
        for parameter, matrix in self.matrices.items():
            assert matrix.data_ptr() == parameter.data_ptr(), "a parameter's memory was exchanged"
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
            matrix.grad = None if gradient is None else _as_matrix(gradient)
        for one in self._both:
            one.step()
        for matrix in self.matrices.values():
            matrix.grad = None  # Else the gradient would live until the next step.

    def momentum(self, parameter: nn.Parameter) -> Tensor:
        """Of one of `matrices`, in its shape; zeros before its first gradient, kept from then on."""
        state = self.muon.state[self.matrices[parameter]]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(self.matrices[parameter], requires_grad=False)
        momentum: Tensor = state["momentum_buffer"]
        return momentum.as_strided(parameter.shape, parameter.stride())
