"""Run a function in n processes joined by gloo, with a deadline.

Children come from a server that has imported the heavy modules once and started no thread, so that a start costs a
fraction of a second. The function travels by value: it may live in any test module, and its arguments and result are pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cloudpickle

from diptych.config import task_names

_CONTEXT = multiprocessing.get_context("forkserver")
# DeepSpeed looks for a GPU when it is imported, which must not happen before a fork.
_DEEPSPEED = (
    ["deepspeed.runtime.zero.muon.original_muon", "deepspeed.runtime.zero.stage3"] if os.environ.get("DS_ACCELERATOR") == "cpu" else []
)
_TASKS = [f"diptych.trainers.tasks.{name}" for name in task_names()]
_CONTEXT.set_forkserver_preload(
    ["diptych.trainers.loop", "torch._dynamo", "safetensors.torch", "pyarrow.parquet", "fsspec", *_TASKS, *_DEEPSPEED]
)


class WorkerFailed(AssertionError):  # noqa: N818
    """A worker raised, died or outlived the deadline; the message holds what each had to say."""


def run_workers(function: Callable[..., Any], size: int, *arguments: Any, deadline_seconds: float = 120.0) -> list[Any]:
    """`function(*arguments)` on `size` processes with an initialised gloo group; their results in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start_workers(function, size, *arguments, folder=Path(folder))
        try:
            _join(processes, time.monotonic() + deadline_seconds, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [cloudpickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(size)]


def start_workers(function: Callable[..., Any], size: int, *arguments: Any, folder: Path) -> list[BaseProcess]:
    """Start the processes and return; `folder` holds their rendezvous, results (`result-<rank>`) and errors."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    module = sys.modules[function.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        call = cloudpickle.dumps((function, arguments))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    processes = [_CONTEXT.Process(target=_child, args=(rank, size, str(folder), call), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def _child(rank: int, size: int, folder: str, call: bytes) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        # DeepSpeed reads the launcher's variables even where a group is there already.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        store = dist.FileStore(f"{folder}/rendezvous", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        function, arguments = cloudpickle.loads(call)
        result = function(*arguments)
        partial = Path(folder, f"partial-{rank}")
        partial.write_bytes(cloudpickle.dumps(result))
        partial.rename(Path(folder, f"result-{rank}"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)


def _join(processes: list[BaseProcess], deadline: float, folder: Path) -> None:
    """Wait for all; the first failure or the deadline ends the wait, and the rest are the caller's to kill."""
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    time.sleep(0.2 if any(process.exitcode for process in processes) else 0.0)
    states = [process.exitcode for process in processes]
    if any(state != 0 for state in states):
        errors = [f"rank {file.name[6:]}:\n{file.read_text()}" for file in sorted(folder.glob("error-*"))]
        raise WorkerFailed(f"exit codes {states} (None = still running at the deadline)\n" + "\n".join(errors))
