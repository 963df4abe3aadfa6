"""`diptych inspect SHARDS`: counts, sizes, captions, histograms and a contact sheet as one self-contained HTML page."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from diptych.pipelines.console import finish, note, show_faults, show_table
from diptych.pipelines.options import AsJson, ManifestFolder


def run(shards: str, out: str = "inspect.html", *, pictures: int = 48, seed: int = 0, manifest: str = "") -> dict[str, Any]:
    """Write the page `out` about `shards`.

    Keys: `samples_in, samples_out, faults, seconds, page`, and `facts`, `words`, `repeated_captions`, `extensions`, `histograms`.
    """
    from diptych.datasets import storage
    from diptych.datasets.inspect import html, look
    from diptych.datasets.manifest import open_manifest

    started = time.monotonic()
    data = open_manifest(shards, manifest)
    found = look(data, seed)
    storage.write_bytes(out, html(data, found, f"{shards}: {data.samples:,} samples", pictures, seed))
    return {
        "samples_in": data.samples,
        "samples_out": data.samples,
        "faults": [{name: value for name, value in asdict(fault).items() if name != "slot"} for fault in found.faults],
        "seconds": time.monotonic() - started,
        "page": out,
        "facts": found.facts,
        "words": found.words,
        "repeated_captions": found.repeated_captions,
        "extensions": found.extensions,
        "histograms": found.histograms,
    }


def command(
    shards: Annotated[str, typer.Argument(help="folder or URL of tars")],
    out: Annotated[str, typer.Option(help="page to write")] = "inspect.html",
    *,
    pictures: Annotated[int, typer.Option(help="samples on the contact sheet")] = 48,
    seed: Annotated[int, typer.Option(help="which samples are drawn")] = 0,
    manifest: ManifestFolder = "",
    json: AsJson = False,
) -> None:
    """Write a page that shows SHARDS: counts, sizes, captions, histograms and a contact sheet; no request to anywhere.

    Example: diptych inspect shards/ --out look.html
    """
    result = run(shards, out, pictures=pictures, seed=seed, manifest=manifest)
    show_table(shards, ["", ""], [[name.replace("_", " "), value] for name, value in result["facts"].items()])
    show_faults(result["faults"])
    note(f"look at {out}")
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["inspect", *sys.argv[1:]])
