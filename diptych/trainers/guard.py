"""Watches the gradient norm: a run that has become NaN stops, and says at which step and why that is likely."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diptych.config import RunConfig

_MOST_SKIPPED = 25
"""Steps that fp16's scaler may refuse in a row; from its first scale it needs 16 to reach 1."""
_MOST_UNREAD = 1000
"""Norms left on a device."""


class Diverged(RuntimeError):  # noqa: N818 - it names what happened
    """The gradients are no finite numbers any more."""


class Guard:
    """Keeps the norms on the device, so that watching a GPU costs neither a kernel nor a synchronisation; `check` reads them."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._unread: list[tuple[int, Tensor]] = []
        self._finite_norm = 0.0
        self._skipped = 0

    def watch(self, step: int, norm: Tensor) -> None:
        """Take the global gradient norm `[]` of step `step` into account; -1 is a step that fp16's scaler refused."""
        self._unread.append((step, norm.detach()))
        if norm.device.type == "cpu" or len(self._unread) == _MOST_UNREAD:
            self.check()

    def check(self) -> None:
        """Raise `Diverged` if any watched step was bad. The same on every worker, because the norm is global."""
        unread, self._unread = self._unread, []
        norms = torch.stack([norm for _, norm in unread]).tolist() if unread else []
        for (step, _), norm in zip(unread, norms, strict=True):
            if not math.isfinite(norm):
                raise self._diverged(step)
            self._skipped = self._skipped + 1 if norm < 0 else 0
            if self._skipped == _MOST_SKIPPED:
                raise self._overflowed()
            self._finite_norm = norm if norm >= 0 else self._finite_norm

    def _overflowed(self) -> Diverged:
        return Diverged(
            f"train.precision=fp16: {self._skipped} steps in a row overflowed at every loss scale. The loss itself is likely not finite: "
            "check the data, lower optim.lr, or use train.precision=bf16."
        )

    def _diverged(self, step: int) -> Diverged:
        train, optim = self.config.train, self.config.optim
        if step == 0 or self._finite_norm == 0.0:
            cause = "It was so from the first step watched: check the inputs (NaN embeddings) and the starting weights."
        elif train.precision == "fp16":
            cause = "fp16 may have overflowed: use train.precision=bf16."
        else:
            cause = "The learning rate is likely too high: lower optim.lr, raise optim.warmup_steps or set optim.clip_norm."
        return Diverged(
            f"The gradient became NaN or infinite at step {step} (optim.lr={optim.lr:g}, optim.clip_norm={optim.clip_norm:g}; "
            f"last finite norm {self._finite_norm:.4g}). {cause} No checkpoint was written since."
        )
