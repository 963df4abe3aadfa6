"""What `diptych train` costs beside a bare PyTorch loop on tensors in memory, and how long it takes from the command to the first step.

    .venv/bin/python benchmarks/overhead.py OUT --starts 2 --repeat 7 --seconds 3.5

For each task a small model learns generated scenes: `diptych train` as a command, reading and decoding shards, logging and tracking, beside a loop of
a dozen lines on batches that are in memory with their noise drawn, fused AdamW, fp32, one thread a worker, denormals flushed and freed memory kept as
ours, at the same batch size. With 2 workers the bare loop is DDP under torchrun, and ours are measured both with read tasks and reading for
themselves (`cluster.data_cpus=0`). The goal is for the latter: two cores have none to spare. All train without end and are let run in turns, each
stopped while another one runs (`_alternate.py`), `--repeat` turns of `--seconds` in each of `--starts` starts, which differ by some 5 %. Exit status
1 if ours is below 0.97 of the bare loop. Beside each ratio stands what makes it: how long the training threads are on a core in a step, how long they
wait for one, how many pages they touch anew, and what all other processes (Ray's, readers, the driver) keep busy. `--parts` tells where the rest
goes: our loop in the bare loop's place, without Ray, once on batches in memory and once reading in a thread. Beside it, steadier on a noisy machine:
the share of a step of our loop, in one process without Ray, that is neither forward, backward nor optimizer. `--alike 4` compares the bare loop with
itself, `--vary freed` with one that lets malloc give freed memory back, `--vary beside` with itself beside a process that computes, one that streams
through memory, and an idle Ray.
The start is measured with all files in the page cache, after a call that does not count.
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
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from _alternate import Program, StepLog, alternate, alternate_starts, logged_steps, read_steps
from _fresh import environment, fresh
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
LOG_EVERY = dict.fromkeys(RECIPES, 5) | {"dalle2_decoder": 2, "stable_diffusion": 2}
"""Steps between two lines of our log: a turn has many. By default they are 10; each line is a collective, and the bare loop has none."""
GOAL, DIM, KEPT, ENDLESS, PEER = 0.97, 96, 24, 100_000_000, {1: "a bare PyTorch loop", 2: "torchrun, DDP"}
HOW = {1: {"1 worker": 2}, 2: {"2 workers": 2, "2 workers that read for themselves": 0}}
"""`cluster.data_cpus` of what is measured, by number of workers; the goal is for the fewest."""
STATES = {"on a core": attrgetter("running"), "ready, without one": attrgetter("ready")}
"""Of a training thread, as `Turn` tells them."""
BESIDE = "MLflow, while Ray starts"
"""The stage that takes no time of its own."""
SOURCES = {"memory": "batches in memory", "thread": "reading in a thread"}
OWN_STEPS, OWN_TURNS, STARTS = 50, 3, 3
NEIGHBOURS = {
    "computing": "a process that computes",
    "streaming": "a process that streams through memory",
    "ray": "a local Ray with four idle actors",
}
VARIANTS: dict[str, dict[str, list[str]]] = {
    "freed": {"freed memory kept": [], "freed memory malloc's to give back": ["--give-back"]},
    "beside": {"alone": [], **{f"beside {what}": ["--beside", kind] for kind, what in NEIGHBOURS.items()}},
}
"""Ways to run the bare loop, with what this script is called with for each; the first is compared with the others."""


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


def ours(task: str, out: Path, workers: int, readers: int) -> Program:
    """The command; with 0 `readers` the workers read for themselves."""
    name = f"{task}-{time.time_ns()}"
    words = [
        task,
        "--recipe",
        RECIPES[task],
        *overrides_of(task, out, ENDLESS, workers),
        f"name={name}",
        f"cluster.data_cpus={readers}",
        "--json",
    ]
    return Program(
        [sys.executable, "-m", "diptych.pipelines.train", *words],
        lambda: logged_steps(out / "runs" / name),
        out / "ours.log",
        environment(),
        out,
    )


def bare(task: str, out: Path, workers: int, variant: Sequence[str] = ()) -> Program:
    """`loop` in fresh processes."""
    steps = out / f"bare-{time.time_ns()}.steps"
    command = [*launcher(workers), str(out), "--bare", task, "--steps", str(steps), *variant]
    return Program(command, lambda: read_steps(steps), out / "bare.log", environment(), out)


def part(task: str, out: Path, workers: int, source: str) -> Program:
    """`our_loop` in fresh processes."""
    run = out / f"part-{time.time_ns()}"
    command = [*launcher(workers), str(out), "--part", task, "--source", source, "--steps", str(run)]
    return Program(command, lambda: logged_steps(run), out / "part.log", environment(), out)


def launcher(workers: int) -> list[str]:
    """This script in one process, or in torchrun's."""
    return [
        sys.executable,
        *(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if workers > 1 else []),
        __file__,
    ]


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


def sides(task: str, workers: int, options: argparse.Namespace) -> dict[str, Program]:
    """The bare loop, ours in each way to read, and with `--parts` what tells them apart."""
    programs = {"bare": bare(task, options.out, workers)}
    programs |= {how: ours(task, options.out, workers, readers) for how, readers in HOW[workers].items()}
    return programs | {source: part(task, options.out, workers, source) for source in SOURCES if options.parts}


def compare(task: str, options: argparse.Namespace, results: Results) -> None:
    """One task, with each number of workers: both sides in turns."""
    size = load_recipe(task, RECIPES[task]).train.global_batch_size
    for workers in options.workers:
        found = alternate_starts(lambda workers=workers: sides(task, workers, options), options.starts, options.repeat, options.seconds)
        rates = {side: [turn.rate * size for turn in turns] for side, turns in found.items()}
        for how, readers in HOW[workers].items():
            what = f"{task}/{RECIPES[task]} as a command, batch {size}, fp32, {how}"
            goal = GOAL if readers == min(HOW[workers].values()) else None
            row = Row(what, "samples/s", rates[how], PEER[workers], rates["bare"], at_least=goal, headline=goal is not None)
            assert results.add(row).ratio
            print(
                f"{what}: {row.median['ours'] / row.median['peer']:.3f} of {row.peer}{f' (goal: at least {goal})' if goal else ''}",
                flush=True,
            )
            for state, share in STATES.items():
                # The processes that train are the busiest, and so are their threads that do.
                one, other = ([1000 * statistics.mean(share(turn)[:workers]) / turn.rate for turn in found[side]] for side in (how, "bare"))
                spent = Row(f"{what}: of a step, training threads {state}", "ms", one, PEER[workers], other, less=True)
                print(f"{spent.what}: {results.add(spent).median} ms", flush=True)
            for side, whose in ((how, "training threads touch"), ("bare", f"{PEER[workers]} touches")):
                pages = [statistics.mean(turn.touched[:workers]) / turn.rate for turn in found[side]]
                anew = results.add(Row(f"{what}: of a step, pages that {whose} anew", "pages", pages))
                print(f"{anew.what}: {anew.median['ours']}", flush=True)
            others = [sum(turn.busy[workers:]) for turn in found[how]]
            rest = results.add(Row(f"{what}: processors kept busy by other processes", "cores", others))
            print(f"{rest.what}: {rest.median['ours']:.3f}", flush=True)
        for source in SOURCES if options.parts else []:
            what = f"{task}/{RECIPES[task]}, batch {size}, fp32: our loop in the place of {PEER[workers]}, {SOURCES[source]}"
            row = results.add(Row(what, "samples/s", rates[source], PEER[workers], rates["bare"]))
            print(f"{what}: {row.median['ours'] / row.median['peer']:.3f}", flush=True)
        if workers == 1:
            words = [str(options.out), "--own", task]
            shares = [float(fresh(__file__, words)["share"]) for _ in range(OWN_TURNS)]
            own = f"{task}/{RECIPES[task]}, batch {size}, fp32, one process: share of a step that is neither model nor optimizer"
            print(f"{own}: {shares} %", flush=True)
            results.add(Row(own, "%", shares, at_most=100 * (1 - GOAL)))


def alike(task: str, options: argparse.Namespace, results: Results) -> None:
    """The bare loop started `--alike` times, in turns with itself: what of a ratio is chance."""
    size = load_recipe(task, RECIPES[task]).train.global_batch_size
    for workers in options.workers:
        found = alternate({f"start {n}": bare(task, options.out, workers) for n in range(options.alike)}, options.repeat, options.seconds)
        rates = [[turn.rate * size for turn in turns] for turns in found.values()]
        medians = [statistics.median(rate) for rate in rates]
        what = f"{task}/{RECIPES[task]}, batch {size}, fp32: {PEER[workers]} in {options.alike} starts"
        results.add(Row(f"{what}: medians", "samples/s", medians))
        results.add(Row(f"{what}: the best median over the worst", "", [max(medians) / min(medians)]))


def vary(task: str, options: argparse.Namespace, results: Results) -> None:
    """The bare loop in each way of `VARIANTS`: its samples/s as it is beside the others, and how many pages a step touches anew."""
    size = load_recipe(task, RECIPES[task]).train.global_batch_size
    variants = VARIANTS[options.vary]
    for workers in options.workers:
        found = alternate_starts(
            lambda workers=workers: {way: bare(task, options.out, workers, words) for way, words in variants.items()},
            options.starts,
            options.repeat,
            options.seconds,
        )
        rates = {way: [turn.rate * size for turn in turns] for way, turns in found.items()}
        what = f"{task}/{RECIPES[task]}, batch {size}, fp32: {PEER[workers]}"
        first, *others = variants
        for way in others:
            results.add(Row(f"{what}, {first} and {way}", "samples/s", rates[first], way, rates[way]))
        for way, turns in found.items():
            pages = [sum(turn.touched) / turn.rate for turn in turns]
            results.add(Row(f"{what}, {way}: of a step, pages touched anew", "pages", pages))


def start(options: argparse.Namespace, results: Results) -> None:
    """The stages from the command to the first step; the first call only warms up."""
    found: list[dict[str, float]] = []
    for turn in range(STARTS + 1):
        stages = fresh(__file__, [str(options.out), "--startup", str(time.time())])
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
    parser.add_argument("--seconds", type=float, default=3.5, help="of a turn")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=7, help="turns of a start")
    parser.add_argument("--starts", type=int, default=2, help="of all sides, one after the other")
    parser.add_argument("--parts", action="store_true", help="also our loop without Ray, from memory and reading in a thread")
    parser.add_argument("--part", choices=RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--source", choices=SOURCES, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alike", type=int, default=0, metavar="N", help="only compare N starts of the bare loop with each other")
    parser.add_argument(
        "--vary", choices=VARIANTS, help="only compare the bare loop with itself, without freed memory kept or beside others"
    )
    parser.add_argument("--give-back", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--beside", choices=NEIGHBOURS, help=argparse.SUPPRESS)
    parser.add_argument("--be", choices=NEIGHBOURS, help=argparse.SUPPRESS)
    parser.add_argument("--bare", choices=RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--own", choices=RECIPES, help=argparse.SUPPRESS)
    parser.add_argument("--startup", type=float, help=argparse.SUPPRESS)
    add_option(parser)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.bare:
        loop(options.bare, options.out, options.steps, options.give_back, options.beside)
        return
    if options.be:
        neighbour(options.be)
        return
    if options.part:
        our_loop(options.part, options.out, options.steps, options.source)
        return
    if options.own:
        print(json.dumps({"share": own_share(options.own, options.out)}))
        return
    if options.startup:
        os.chdir(options.out)
        print(json.dumps(startup(options.out, options.startup)))
        return
    write_scenes(options.out / "shards", options.scenes, 64)
    write_embeddings(options.out / "embeddings", options.out / "shards", DIM)
    results = Results(__file__, options.results)
    if options.alike or options.vary:
        for task in options.tasks:
            (alike if options.alike else vary)(task, options, results)
        sys.exit(0 if results.finish() else 1)
    for task in options.tasks if "rate" in options.only else []:
        compare(task, options, results)
    if "start" in options.only:
        start(options, results)
    sys.exit(0 if results.finish() else 1)


if __name__ == "__main__":
    main()
