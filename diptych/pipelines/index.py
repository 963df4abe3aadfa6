"""`diptych index SHARDS`: builds or checks the manifest and prints every fault found."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from diptych.pipelines.console import finish, note, progress, show_faults
from diptych.pipelines.options import AsJson, ManifestFolder


def run(
    shards: str, manifest: str = "", jobs: int = 0, rebuild: bool = False, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Bring the manifest of `shards` up to date and return what it knows.

    Keys: `shards`, `samples`, `failed_downloads`, `digest`, `faults` (each with `shard`, `key`, `kind`, `detail`).
    `manifest` is its folder (empty = beside the shards), `jobs` 0 is one walk per core, `rebuild` walks unchanged shards
    again, `progress` is called with (shards walked, shards to walk). Raises `ConfigError` if there are no shards.
    """
    from diptych.datasets.manifest import build_manifest, open_manifest

    found = (build_manifest if rebuild else open_manifest)(shards, manifest, jobs or None, progress)
    faults = [{name: value for name, value in asdict(fault).items() if name != "slot"} for fault in found.faults]
    return {
        "shards": len(found.shard_names),
        "samples": found.samples,
        "failed_downloads": found.failed_downloads,
        "digest": found.digest,
        "faults": faults,
    }


def deep(shards: str, manifest: str, jobs: int, repair: bool, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Read and decode every member; with `repair`, write clean copies of shards with faults to `repaired/` beside them.

    Keys: `verified` (samples), `faults` (those that only decoding shows), and with `repair`: `repaired`, a list of `url, samples, lost`.
    """
    import concurrent.futures
    import multiprocessing
    import os

    from diptych.datasets.manifest import open_manifest
    from diptych.datasets.verify import repair_shard, verify_shard

    data = open_manifest(shards, manifest, jobs or None)
    numbers = range(len(data.shard_names))
    faults: list[dict[str, Any]] = []
    with concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for done, found in enumerate(pool.map(verify_shard, [data] * len(numbers), numbers), 1):
            faults += [{name: value for name, value in asdict(fault).items() if name != "slot"} for fault in found]
            if progress:
                progress(done, len(numbers))
    result: dict[str, Any] = {"verified": data.samples, "faults": faults}
    if repair:
        broken = {fault.shard for fault in data.faults if fault.shard} | {fault["shard"] for fault in faults}
        names = {name: number for number, name in enumerate(data.shard_names)}
        result["repaired"] = [
            asdict(repair_shard(data, names[name], {fault["key"] for fault in faults if fault["shard"] == name}))
            for name in sorted(broken & names.keys())
        ]
    return result


def report(result: dict[str, Any]) -> None:
    """Print the result for people: the counts, faults by kind, then the first faults one by one."""
    note(f"{result['samples']:,} samples in {result['shards']:,} shards, {result['failed_downloads']:,} failed downloads")
    note(f"digest {result['digest']}")
    if not result["faults"]:
        note("no faults")
        return
    kinds = Counter(fault["kind"] for fault in result["faults"])
    note("faults: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()))
    show_faults(result["faults"])


def command(
    shards: Annotated[str, typer.Argument(help="folder or URL of tars, a glob, or a brace pattern")],
    *,
    manifest: ManifestFolder = "",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="walk unchanged shards again")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read and decode every member, too")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="write clean copies of broken tars to repaired/ beside them; implies --verify")
    ] = False,
    jobs: Annotated[int, typer.Option(help="walks at a time; 0 = one per core")] = 0,
    json: AsJson = False,
) -> None:
    """Build or check the manifest of SHARDS; status 1 if faults were found, each of which is printed.

    Example: diptych index shards/ --json
    """
    with contextlib.ExitStack() as stack:
        advance, walked = None, 0

        def on_progress(done: int, total: int) -> None:
            nonlocal advance, walked
            advance = advance or stack.enter_context(progress("walking shards", total))
            advance(done - walked)
            walked = done

        result = run(shards, manifest, jobs, rebuild, on_progress)
        if verify or repair:
            advance, walked = None, 0
            found = deep(shards, manifest, jobs, repair, on_progress)
            result |= found | {"faults": result["faults"] + found["faults"]}
    report(result)
    if "verified" in result:
        note(f"read and decoded all members of {result['verified']:,} samples")
    for copy in result.get("repaired", []):
        note(f"clean copy with {copy['samples']:,} samples, {copy['lost']:,} left out: {copy['url']}")
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["index", *sys.argv[1:]])
