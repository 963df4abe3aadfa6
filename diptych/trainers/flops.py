"""How much a training step computes, from the sizes of its matrices; for model FLOPs utilisation (PaLM, arXiv:2204.02311)."""

from __future__ import annotations

from torch import nn


def matrix_flops(module: nn.Module) -> int:
    """Operations of forward and backward for one token: 6 per trained weight of a matrix, 2 per frozen one; attention scores left out."""
    return sum((6 if weight.requires_grad else 2) * weight.numel() for weight in module.parameters() if weight.ndim >= 2)
