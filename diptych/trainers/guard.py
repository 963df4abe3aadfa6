"""Watches the gradient norm: a run that has become NaN stops, and says at which step and why that is likely."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.config import RunConfig

_MOST_SKIPPED = 25
"""Steps that fp16's scaler may refuse in a row; from its first scale it needs 16 to reach 1."""


class Diverged(RuntimeError):  # noqa: N818 - it names what happened
    """The gradients are no finite numbers any more."""


class Guard:
    """Keeps its findings on the device, so that watching a GPU costs no synchronisation; `check` reads them."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._finite_norm = torch.zeros((), device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)

    def watch(self, step: int, norm: Tensor) -> None:
        """Take the global gradient norm of step `step` into account; -1 is a step that fp16's scaler refused."""
        norm = norm.detach().float()
        bad = ~torch.isfinite(norm)
        self._first_bad = torch.where(bad & (self._first_bad < 0), torch.full_like(self._first_bad, step), self._first_bad)
        self._finite_norm = torch.where(bad | (norm < 0), self._finite_norm, norm)
        self._skipped = torch.where(norm < 0, self._skipped + 1, torch.zeros_like(self._skipped))
        if norm.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise `Diverged` if any watched step was bad. The same on every worker, because the norm is global."""
        first, skipped = int(self._first_bad), int(self._skipped)
        if first < 0 and skipped < _MOST_SKIPPED:
            return
        train, optim = self.config.train, self.config.optim
        if skipped >= _MOST_SKIPPED:
            raise Diverged(
                f"train.precision=fp16: {skipped} steps in a row overflowed at every loss scale. The loss itself is likely not finite: "
                "check the data, lower optim.lr, or use train.precision=bf16."
            )
        norm = float(self._finite_norm)
        if first == 0 or norm == 0.0:
            cause = "It was so from the first step watched: check the inputs (NaN embeddings) and the starting weights."
        elif train.precision == "fp16":
            cause = "fp16 may have overflowed: use train.precision=bf16."
        else:
            cause = "The learning rate is likely too high: lower optim.lr, raise optim.warmup_steps or set optim.clip_norm."
        raise Diverged(
            f"The gradient became NaN or infinite at step {first} (optim.lr={optim.lr:g}, optim.clip_norm={optim.clip_norm:g}; "
            f"last finite norm {norm:.4g}). {cause} No checkpoint was written since."
        )
