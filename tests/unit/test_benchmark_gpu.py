"""The GPU benchmark's sides take steps of the same size, for every task, without a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/gpu.py by its path; what stands beside it is imported only here."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_gpu", FOLDER / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_gpu", module)  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before:
        if str(FOLDER) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.mark.parametrize("task", ["clip_vit", "coca", "dalle2_decoder", "dalle2_prior", "gpt2", "stable_diffusion"])
def test_both_sides_take_steps(gpu: Any, tmp_path: Path, task: str) -> None:
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
