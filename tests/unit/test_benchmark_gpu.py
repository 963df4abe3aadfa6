"""The GPU benchmark's sides take steps of the same size, for every task, without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from support_benchmarks import benchmark_module

for name in ("_fresh", "_memory", "_results"):
    benchmark_module(name)
gpu = benchmark_module("gpu")


@pytest.mark.parametrize("task", ["clip_vit", "coca", "dalle2_decoder", "dalle2_prior", "gpt2", "stable_diffusion"])
def test_both_sides_take_steps(tmp_path: Path, task: str) -> None:
    assert task in gpu.CASES
    options = argparse.Namespace(out=tmp_path, device="cpu", batch=2, steps=1, compile=False, small=True)
    assert gpu.flops(task, options)["flops"] > 1e5
    for make in (gpu.ours, gpu.peer):
        with torch.random.fork_rng():
            side = make(task, options)
            before = [parameter.detach().clone() for parameter in side.model.parameters()]
            side.step()
        assert side.samples == 2
        assert any(not torch.equal(old, new) for old, new in zip(before, side.model.parameters(), strict=True))
