"""`diptych pack`: images with captions, or prompts alone, → webdataset shards in img2dataset's layout.

The driver streams the source and hands out one part per shard; processes pack them. A shard that is there is passed over,
so a call that was killed and is repeated packs only what is missing. Needs neither Ray nor torch.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diptych.config import ConfigError
from diptych.pipelines.console import finish, note, progress, show_faults, would
from diptych.pipelines.options import AsJson, DryRun

if TYPE_CHECKING:
    from diptych.datasets.pack import Columns, PackOptions, Part, PartResult


def run(source: str, out: str, options: dict[str, Any] | None = None, split: str = "", jobs: int = 0) -> dict[str, Any]:
    """Pack `source` into shards in `out`; returns `samples_in, samples_out, faults, seconds, shards, shards_skipped`.

    `options` are the fields of `datasets.pack.PackOptions`; `jobs` of 0 takes a process per core. Raises `ConfigError` for
    a source that is none, columns that are missing, or an `out` that an other call has filled.
    """
    from diptych.config import build
    from diptych.datasets.pack import Columns, PackOptions, parts
    from diptych.datasets.pack_sources import open_source

    started = time.monotonic()
    chosen = build(PackOptions, options or {})
    table = open_source(source, split, chosen.image_column)
    columns = Columns.of(table, chosen)
    _claim(out, source, split, chosen, record=True)
    results: list[PartResult] = []
    total = getattr(table, "length", None)
    with progress(f"packing {os.path.basename(source.rstrip('/'))}", total) as advance:
        for result in _packed(parts(table, columns, chosen), columns, chosen, out, jobs or os.cpu_count() or 1):
            results.append(result)
            advance(result.samples_in)
    if not results:
        raise ConfigError("SOURCE", source, "a source with at least one row", "It is empty.")
    _check_extra(out, len(results))
    skipped = sum(result.skipped for result in results)
    if skipped:
        note(f"{skipped} of {len(results)} shards were there already; packed the other {len(results) - skipped}")
    faults = [asdict(fault) for result in sorted(results, key=lambda result: result.number) for fault in result.faults]
    return {
        "samples_in": sum(result.samples_in for result in results),
        "samples_out": sum(result.samples_out for result in results),
        "faults": faults,
        "seconds": time.monotonic() - started,
        "shards": len(results),
        "shards_skipped": skipped,
    }


def plan(source: str, out: str, options: dict[str, Any] | None = None, split: str = "") -> dict[str, Any]:
    """What `run` would do with these arguments: the columns that it takes, and the first sample; nothing is written."""
    from diptych.config import build
    from diptych.datasets.pack import Columns, PackOptions, parts
    from diptych.datasets.pack_sources import open_source

    chosen = build(PackOptions, options or {})
    table = open_source(source, split, chosen.image_column)
    columns = Columns.of(table, chosen)
    _claim(out, source, split, chosen, record=False)
    first = next((record for part in parts(table, columns, chosen) for record in part.records(columns, chosen)), None)
    if first is None:
        raise ConfigError("SOURCE", source, "a source with at least one row", "It is empty.")
    return {
        "source": source,
        "out": out,
        "rows": getattr(table, "length", "read as they come"),
        "columns": ", ".join(table.columns),
        "image column": columns.image or "none: prompts alone",
        "caption column": columns.caption or chosen.template or "none",
        "first sample": first.row.name,
        "first caption": first.caption or (f"{first.fault[0]}: {first.fault[1]}" if first.fault else "none"),
    }


def _packed(found: Iterator[Part], columns: Columns, options: PackOptions, out: str, jobs: int) -> Iterator[PartResult]:
    """Pack the parts in `jobs` processes with few parts in flight, so that memory does not grow with the source."""
    from diptych.datasets.pack import finished_part, pack_part

    head = list(itertools.islice(found, 2))
    found = itertools.chain(head, found)
    if jobs == 1 or len(head) < 2:
        yield from (pack_part(part, columns, options, out) for part in found)
        return
    # Forked processes would inherit the locks of the progress bar's thread.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        waiting: set[concurrent.futures.Future[PartResult]] = set()
        for part in found:
            done_before = finished_part(part, out)
            if done_before is not None:
                yield done_before
                continue
            waiting.add(pool.submit(pack_part, part, columns, options, out))
            if len(waiting) > 2 * jobs:
                finished, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        for future in concurrent.futures.as_completed(waiting):
            yield future.result()


def _claim(out: str, source: str, split: str, options: PackOptions, record: bool) -> None:
    """Check, and if `record` note, what `out` is made from; raises `ConfigError` if it was made from something else."""
    from diptych.datasets import storage

    recorded = storage.join(out, "pack.json")
    # A source is told by where it lies; how it was spelled does not matter.
    mine: dict[str, Any] = {
        "source": storage.absolute(source) if storage.exists(source) else source,
        "split": split,
        "options": options.model_dump(),
    }
    if storage.exists(recorded):
        former = json.loads(storage.read_bytes(recorded))
        before, now = ({key: call[key] for key in ("source", "split")} | call["options"] for call in (former, mine))
        for key, value in now.items():
            if before.get(key) != value:
                raise ConfigError(
                    "OUT",
                    out,
                    "an empty folder, or one that the same call began",
                    f"It was packed with {key}={before.get(key)!r}, not {value!r}.",
                )
    elif storage.exists(out) and storage.is_local(out) and any(name.endswith(".tar") for name in os.listdir(storage.local_path(out))):
        raise ConfigError("OUT", out, "an empty folder, or one that the same call began", "It holds shards that `pack` did not write.")
    elif record:
        storage.write_bytes(recorded, json.dumps(mine, indent=2).encode())


def _check_extra(out: str, count: int) -> None:
    from diptych.datasets.shards import ShardWriter, shard_name

    if ShardWriter(out).is_finished(count):
        remedy = f"The source has shrunk: it gives {count} shards, but {shard_name(count)}.tar is there. Pack into a new folder."
        raise ConfigError("OUT", out, "shards of this source alone", remedy)


def push(out: str, repository: str, layout: str, private: bool = True) -> str:
    """Upload the packed shards `out` with a card to the data set `repository` of the Hugging Face hub; returns its URL.

    `layout` is `webdataset` (the tars) or `imagefolder`. Raises `ConfigError` for a wrong name or layout, `ValueError` where the hub refuses.
    """
    import tempfile
    from pathlib import Path
    from typing import cast

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    from diptych.datasets import hub
    from diptych.datasets.manifest import open_manifest

    api = HfApi()
    with tempfile.TemporaryDirectory(prefix=".hub-", dir=out if os.path.isdir(out) else None) as folder:
        hub.stage(open_manifest(out), Path(folder), cast(hub.Layout, layout), repository)
        try:
            url = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=folder, commit_message="Data packed with Diptych")
        except HFValidationError as error:
            raise ConfigError("--push-to-hub", repository, "org/name", str(error)) from None
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"push to {repository} failed: {reason}. The shards stand in {out}; log in with `hf auth login`, then repeat"
            ) from None
    return str(url)


def command(
    source: Annotated[str, typer.Argument(help="image folder, csv, tsv, jsonl, json, parquet, txt, or a Hugging Face data set")],
    out: Annotated[str, typer.Argument(help="folder or URL for the shards")],
    *,
    samples_per_shard: Annotated[int, typer.Option(help="samples of one tar")] = 1000,
    image_column: Annotated[str, typer.Option(help="column with the picture; default: the first usual name")] = "",
    caption_column: Annotated[str, typer.Option(help="column with the caption; default: the first usual name")] = "",
    captions: Annotated[str, typer.Option(help="of several captions: first, each (a sample per caption) or all (joined)")] = "first",
    uncaptioned: Annotated[str, typer.Option(help="a picture without a caption: fault or keep")] = "fault",
    template: Annotated[str, typer.Option(help="caption made of columns, e.g. \"'{label}':{text}\"")] = "",
    clean_keywords: Annotated[bool, typer.Option(help="tidy prompts as lists of keywords")] = False,
    resize: Annotated[str, typer.Option(help="none, border, center_crop or longest; the aspect is kept")] = "none",
    size: Annotated[int, typer.Option(help="side after the resize, in pixels")] = 256,
    image_format: Annotated[str, typer.Option(help="jpg, png or webp, for pictures that change")] = "jpg",
    quality: Annotated[int, typer.Option(help="JPEG and WebP quality")] = 95,
    split: Annotated[str, typer.Option(help="split of a data set that has several")] = "",
    push_to_hub: Annotated[str, typer.Option(help="also upload to this data set of the Hugging Face hub (org/name)")] = "",
    hub_layout: Annotated[str, typer.Option(help="files on the hub: webdataset or imagefolder")] = "webdataset",
    private: Annotated[bool, typer.Option(help="make that data set private")] = True,
    jobs: Annotated[int, typer.Option(help="processes; 0 = one per core")] = 0,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Pack SOURCE into webdataset shards in OUT; repeated, it packs only what is missing.

    Example: diptych pack photos/ shards/ --resize longest --size 512
    """
    options = {
        "samples_per_shard": samples_per_shard, "image_column": image_column, "caption_column": caption_column, "captions": captions,
        "uncaptioned": uncaptioned, "template": template, "clean_keywords": clean_keywords, "resize": resize, "size": size,
        "image_format": image_format, "quality": quality,
    }  # fmt: skip
    if dry_run:
        would("pack", lambda: plan(source, out, options, split), json)
    result = run(source, out, options, split, jobs)
    show_faults(result["faults"])
    note(f"{result['samples_out']:,} of {result['samples_in']:,} samples in {result['shards']} shards, {result['seconds']:.1f} s: {out}")
    if push_to_hub:
        result["pushed"] = push(out, push_to_hub, hub_layout, private=private)
        note(f"pushed to {result['pushed']}")
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["pack", *sys.argv[1:]])
