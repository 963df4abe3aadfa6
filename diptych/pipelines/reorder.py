"""`diptych reorder EMB SHARDS OUT`: embeddings from clip-retrieval's layout to DALLE2-pytorch's."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.pipelines.console import finish, note, progress, show_faults, would
from diptych.pipelines.options import AsJson, DryRun, ManifestFolder


def run(embeddings: str, shards: str, out: str, *, manifest: str = "", overwrite: bool = False, jobs: int = 0) -> dict[str, Any]:
    """Write `out`/img_emb and `out`/text_emb with a file per shard of `shards`, row = index digits of the key.

    Keys: `samples_in, samples_out, faults, seconds`, and `faults_total, rows, gaps, index_width, shards, shards_reused, modalities`.
    Raises `ConfigError` for an `out` that holds another result, `ValueError` for embeddings that have no place.
    """
    import os

    from diptych.datasets.manifest import open_manifest
    from diptych.datasets.reorder_report import Samples, reorder_embeddings

    started = time.monotonic()
    samples = Samples.of(open_manifest(shards, manifest))
    rows = samples.shards()
    number = {Path(name).stem: position for position, name in enumerate(samples.manifest.shard_names)}
    with progress("reordering", samples.manifest.samples) as advance:
        report = reorder_embeddings(
            embeddings,
            out,
            rows,
            samples.width,
            lambda name: samples.indices(number[name]),
            overwrite=overwrite,
            jobs=jobs or os.cpu_count() or 1,
            advance=advance,
        )
    return {
        "samples_in": report.samples_in,
        "samples_out": report.samples_out,
        "faults": [{name: value for name, value in asdict(fault).items() if name != "slot"} for fault in report.faults],
        "seconds": time.monotonic() - started,
        "faults_total": report.faults_total,
        "rows": report.rows,
        "gaps": report.gaps,
        "index_width": report.index_width,
        "shards": report.shards,
        "shards_reused": report.reused,
        "modalities": report.modalities,
    }


def plan(embeddings: str, shards: str, out: str, *, manifest: str = "", overwrite: bool = False, jobs: int = 0) -> dict[str, Any]:
    """What `run` would do with these arguments; nothing is written, and no key is looked at. Raises as `run` does for what it looks at."""
    import os

    from diptych.datasets.manifest import open_manifest
    from diptych.datasets.reorder import open_source
    from diptych.datasets.reorder_report import Samples, stands_in

    samples = Samples.of(open_manifest(shards, manifest))
    rows, source = samples.shards(), open_source(embeddings)
    return {
        "embeddings": embeddings,
        "samples_in": source.rows,
        "modalities": {kind: f"{dtype} [{dim}]" for kind, (dim, dtype) in source.shapes.items()},
        "shards": len(rows),
        "rows": sum(shard.rows for shard in rows),
        "index_width": samples.width,
        "writes": [f"{out}/{kind}" for kind in source.shapes],
        "stands_in_out": stands_in(out, source, rows, overwrite),
        "jobs": jobs or os.cpu_count() or 1,
        "first shard": f"{rows[0].name}: {rows[0].rows} rows",
    }


def command(
    embeddings: Annotated[str, typer.Argument(metavar="EMB", help="folder in clip-retrieval's layout")],
    shards: Annotated[str, typer.Argument(help="the shards that were embedded, all of them")],
    out: Annotated[str, typer.Argument(help="folder for img_emb/ and text_emb/")],
    *,
    manifest: ManifestFolder = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace another result in OUT")] = False,
    jobs: Annotated[int, typer.Option(help="shards written at a time; 0 = one per core")] = 0,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Write embeddings in DALLE2-pytorch's layout: a file per shard, gaps as rows of zeros, each listed in gaps.parquet.

    Example: diptych reorder embeddings/ shards/ reordered/
    """
    if dry_run:
        would("reorder", lambda: plan(embeddings, shards, out, manifest=manifest, overwrite=overwrite, jobs=jobs), json)
    result = run(embeddings, shards, out, manifest=manifest, overwrite=overwrite, jobs=jobs)
    show_faults(result["faults"])
    if result["shards_reused"]:
        note(f"{result['shards_reused']} of {result['shards']} shards were there already")
    note(
        f"{result['samples_out']:,} of {result['samples_in']:,} embeddings in {result['shards']} shards, {result['gaps']:,} gaps, "
        f"{result['seconds']:.1f} s. DALLE2-pytorch: img_embeddings_url={out}/img_emb, index_width={result['index_width']}"
    )
    finish(result, json, failed=bool(result["faults_total"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["reorder", *sys.argv[1:]])
