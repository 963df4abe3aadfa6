"""A step finds the memory of the last one, and computes the same in it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, threading
import torch
from support_training import fresh_pages
from diptych.trainers.host_memory import keep_freed_memory

def trained():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.SiLU(), torch.nn.Conv2d(32, 3, 3))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    pictures = torch.randn(16, 3, 64, 64)
    for _ in range(3):
        model(pictures).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]

def resident():
    return int(open("/proc/self/statm").read().split()[1])

def body():
    torch.set_num_threads(1)
    before, weights = fresh_pages(), trained()
    kept = keep_freed_memory()
    after, pages = fresh_pages(), resident()
    same = all(torch.equal(*pair) for pair in zip(weights, trained()))
    for _ in range(20):
        fresh_pages()
    print(json.dumps({"kept": kept, "before": before, "after": after, "same": same, "grown": resident() / pages}))

if WHERE == "main":
    body()
else:
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such switches")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_memory_that_was_freed_is_not_touched_anew_and_weights_are_the_same(where: str) -> None:
    """In the main thread and in one with heaps of its own, as Ray Train's is. What malloc keeps by itself is chance, so here it begins with nothing."""
    code = CODE.replace("WHERE", repr(where))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    assert found["kept"]
    assert found["before"] > 10_000, "else there is nothing to keep"
    assert found["after"] < 100
    assert found["same"]
    assert found["grown"] < 1.05
