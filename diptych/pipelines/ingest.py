"""`diptych ingest URLS OUT`: URL lists → shards, by img2dataset as Ray tasks, one shard each.

img2dataset's own Ray distributor submits every shard at once and looks at no task's status. Here few are in flight, a
shard that fails is tried again, and a call that was killed and is repeated makes only what is missing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diptych.config import ConfigError
from diptych.pipelines.console import finish, note, progress, show_faults, show_table, would
from diptych.pipelines.options import AsJson, DryRun, RayAddress

if TYPE_CHECKING:
    from diptych.datasets.ingest import IngestOptions, ShardJob, ShardOutcome
    from diptych.datasets.ingest_list import UrlList


def run(
    urls: str,
    out: str,
    options: dict[str, Any] | None = None,
    *,
    retry_failed: bool = False,
    jobs: int = 0,
    shard_retries: int = 2,
    address: str = "",
) -> dict[str, Any]:
    """Download the list `urls` into shards in `out`; `options` are the fields of `datasets.ingest.IngestOptions`.

    `retry_failed` downloads again what failed in shards that are there. Keys: `samples_in` (URLs), `samples_out, faults, seconds`, and
    `failed_to_download, failed_to_resize, recovered, shards, shards_skipped, status`. Faults are shards that could not be made:
    URLs that failed stand in each shard's Parquet. Raises `ConfigError` for a wrong list, or an `out` of another call.
    """
    from diptych.config import build
    from diptych.datasets.ingest import IngestOptions, finished_shards, read_outcome, recover
    from diptych.datasets.ingest_list import UrlList
    from diptych.pipelines.ray_context import ray_session

    _check_installed()
    # img2dataset's albumentations would otherwise ask its index for a newer version at every import, in every worker.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    started = time.monotonic()
    out = _absolute(out)
    chosen = build(IngestOptions, options or {})
    with tempfile.TemporaryDirectory(prefix="diptych-ingest-") as scratch:
        found = UrlList.open(urls, chosen, scratch)
        _claim(out, found, chosen)
        recover(out)
        before = set(finished_shards(out))
        parallel = jobs or os.cpu_count() or 1
        faults: list[dict[str, Any]] = []
        recovered = 0
        with ray_session(parallel, address) as ray, progress("downloading shards", None) as advance:
            submit = ray.remote(num_cpus=1, max_retries=3)(_shard).remote
            for _ in _in_flight(ray, submit, found.jobs(out, chosen, before), parallel, shard_retries, faults):
                advance(1)
            if retry_failed:
                lacking = {shard for shard in finished_shards(out) if read_outcome(out, shard).failed_to_download}
                skip = set(finished_shards(out)) - lacking | {int(fault["shard"].partition(".")[0]) for fault in faults}
                for outcome in _in_flight(ray, submit, found.jobs(out, chosen, skip, retry=True), parallel, shard_retries, faults):
                    recovered += outcome.recovered
                    advance(1)
    recover(out)
    return _summary(out, before, faults, recovered) | {"seconds": time.monotonic() - started}


def plan(urls: str, out: str, options: dict[str, Any] | None = None, jobs: int = 0) -> dict[str, Any]:
    """What `run` would do with these arguments: the list as it is understood, and what is there already; nothing is written."""
    from diptych.config import build
    from diptych.datasets.ingest import IngestOptions, finished_shards
    from diptych.datasets.ingest_list import UrlList

    _check_installed()
    chosen = build(IngestOptions, options or {})
    with tempfile.TemporaryDirectory(prefix="diptych-ingest-") as scratch:
        found = UrlList.open(urls, chosen, scratch)
    return {
        "list": found.location,
        "format": f"{found.format}, {len(found.files)} files",
        "url column": found.url_column,
        "caption column": found.caption_column or "none",
        "out": _absolute(out),
        "shards there": len(set(finished_shards(_absolute(out)))),
        "shards at a time": jobs or os.cpu_count() or 1,
    } | chosen.model_dump(mode="json")


def _shard(job: ShardJob) -> ShardOutcome:
    """The Ray task."""
    from diptych.datasets.ingest import run_shard

    return run_shard(job)


def _in_flight(
    ray: Any, submit: Callable[[ShardJob], Any], jobs: Iterable[ShardJob], parallel: int, retries: int, faults: list[dict[str, Any]]
) -> Iterator[ShardOutcome]:
    """Run the jobs with at most `parallel` + 1 under way; a failed one is tried `retries` times more, then becomes a fault."""
    waiting: dict[Any, tuple[ShardJob, int]] = {}
    source = iter(jobs)
    while True:
        while len(waiting) <= parallel and (job := next(source, None)) is not None:
            waiting[submit(job)] = (job, 0)
        if not waiting:
            return
        done, _ = ray.wait(list(waiting), num_returns=1)
        job, tried = waiting.pop(done[0])
        try:
            yield ray.get(done[0])
        except ray.exceptions.RayError as error:
            if tried < retries:
                waiting[submit(job)] = (job, tried + 1)
                continue
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            faults.append(
                {"shard": f"{job.shard:05d}.tar", "key": "", "kind": "failed_shard", "detail": f"{reason} (tried {tried + 1} times)"}
            )


def _summary(out: str, before: set[int], faults: list[dict[str, Any]], recovered: int) -> dict[str, Any]:
    from diptych.datasets.ingest import finished_shards, read_outcome

    outcomes = [read_outcome(out, shard) for shard in sorted(finished_shards(out))]
    status: Counter[str] = Counter()
    for outcome in outcomes:
        status.update(outcome.status)
    return {
        "samples_in": sum(outcome.count for outcome in outcomes),
        "samples_out": sum(outcome.successes for outcome in outcomes),
        "faults": faults,
        "failed_to_download": sum(outcome.failed_to_download for outcome in outcomes),
        "failed_to_resize": sum(outcome.failed_to_resize for outcome in outcomes),
        "recovered": recovered,
        "shards": len(outcomes),
        "shards_skipped": len(before),
        "status": dict(status.most_common(20)),
    }


def _absolute(out: str) -> str:
    from diptych.datasets import storage

    return storage.absolute(out)


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("img2dataset") is None:
        raise ConfigError(
            "ingest", "img2dataset is not installed", "an environment with the extra `ingest`", "pip install 'diptych[ingest]'"
        )


def _claim(out: str, found: UrlList, options: IngestOptions) -> None:
    """Record what `out` is made from; raises `ConfigError` if it was made from something else."""
    from diptych.datasets import folders, storage

    record = storage.join(out, "ingest.json")
    mine = json.loads(json.dumps(found.fingerprint(options)))
    if storage.exists(record):
        former = json.loads(storage.read_bytes(record))
        for key, value in mine.items():
            if former.get(key) != value:
                was = "another list" if key == "list" else f"{key}={former.get(key)!r}, not {value!r}"
                raise ConfigError("OUT", out, "an empty folder, or one that the same call began", f"It was made with {was}.")
    elif folders.list_files(out, ".tar"):
        raise ConfigError("OUT", out, "an empty folder, or one that the same call began", "It holds shards that `ingest` did not write.")
    else:
        folders.make_folder(out)
        storage.write_bytes(record, json.dumps(mine, indent=2).encode())


def list_from_pages(pages: str, out: str, delay_seconds: float = 1.0) -> tuple[str, list[dict[str, Any]]]:
    """Read the web pages named in the text file `pages` (or the one page) and write `out`/pages/images.jsonl.

    Returns its path and a fault for every page that is forbidden or unreadable. Written once: a repeated call uses it again.
    """
    from diptych.batches import Fault
    from diptych.datasets import storage
    from diptych.datasets.pages import read_pages

    target = storage.join(_absolute(out), "pages", "images.jsonl")
    record = storage.join(_absolute(out), "pages", "faults.json")
    if storage.exists(target) and storage.exists(record):
        return target, json.loads(storage.read_bytes(record))
    single = pages.startswith(("http://", "https://")) and not pages.endswith(".txt")
    wanted = [pages] if single else storage.read_bytes(pages).decode().split()
    faults, lines = [], []
    with progress("reading pages", len(wanted)) as advance:
        for found in read_pages(wanted, delay_seconds, advance=advance):
            if isinstance(found, Fault):
                faults.append({name: value for name, value in asdict(found).items() if name != "slot"})
            else:
                lines.append(json.dumps(asdict(found), ensure_ascii=False))
    if not lines:
        raise ConfigError("--pages", pages, "pages with at least one image", "; ".join(fault["detail"] for fault in faults[:3]))
    storage.write_bytes(record, json.dumps(faults).encode())
    storage.write_bytes(target, ("\n".join(lines) + "\n").encode())
    return target, faults


def show_sets() -> list[dict[str, Any]]:
    """Print the named sets and return them."""
    from diptych.datasets.ingest_sets import SETS

    for name, known in SETS.items():
        show_table(
            f"{name}: {known.samples} pairs",
            ["", ""],
            [
                ["list", known.source],
                ["prepare", known.prepare],
                ["run", known.command(name)],
                ["expect", known.expect],
                ["note", known.note],
            ],
        )
    return [{"name": name, "command": known.command(name)} | asdict(known) for name, known in SETS.items()]


def command(
    urls: Annotated[
        str, typer.Argument(help="list of URLs: csv, tsv, json, jsonl, parquet or txt, a file or folder, local or remote")
    ] = "",
    out: Annotated[str, typer.Argument(help="folder or URL for the shards")] = "",
    *,
    url_column: Annotated[str, typer.Option(help="column with the URL; default: the first usual name")] = "",
    caption_column: Annotated[str, typer.Option(help="column with the caption; default: the first usual name; none = no captions")] = "",
    save_columns: Annotated[str, typer.Option(help="further columns for the samples' JSON, by commas")] = "",
    samples_per_shard: Annotated[int, typer.Option(help="URLs per tar")] = 10_000,
    size: Annotated[int, typer.Option(help="side of the stored image, in pixels")] = 256,
    resize: Annotated[str, typer.Option(help="border, no, keep_ratio, keep_ratio_largest or center_crop")] = "border",
    only_if_bigger: Annotated[bool, typer.Option("--only-if-bigger", help="leave smaller images at their size")] = False,
    image_format: Annotated[str, typer.Option(help="jpg, png or webp")] = "jpg",
    quality: Annotated[int, typer.Option(help="JPEG and WebP quality; PNG compression 0–9")] = 95,
    skip_reencode: Annotated[bool, typer.Option("--skip-reencode", help="store downloaded bytes where no resize is needed")] = False,
    min_image_size: Annotated[int, typer.Option(help="refuse smaller images, in pixels of the shorter side")] = 0,
    max_aspect_ratio: Annotated[float, typer.Option(help="refuse longer images")] = float("inf"),
    max_image_area: Annotated[float, typer.Option(help="refuse larger images, in pixels")] = float("inf"),
    compute_hash: Annotated[str, typer.Option(help="hash of the downloaded bytes: none, md5, sha256 or sha512")] = "sha256",
    verify_hash_column: Annotated[str, typer.Option(help="column with the hash that the bytes must have")] = "",
    allow_disallowed: Annotated[bool, typer.Option("--allow-disallowed", help="take images whose headers forbid it, too")] = False,
    user_agent_token: Annotated[str, typer.Option(help="name that is sent to servers and that directives may address")] = "",
    timeout_seconds: Annotated[int, typer.Option(help="of one download")] = 10,
    retries: Annotated[int, typer.Option(help="repetitions of one download, at once")] = 0,
    threads: Annotated[int, typer.Option(help="downloads at a time, per shard")] = 64,
    jobs: Annotated[int, typer.Option(help="shards at a time; 0 = one per core")] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="download again what failed, into the same shards")] = False,
    pages: Annotated[bool, typer.Option("--pages", help="URLS names web pages: their images are listed first")] = False,
    page_delay_seconds: Annotated[float, typer.Option(help="between two pages of one host")] = 1.0,
    dry_run: DryRun = False,
    list_sets: Annotated[bool, typer.Option("--list-sets", help="show named sets and stop")] = False,
    address: RayAddress = "",
    json: AsJson = False,
) -> None:
    """Download URLS into webdataset shards in OUT with img2dataset on Ray; repeated, it makes only what is missing.

    Example: diptych ingest urls.parquet shards/ --size 512 --resize keep_ratio --retry-failed
    """
    if list_sets:
        finish({"sets": show_sets()}, json)
    if not urls or not out:
        raise ConfigError(
            "URLS OUT", f"{urls} {out}".strip(), "a list of URLs and a folder", "`diptych ingest --list-sets` shows known sets."
        )
    options: dict[str, Any] = {
        "url_column": url_column, "caption_column": caption_column, "save_columns": tuple(filter(None, save_columns.split(","))),
        "samples_per_shard": samples_per_shard, "size": size, "resize": resize, "only_if_bigger": only_if_bigger,
        "image_format": image_format, "skip_reencode": skip_reencode, "min_image_size": min_image_size,
        "max_aspect_ratio": max_aspect_ratio, "max_image_area": max_image_area, "compute_hash": compute_hash,
        "verify_hash_column": verify_hash_column, "user_agent_token": user_agent_token, "timeout_seconds": timeout_seconds,
        "retries": retries, "threads": threads,
    }  # fmt: skip
    options |= {"quality": quality} if quality != 95 else {}
    options |= {"disallowed_header_directives": ()} if allow_disallowed else {}
    if dry_run:
        if pages:
            raise ConfigError("--dry-run", "with --pages", "a list of URLs", "Pages have to be read before their images are known.")
        would("ingest", lambda: plan(urls, out, options, jobs), json)
    page_faults: list[dict[str, Any]] = []
    if pages:
        urls, page_faults = list_from_pages(urls, out, page_delay_seconds)
    result = run(urls, out, options, retry_failed=retry_failed, jobs=jobs, address=address)
    result["faults"] = page_faults + result["faults"]
    show_faults(result["faults"])
    if result["shards_skipped"]:
        note(f"{result['shards_skipped']} of {result['shards']} shards were there already")
    failed = ", ".join(f"{count:,} × {reason}" for reason, count in result["status"].items() if reason != "success")
    note(f"{result['samples_out']:,} of {result['samples_in']:,} URLs in {result['shards']} shards, {result['seconds']:.1f} s: {out}")
    note(
        f"not taken: {failed}" + ("; --retry-failed tries downloads again" if result["failed_to_download"] else "")
        if failed
        else "all taken"
    )
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["ingest", *sys.argv[1:]])
