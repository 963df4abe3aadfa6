"""`diptych filter SHARDS --where SQL`: a keep-list of the samples for which a condition is true."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from diptych.pipelines.console import finish, note, show_faults, show_table, would
from diptych.pipelines.options import AsJson, DryRun, ManifestFolder


def run(shards: str, out: str, where: str, *, embeddings: str = "", manifest: str = "", dry_run: bool = False) -> dict[str, Any]:
    """Write the keep-list `out` of the samples of `shards` for which the SQL condition `where` is true.

    With `embeddings` (image and text), `similarity` is a column. Keys: `samples_in, samples_out, faults, seconds, keep`;
    faults are samples without an embedding. With `dry_run` nothing is written, and what would be is returned. Raises `ConfigError` for a
    wrong condition, naming the columns.
    """
    from diptych.datasets import embeddings as joins
    from diptych.datasets.filter import filter_rows, similarities
    from diptych.datasets.keep import write_keep
    from diptych.datasets.manifest import open_manifest

    started = time.monotonic()
    data = open_manifest(shards, manifest)
    join = joins.join(data, embeddings) if embeddings else None
    rows = filter_rows(data, where, similarities(join, data.samples) if join else None)
    if dry_run:
        first = data.rows(rows[:1], ["key", "caption"]).to_pylist()
        about = {"shards": shards, "embeddings": embeddings or "none", "where": where or "all", "writes": out, "samples_in": data.samples}
        return about | {"samples_out": len(rows), "first kept": first[0] if first else "none"}
    write_keep(out, data, rows)
    faults = [{name: value for name, value in asdict(fault).items() if name != "slot"} for fault in (join.faults if join else [])]
    return {"samples_in": data.samples, "samples_out": len(rows), "faults": faults, "seconds": time.monotonic() - started, "keep": out}


def command(
    shards: Annotated[str, typer.Argument(help="folder or URL of tars")],
    out: Annotated[str, typer.Argument(help="keep-list to write (.parquet); not needed with --columns")] = "",
    *,
    where: Annotated[str, typer.Option(help='SQL condition, e.g. "width >= 256 AND aspect < 2 AND word_count > 2"')] = "",
    embeddings: Annotated[str, typer.Option(help="folder of image and text embeddings, for the column similarity")] = "",
    columns: Annotated[bool, typer.Option("--columns", help="list the columns and stop")] = False,
    manifest: ManifestFolder = "",
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Write the keep-list OUT of the samples of SHARDS for which a condition is true; nothing is copied or rewritten.

    Example: diptych filter shards/ keep.parquet --where "least(width, height) >= 256 AND word_count > 2"
    """
    from diptych.config import ConfigError

    if columns:
        from diptych.datasets.filter import COLUMNS, meta_fields
        from diptych.datasets.manifest import open_manifest

        fields = meta_fields(open_manifest(shards, manifest))
        known = COLUMNS | {"similarity": "cosine of image and text embedding, with --embeddings"} | fields
        show_table("columns", ["column", "what"], [[name, what] for name, what in known.items()])
        finish({"columns": list(known)}, json)
    if not out:
        raise ConfigError("OUT", out, "a path for the keep-list", "Example: keep.parquet")
    if dry_run:
        would("filter", lambda: run(shards, out, where, embeddings=embeddings, manifest=manifest, dry_run=True), json)
    result = run(shards, out, where, embeddings=embeddings, manifest=manifest)
    show_faults(result["faults"])
    note(f"kept {result['samples_out']:,} of {result['samples_in']:,} samples: {out}. Train on them with data.keep={out}")
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["filter", *sys.argv[1:]])
