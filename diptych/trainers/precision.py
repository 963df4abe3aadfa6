"""Numeric precision: what `auto` means on this machine and why, the autocast context, fp16's loss scaling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

SHORT_ATTENTION = 160
"""Tokens up to which torch's fused attention is slower than plain matrix products in bf16 on a CPU, backward pass included."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """A resolved precision for one device."""

    name: str
    """fp32, bf16 or fp16."""
    reason: str
    """Why, for the log."""
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        """Of matrix products; weights, optimizer state and reductions stay fp32."""
        return _DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast to `dtype`, or nothing in fp32."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Dynamic loss scaling, switched on for fp16 alone."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


@dataclass
class LossScale:
    """fp16's dynamic loss scale where torch's `GradScaler` cannot reach the gradients; the same rule and the same state."""

    scale: float = 2.0**16
    growth_tracker: int = 0
    growth_interval: int = 2000

    def update(self, overflow: bool) -> None:
        """Halve after an overflow, double after `growth_interval` steps without one."""
        self.growth_tracker = 0 if overflow else self.growth_tracker + 1
        if overflow:
            self.scale *= 0.5
        elif self.growth_tracker == self.growth_interval:
            self.scale, self.growth_tracker = self.scale * 2.0, 0

    def state_dict(self) -> dict[str, float | int]:
        """As `torch.amp.GradScaler.state_dict`."""
        rule = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": self.growth_interval}
        return {"scale": self.scale, **rule, "_growth_tracker": self.growth_tracker}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Take over a state of this class or of `torch.amp.GradScaler`."""
        self.scale, self.growth_tracker = float(state["scale"]), int(state["_growth_tracker"])


def resolve_precision(name: str, device: torch.device) -> Precision:
    """`auto` → bf16 where the device multiplies it fast (CUDA ≥ 8.0, CPUs with AMX), else fp32; other names as they are."""
    if name != "auto":
        return Precision(name, "as configured", device.type)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fast, found = major >= 8, f"CUDA capability {major}.{minor}"
    else:
        fast = "amx_bf16" in _cpu_flags()
        found = "the CPU has amx_bf16" if fast else "the CPU has no amx_bf16"
    return Precision("bf16" if fast else "fp32", found, device.type)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


@contextmanager
def fast_attention(precision: Precision, tokens: int | None) -> Iterator[None]:
    """The faster kernel of `scaled_dot_product_attention` for training over at most `tokens` (None = not known).

    In bf16 on a CPU the fused kernel takes 6 to 12 times as long as matrix products at 17 tokens, backward pass included, 1.6 times at 128,
    and 0.7 of it at 256 (`benchmarks/kernels.py`). Set for the whole process, because checkpointed segments run again in the backward pass, in another thread.
    """
    if precision.device_type != "cpu" or precision.name == "fp32" or tokens is None or tokens > SHORT_ATTENTION:
        yield
        return
    before = torch.backends.cuda.flash_sdp_enabled()
    # The switch is named after CUDA and holds for every device.
    torch.backends.cuda.enable_flash_sdp(enabled=False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(enabled=before)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Numbers below the smallest normal one (1.2e-38 in fp32) count as zero, in this thread and in those that it starts within the block.

    Much of the gradient of a sample that has been learned is that small, and a CPU takes a hundred times as long for such a number: the backward
    pass of a small GPT-2 grew from 37 to 89 ms in 440 steps. Enter it before the first parallel operation: threads take the setting over when they begin.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def set_deterministic() -> None:
    """Deterministic kernels: bitwise equal runs on a GPU, at some speed; an operation without one raises."""
    import os

    # cuBLAS reads it when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False
