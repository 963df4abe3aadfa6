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
The start is measured with all files in the page cache, after a call that does not count; with `--before CHECKOUT`, a checkout of a former commit of
ours, in turns with the start of that one, of which it may take half.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import _overhead_sides
from _alternate import Program, alternate, alternate_starts, logged_steps, read_steps
from _fresh import environment, fresh
from _overhead_sides import ENDLESS, NEIGHBOURS, RECIPES, SOURCES, overrides_of
from _results import ROOT, Results, Row, add_option, commit
from scene_shards import write_embeddings, write_scenes

from diptych.config import load_recipe
from diptych.trainers.journal import read_metrics

SIDES = _overhead_sides.__file__
GOAL, START_GOAL, DIM, OWN_TURNS, STARTS, PEER = 0.97, 2.0, 96, 3, 3, {1: "a bare PyTorch loop", 2: "torchrun, DDP"}
HOW = {1: {"1 worker": 2}, 2: {"2 workers": 2, "2 workers that read for themselves": 0}}
"""`cluster.data_cpus` of what is measured, by number of workers; the goal is for the fewest."""
STATES = {"on a core": attrgetter("running"), "ready, without one": attrgetter("ready")}
"""Of a training thread, as `Turn` tells them."""
VARIANTS: dict[str, dict[str, list[str]]] = {
    "freed": {"freed memory kept": [], "freed memory malloc's to give back": ["--give-back"]},
    "beside": {"alone": [], **{f"beside {what}": ["--beside", kind] for kind, what in NEIGHBOURS.items()}},
}
"""Ways to run the bare loop, with what `_overhead_sides.py` is called with for each; the first is compared with the others."""


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
    """The bare loop in fresh processes."""
    steps = out / f"bare-{time.time_ns()}.steps"
    command = [*launcher(workers), str(out), "--bare", task, "--steps", str(steps), *variant]
    return Program(command, lambda: read_steps(steps), out / "bare.log", environment(), out)


def part(task: str, out: Path, workers: int, source: str) -> Program:
    """Our loop without Ray in fresh processes."""
    run = out / f"part-{time.time_ns()}"
    command = [*launcher(workers), str(out), "--part", task, "--source", source, "--steps", str(run)]
    return Program(command, lambda: logged_steps(run), out / "part.log", environment(), out)


def launcher(workers: int) -> list[str]:
    """`_overhead_sides.py` in one process, or in torchrun's."""
    return [
        sys.executable,
        *(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if workers > 1 else []),
        SIDES,
    ]


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
            shares = [float(fresh(SIDES, words)["share"]) for _ in range(OWN_TURNS)]
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


def first_step(checkout: Path, out: Path) -> float:
    """Seconds from the command `diptych train` of `checkout` to its first step with 2 workers, on the data in `out`."""
    name = f"start-{time.time_ns()}"
    words = ["coca", "--recipe", RECIPES["coca"], *overrides_of("coca", out, 3, 2), "train.log_every=1", f"name={name}"]
    began = time.time()
    with (out / "start.log").open("a") as log:
        command = [sys.executable, "-m", "diptych.pipelines.train", *words]
        subprocess.run(command, env=environment() | {"PYTHONPATH": str(checkout)}, cwd=out, stdout=log, stderr=log, check=True)
    return float(read_metrics(str(out / "runs" / name))[0]["time"]) - began


def start(options: argparse.Namespace, results: Results) -> None:
    """From the command to the first step, beside a former commit's where its checkout is given, and the stages; the first turn only warms up."""
    checkouts = {"ours": ROOT} | ({"peer": options.before.resolve()} if options.before else {})
    seconds: dict[str, list[float]] = {side: [] for side in checkouts}
    stages: list[dict[str, float]] = []
    for side in checkouts:
        # Each with files of its own, since what a checkout keeps beside shards is its own as well.
        write_scenes(options.out / f"start-{side}" / "shards", options.scenes, 64)
    for turn in range(STARTS + 1):
        for side, checkout in checkouts.items():
            seconds[side].append(first_step(checkout, options.out / f"start-{side}"))
        stages.append(fresh(SIDES, [str(options.out), "--startup", str(time.time())]))
        print(f"start {turn}: " + ", ".join(f"{name} {value:.1f} s" for name, value in stages[-1].items()), flush=True)
    what, measured = "from the command to the first step, warm, 2 workers", {side: found[1:] for side, found in seconds.items()}
    former, goal = (f"ours at {commit(options.before)}", START_GOAL) if options.before else (None, None)
    results.add(Row(what, "s", measured["ours"], former, measured.get("peer"), less=True, at_least=goal, headline=True))
    for name in stages[0]:
        if name != "all":
            results.add(Row(f"{what}: {name}", "s", [found[name] for found in stages[1:]], less=True))


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
    parser.add_argument("--alike", type=int, default=0, metavar="N", help="only compare N starts of the bare loop with each other")
    parser.add_argument(
        "--vary", choices=VARIANTS, help="only compare the bare loop with itself, without freed memory kept or beside others"
    )
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="of a former commit, whose start is measured in turns with this one's"
    )
    add_option(parser)
    options = parser.parse_args()
    options.out = options.out.resolve()
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
