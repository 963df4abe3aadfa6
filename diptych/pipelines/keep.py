"""`diptych keep OUT HOW LIST …`: combines keep-lists by and, or, minus."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any, Literal, cast

import typer

from diptych.pipelines.console import finish, note
from diptych.pipelines.options import AsJson, ManifestFolder


def run(how: str, lists: list[str], out: str, *, shards: str, manifest: str = "") -> dict[str, Any]:
    """Write the keep-list `out` of the samples in all `lists` (`and`), in any (`or`), or in the first and no other (`minus`).

    Keys: `samples_in` (of the first list), `samples_out, faults, seconds, keep`. `samples_in` counts the data's samples that the
    first list keeps. Raises `ConfigError` for lists of other data, or an unknown `how`.
    """
    from diptych.datasets.keep import combine, read_keep, write_keep
    from diptych.datasets.manifest import open_manifest

    started = time.monotonic()
    data = open_manifest(shards, manifest)
    rows = combine(lists, cast(Literal["and", "or", "minus"], how), data)
    write_keep(out, data, rows)
    first = len(read_keep(lists[0], data))
    return {"samples_in": first, "samples_out": len(rows), "faults": [], "seconds": time.monotonic() - started, "keep": out}


def command(
    how: Annotated[str, typer.Argument(help="and (in all lists), or (in any), minus (in the first and no other)")],
    lists: Annotated[list[str], typer.Argument(help="keep-lists")],
    *,
    shards: Annotated[str, typer.Option(help="the shards that the lists are of")],
    out: Annotated[str, typer.Option(help="keep-list to write (.parquet)")],
    manifest: ManifestFolder = "",
    json: AsJson = False,
) -> None:
    """Combine keep-lists of the same data into one.

    Example: diptych keep minus large.parquet duplicates.parquet --shards shards/ --out keep.parquet
    """
    result = run(how, lists, out, shards=shards, manifest=manifest)
    note(f"kept {result['samples_out']:,} samples: {out}. Train on them with data.keep={out}")
    finish(result, json)


if __name__ == "__main__":
    from diptych.cli import main

    main(["keep", *sys.argv[1:]])
