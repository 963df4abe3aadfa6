"""Honest rates: samples per second with the wait for data in it, the share of time waiting, MFU where the peak is known."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

# Dense bf16/fp16 FLOP/s of one device by the name that CUDA gives it; NVIDIA's data sheets. The longest match counts.
_PEAK_FLOPS = {
    "A10": 125e12,
    "A100": 312e12,
    "B200": 2250e12,
    "GeForce RTX 3090": 71e12,
    "GeForce RTX 4090": 165e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "Tesla T4": 65e12,
    "Tesla V100": 125e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s of `device` in bf16 or fp16; None where it is not known."""
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in _PEAK_FLOPS if key in name]
    return _PEAK_FLOPS[max(matches, key=len)] if matches else None


class Throughput:
    """Counts steps and waiting between two log lines. Validation is kept out by `paused`; checkpoints count."""

    def __init__(self, samples_per_step: int, peak: float | None, flops_per_sample: float | None, workers: int) -> None:
        self.samples_per_step = samples_per_step
        self.peak, self.flops, self.workers = peak, flops_per_sample, workers
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._begin = time.perf_counter()
        self._waited = self._paused = 0.0
        self._steps = 0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, with the time until each one is there counted as waiting."""
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begin
            yield batch

    def step(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    def paused(self, since: float) -> None:
        """Take the time since `since` (`time.perf_counter()`) out of the interval."""
        self._paused += time.perf_counter() - since

    def rates(self, tokens: float = 0.0) -> dict[str, float]:
        """Figures of the interval, in which `tokens` were seen; starts the next one."""
        elapsed = max(time.perf_counter() - self._begin - self._paused, 1e-9)
        samples = self._steps * self.samples_per_step / elapsed
        figures = {"samples_per_second": samples, "data_wait_share": min(1.0, self._waited / elapsed)}
        if tokens:
            figures["tokens_per_second"] = tokens / elapsed
        if self.peak and self.flops:
            figures["mfu"] = samples * self.flops / (self.peak * self.workers)
        self.restart()
        return figures
