"""What `diptych train` costs beside a bare PyTorch loop on tensors in memory, and how long it takes from the command to the first step.

    .venv/bin/python benchmarks/overhead.py OUT --repeat 3 --seconds 15

For each task a small model learns generated scenes: `diptych train` as a command, reading and decoding shards, logging and tracking, beside a loop of a
dozen lines on batches that are in memory with their noise drawn, fused AdamW, fp32, one thread a worker, at the same batch size. With 2
workers the bare loop is DDP under torchrun. All take turns; every measurement is a fresh process; a rate is the median over intervals of ten
steps after the first fifth, so that a moment in which the machine had something else to do counts for neither side. Exit status 1 if ours is below 0.97 of
the bare loop. Beside it, steadier on a noisy machine: the share of a step of our loop, in one process without Ray, that is neither
forward, backward nor optimizer. The start is measured with all files in the page cache, after a call that does not count.
"""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _results import Results, Row, add_option
from scene_shards import write_embeddings, write_scenes

from diptych.config import RunConfig, apply_overrides, load_recipe

RECIPES = {
    "gpt2": "prompts_small",
    "clip_vit": "scenes",
    "coca": "demo",
    "dalle2_prior": "demo",
    "dalle2_decoder": "scenes",
    "stable_diffusion": "scenes",
}
GOAL, DIM, KEPT, EVERY, PEER = 0.97, 96, 24, 10, {1: "a bare PyTorch loop", 2: "torchrun, DDP"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def overrides_of(task: str, out: Path, steps: int, workers: int) -> list[str]:
    """What both sides are called with beside the recipe."""
    found = [
        f"data.shards={out / 'shards'}",
        f"train.steps={steps}",
        f"workers={workers}",
        "train.precision=fp32",
        f"train.log_every={EVERY}",
    ]
    found += ["validation.samples=0", "checkpoint.every_steps=0", "optim.ema_decay=0", "optim.name=adamw", "data.validation_share=0"]
    return found + ([f"data.embeddings={out / 'embeddings'}"] if task in ("clip_vit", "dalle2_prior", "dalle2_decoder") else [])


def config_of(task: str, out: Path, steps: int, workers: int) -> RunConfig:
    """The run of both sides."""
    return apply_overrides(load_recipe(task, RECIPES[task]), overrides_of(task, out, steps, workers))


def ours(task: str, out: Path, steps: int, workers: int) -> float:
    """Samples per second of the command, see `median_rate`."""
    from diptych.trainers.journal import read_metrics

    name = f"{task}-{time.time_ns()}"
    command = [sys.executable, "-m", "diptych.pipelines.train", task, "--recipe", RECIPES[task], *overrides_of(task, out, steps, workers)]
    call([*command, f"name={name}", "--json"], out)
    ends = [(line["step"], line["time"]) for line in read_metrics(str(out / "runs" / name))]
    return median_rate(ends, steps, load_recipe(task, RECIPES[task]).train.global_batch_size)


def median_rate(ends: list[tuple[int, float]], steps: int, batch_size: int) -> float:
    """Samples per second: the median over intervals between two of `ends` (steps done, time) after the first fifth of the steps."""
    kept = [end for end in ends if end[0] >= steps // 5]
    return statistics.median((step - before) * batch_size / (stop - start) for (before, start), (step, stop) in itertools.pairwise(kept))


def bare(task: str, out: Path, steps: int, workers: int) -> float:
    """Samples per second of `loop` in fresh processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if workers > 1 else []
    found = call([sys.executable, *launcher, __file__, str(out), "--bare", task, "--steps", str(steps), "--workers", str(workers)], out)
    return float(json.loads(found.splitlines()[-1])["rate"])


def call(command: list[str], folder: Path) -> str:
    """Standard output of a command in `folder`; its errors are shown if it fails."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        command, cwd=folder, env=os.environ | ONE_THREAD | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if found.returncode:
        sys.stderr.write(found.stderr[-4000:])
        raise SystemExit(f"{' '.join(command)} ended with {found.returncode}")
    return found.stdout


def loop(task_name: str, out: Path, steps: int) -> float | None:
    """The bare loop, in this process or as one of torchrun's; samples per second on rank 0, see `median_rate`."""
    import torch
    import torch.distributed as dist

    from diptych.pipelines.prepare import prepare
    from diptych.trainers.tasks import load_task_class

    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo")
    folder = out / f"bare-{os.getpid()}"
    folder.mkdir()
    prepared = prepare(config_of(task_name, out, steps, size), folder)
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
    ends = []
    for step, batch in zip(range(steps), itertools.cycle(batches), strict=False):
        if step % EVERY == 0:
            ends.append((step, time.perf_counter()))
        model(batch).backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if size > 1:
        dist.destroy_process_group()
    return median_rate(ends, steps, config.train.global_batch_size) if rank == 0 else None


def own_share(task: str, out: Path, steps: int) -> float:
    """Median share of a step, in percent, that our loop in this process spends on neither the model nor the optimizer."""
    import torch
    from _runs import timed_run

    torch.set_num_threads(1)
    seconds, inside = timed_run(config_of(task, out, steps, 1), out / f"own-{os.getpid()}", steps // 5)
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
    timed("_tracker", "MLflow")
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
    return stages | {"other": total - sum(stages.values()), "all": total}


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


def compare(task: str, options: argparse.Namespace, results: Results) -> None:
    """One task, with each number of workers: both sides in turn."""
    size = load_recipe(task, RECIPES[task]).train.global_batch_size
    for workers in options.workers:
        steps = options.steps or max(5 * EVERY, int(bare(task, options.out, 5 * EVERY, workers) * options.seconds / size))
        rates: dict[str, list[float]] = {"ours": [], "bare": []}
        for turn in range(options.repeat):
            for side, measure in (("ours", ours), ("bare", bare)):
                rates[side].append(measure(task, options.out, steps, workers))
                print(f"{task}, {workers} workers, turn {turn + 1}: {side:4} {rates[side][-1]:9.1f} samples/s", flush=True)
        what = f"{task}/{RECIPES[task]} as a command, batch {size}, fp32, {workers} worker{'s' if workers > 1 else ''}"
        row = Row(what, "samples/s", rates["ours"], PEER[workers], rates["bare"], at_least=GOAL, headline=True)
        assert results.add(row).ratio
        print(f"{what}: {row.median['ours'] / row.median['peer']:.3f} of {row.peer} (goal: at least {GOAL})", flush=True)
        if workers == 1:
            command = [sys.executable, __file__, str(options.out), "--own", task, "--steps", str(steps)]
            shares = [float(json.loads(call(command, options.out).splitlines()[-1])["share"]) for _ in range(options.repeat)]
            own = f"{task}/{RECIPES[task]}, batch {size}, fp32, one process: share of a step that is neither model nor optimizer"
            print(f"{own}: {shares} %", flush=True)
            results.add(Row(own, "%", shares, at_most=100 * (1 - GOAL)))


def start(options: argparse.Namespace, results: Results) -> None:
    """The stages from the command to the first step; the first call only warms up."""
    found: list[dict[str, float]] = []
    for turn in range(options.repeat + 1):
        stages = json.loads(call([sys.executable, __file__, str(options.out), "--startup", str(time.time())], options.out).splitlines()[-1])
        print(f"start {turn}: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items()), flush=True)
        found += [stages] if turn else []
    for name in found[0]:
        label = "from the command to the first step, warm, 2 workers" + ("" if name == "all" else f": {name}")
        results.add(Row(label, "s", [stages[name] for stages in found], less=True, headline=name == "all"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--workers", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=["rate", "start"], default=["rate", "start"])
    parser.add_argument("--seconds", type=float, default=15, help="of a measurement, about")
    parser.add_argument("--steps", type=int, default=0, help="instead of --seconds")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bare", choices=RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--own", choices=RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--startup", type=float, help=argparse.SUPPRESS)
    add_option(parser)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.bare:
        rate = loop(options.bare, options.out, options.steps)
        if rate is not None:
            print(json.dumps({"rate": rate}))
        return
    if options.own:
        print(json.dumps({"share": own_share(options.own, options.out, options.steps)}))
        return
    if options.startup:
        print(json.dumps(startup(options.out, options.startup)))
        return
    write_scenes(options.out / "shards", options.scenes, 64)
    write_embeddings(options.out / "embeddings", options.out / "shards", DIM)
    results = Results(__file__, options.results)
    for task in options.tasks if "rate" in options.only else []:
        compare(task, options, results)
    if "start" in options.only:
        start(options, results)
    sys.exit(0 if results.finish() else 1)


if __name__ == "__main__":
    main()
