"""What `overhead.py` measures, each in a process of its own: the bare loop, ours without Ray, the start of a run, and what may run beside them."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _alternate import StepLog

from diptych.config import RunConfig, apply_overrides, load_recipe

RECIPES = {
    "gpt2": "prompts_small",
    "clip_vit": "scenes",
    "coca": "demo",
    "dalle2_prior": "demo",
    "dalle2_decoder": "scenes",
    "stable_diffusion": "scenes",
}
LOG_EVERY = dict.fromkeys(RECIPES, 5) | {"dalle2_decoder": 2, "stable_diffusion": 2}
"""Steps between two lines of our log: a turn has many. By default they are 10; each line is a collective, and the bare loop has none."""
KEPT, ENDLESS, OWN_STEPS = 24, 100_000_000, 50
SOURCES = {"memory": "batches in memory", "thread": "reading in a thread"}
NEIGHBOURS = {
    "computing": "a process that computes",
    "streaming": "a process that streams through memory",
    "ray": "a local Ray with four idle actors",
}
BESIDE = "MLflow, while Ray starts"
"""The stage that takes no time of its own."""


def overrides_of(task: str, out: Path, steps: int, workers: int) -> list[str]:
    """What both sides are called with beside the recipe."""
    found = [
        f"data.shards={out / 'shards'}",
        f"train.steps={steps}",
        f"workers={workers}",
        "train.precision=fp32",
        f"train.log_every={LOG_EVERY[task]}",
    ]
    found += ["validation.samples=0", "checkpoint.every_steps=0", "optim.ema_decay=0", "optim.name=adamw", "data.validation_share=0"]
    return found + ([f"data.embeddings={out / 'embeddings'}"] if task in ("clip_vit", "dalle2_prior", "dalle2_decoder") else [])


def config_of(task: str, out: Path, steps: int, workers: int) -> RunConfig:
    """The run of both sides."""
    return apply_overrides(load_recipe(task, RECIPES[task]), overrides_of(task, out, steps, workers))


def our_loop(task_name: str, out: Path, run: Path, source: str) -> None:
    """Our training session without end and without Ray, in this process or as one of torchrun's."""
    import torch
    import torch.distributed as dist

    from diptych.batches import StepBatch
    from diptych.datasets.stream import LocalStream, StreamSpec
    from diptych.pipelines.prepare import prepare
    from diptych.pipelines.session import payload_of, run_session

    size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo")
    run.mkdir(exist_ok=True)
    folder = out / f"part-{os.getpid()}"
    folder.mkdir()
    prepared = prepare(config_of(task_name, out, ENDLESS, size), folder)

    def in_memory(spec: StreamSpec, rank: int, size: int, start: int, stop: int | None) -> Iterator[StepBatch]:
        shares = list(LocalStream(spec, rank, size, 0, KEPT))
        return (StepBatch(step, shares[step % KEPT].arrays) for step in range(start, stop or ENDLESS))

    stream = in_memory if source == "memory" else LocalStream
    run_session(payload_of(prepared, run), prepared.config, torch.device("cpu"), stream)


def loop(task_name: str, out: Path, steps: Path, gives_back: bool, beside: str | None) -> None:
    """The bare loop without end, in this process or as one of torchrun's; rank 0 notes its steps.

    Freed memory is malloc's to give back or kept; one of `NEIGHBOURS` may run beside it.
    """
    import torch
    import torch.distributed as dist

    from diptych.pipelines.prepare import prepare
    from diptych.trainers.host_memory import keep_freed_memory
    from diptych.trainers.tasks import load_task_class

    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if beside and rank == 0:
        begin_neighbour(beside, out)
    torch.set_num_threads(1)
    # As our workers do.
    torch.set_flush_denormal(True)
    if not gives_back:
        keep_freed_memory()
    if size > 1:
        dist.init_process_group("gloo")
    folder = out / f"bare-{os.getpid()}"
    folder.mkdir()
    prepared = prepare(config_of(task_name, out, ENDLESS, size), folder)
    config = prepared.config
    torch.manual_seed(config.seed)
    task = load_task_class(task_name)(config.task, config.seed)
    batches = batches_in_memory(prepared, task, rank, size)
    model: torch.nn.Module = Learned(task, rank, size)
    if size > 1:
        model(batches[0]).backward()
        idle = any(parameter.requires_grad and parameter.grad is None for parameter in task.parameters())
        task.zero_grad()
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=idle)
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optim = config.optim
    optimizer = torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
    log = StepLog(steps) if rank == 0 else None
    for batch in itertools.cycle(batches):
        model(batch).backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if log:
            log.ended()


def begin_neighbour(kind: str, out: Path) -> None:
    """Start `neighbour` as a child, which is stopped and ended with this process, and wait until it is ready."""
    child = subprocess.Popen([sys.executable, __file__, str(out), "--be", kind], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    if not any(line == "ready\n" for line in child.stdout):
        raise SystemExit(f"{NEIGHBOURS[kind]} has ended")


def neighbour(kind: str) -> None:
    """One of `NEIGHBOURS`, without end."""
    if kind == "ray":
        from diptych.pipelines.ray_context import ray_session

        with ray_session(2, logical_cpus=8) as ray:

            @ray.remote(num_cpus=0)
            class Idle:
                def is_there(self) -> bool:
                    return True

            actors = [Idle.remote() for _ in range(4)]
            ray.get([actor.is_there.remote() for actor in actors])
            print("ready", flush=True)
            while True:
                time.sleep(3600)
    import numpy as np

    memory = np.zeros(1 << 25 if kind == "streaming" else 1)  # 256 MB: more than any cache.
    print("ready", flush=True)
    while True:
        memory += 1


def own_share(task: str, out: Path) -> float:
    """Median share of a step, in percent, that our loop in this process spends on neither the model nor the optimizer."""
    import torch
    from _runs import timed_run

    torch.set_num_threads(1)
    seconds, inside = timed_run(config_of(task, out, OWN_STEPS, 1), out / f"own-{os.getpid()}", OWN_STEPS // 5)
    return 100 * statistics.median(1 - part / whole for part, whole in zip(inside, seconds, strict=True))


def batches_in_memory(prepared: Any, task: Any, rank: int, size: int) -> list[dict[str, Any]]:
    """The first shares of this rank as tensors, with their random inputs."""
    import torch

    from diptych.datasets.stream import LocalStream
    from diptych.trainers.micro_batches import make_micro_batches

    task.train()
    shares = LocalStream(prepared.train, rank, size, 0, KEPT)
    return [batch for share in shares for batch in make_micro_batches(task, share.arrays, 1, torch.device("cpu"))]


def Learned(task: Any, rank: int, size: int) -> Any:  # noqa: N802 - a class that needs torch
    """A module whose forward is the loss, contrastive terms over all workers included, as open_clip gathers them."""
    import torch
    from torch.distributed.nn import functional as collective

    class _Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.task = task

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            output = self.task(batch)
            terms = dict(output.terms)
            if output.features:
                gathered = {
                    name: value if value.ndim == 0 or size == 1 else torch.cat(collective.all_gather(value))
                    for name, value in output.features.items()
                }
                rows = len(batch["weight"])
                terms |= self.task.contrast(gathered, batch["weight"].repeat(size), slice(rank * rows, (rank + 1) * rows))
            coefficients = self.task.coefficients
            return torch.stack([coefficients.get(name, 1.0) * term.sum / term.weight for name, term in terms.items()]).sum()

    return _Learned()


def startup(out: Path, began: float) -> dict[str, float]:
    """`diptych train` in this process, which was begun at `began`; seconds of its stages up to the first step."""
    seen: dict[str, float] = {}
    from diptych.pipelines import train
    from diptych.trainers.attempts import read_attempts
    from diptych.trainers.runfolder import RunFolder

    stages = {"Python and imports": time.time() - began}

    def timed(name: str, stage: str) -> None:
        really: Callable[..., Any] = getattr(train, name)

        def wrapper(*given: Any) -> Any:
            begin = time.time()
            try:
                return really(*given)
            finally:
                stages[stage] = time.time() - begin

        setattr(train, name, wrapper)

    def noted(name: str, event: str) -> None:
        really: Callable[..., Any] = getattr(train, name)

        def wrapper(*given: Any) -> Any:
            seen[event] = time.time()
            return really(*given)

        setattr(train, name, wrapper)

    timed("prepare", "data: manifest, split, tokenizer")
    timed("_tracker", BESIDE)
    noted("_train", "before Ray")
    noted("_fit", "Ray is up")
    threading.Thread(target=watch, args=(seen,), daemon=True).start()
    name = f"startup-{time.time_ns()}"
    config = apply_overrides(config_of("coca", out, 3, 2), [f"name={name}", "train.log_every=1"])
    train.run(config)
    run_dir = out / "runs" / name
    first = json.loads(next(iter((run_dir / "metrics").glob("a*.jsonl"))).read_text().splitlines()[0])
    figures = first["metrics"]
    elapsed = config.train.global_batch_size / figures["train/samples_per_second"]
    begun = read_attempts(RunFolder(str(run_dir)))[1].started
    stages["Ray"] = seen["Ray is up"] - seen["before Ray"]
    stages["Ray Train: controller and worker processes"] = seen["worker"] - seen["Ray is up"]
    stages["workers: imports, process group, model"] = begun - seen["worker"]
    stages["first batch"] = figures["train/data_wait_share"] * elapsed
    stages["first step"] = elapsed - stages["first batch"]
    total = first["time"] - began
    return stages | {"other": total - sum(seconds for name, seconds in stages.items() if name != BESIDE), "all": total}


def watch(seen: dict[str, float]) -> None:
    """Note when the first training worker's process is there."""
    import psutil

    while "worker" not in seen:
        for process in psutil.Process().children(recursive=True):
            try:
                if "RayTrainWorker" in "".join(process.cmdline()):
                    seen["worker"] = time.time()
            except psutil.Error:
                continue
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    side = parser.add_mutually_exclusive_group(required=True)
    side.add_argument("--bare", choices=RECIPES, help="the bare loop of a task")
    side.add_argument("--part", choices=RECIPES, help="our loop of a task")
    side.add_argument("--own", choices=RECIPES, help="the share of our loop of a task in a step")
    side.add_argument("--startup", type=float, metavar="BEGAN", help="the stages of a run that was begun at this time")
    side.add_argument("--be", choices=NEIGHBOURS, help="what may run beside the bare loop")
    parser.add_argument("--steps", type=Path, help="where the bare loop or ours notes its steps")
    parser.add_argument("--source", choices=SOURCES, help="of batches, for our loop")
    parser.add_argument("--give-back", action="store_true", help="the bare loop lets malloc give freed memory back")
    parser.add_argument("--beside", choices=NEIGHBOURS, help="what runs beside the bare loop")
    options = parser.parse_args()
    if options.bare:
        loop(options.bare, options.out, options.steps, options.give_back, options.beside)
    elif options.part:
        our_loop(options.part, options.out, options.steps, options.source)
    elif options.own:
        print(json.dumps({"share": own_share(options.own, options.out)}))
    elif options.be:
        neighbour(options.be)
    else:
        os.chdir(options.out)
        print(json.dumps(startup(options.out, options.startup)))


if __name__ == "__main__":
    main()
