"""`diptych dedup SHARDS OUT --embeddings EMB`: near-duplicates by embedding → a keep-list."""

from __future__ import annotations

import json as json_module
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from diptych.pipelines.console import finish, note, progress, show_faults, would
from diptych.pipelines.options import AsJson, DryRun, ManifestFolder


def run(
    shards: str, out: str, embeddings: str, settings: dict[str, Any] | None = None, *, manifest: str = "", dry_run: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Write `out`/keep.parquet with one sample of each near-duplicate group, `out`/groups.parquet and `out`/pairs.html.

    `settings` are the fields of `datasets.dedup_report.Settings`. Keys: `samples_in, samples_out, faults, seconds`, and `keep, pairs,
    groups, dropped, threshold, method, cells, usable`, and `recall` where not all pairs were compared. Samples without a usable embedding
    are kept, and are faults. With `dry_run` nothing is written, and what would be is returned.
    Raises `ConfigError` for embeddings that do not fit, or a wrong setting.
    """
    import numpy as np

    from diptych.config import ConfigError
    from diptych.datasets import embeddings as joins
    from diptych.datasets import folders, storage
    from diptych.datasets.dedup_report import Settings, find_duplicates, write_results
    from diptych.datasets.manifest import open_manifest

    started = time.monotonic()
    try:
        chosen = Settings(**(settings or {}))
    except TypeError as error:
        raise ConfigError("settings", settings, "fields of Settings", str(error)) from None
    chosen.check()
    if not embeddings:
        raise ConfigError("--embeddings", embeddings, "a folder of embeddings", "`diptych embed SHARDS EMB` computes them.")
    data = open_manifest(shards, manifest)
    join = joins.join(data, embeddings, ("image", "text") if chosen.on == "both" else (chosen.on,))
    if dry_run:
        return {
            "shards": shards,
            "embeddings": embeddings,
            "samples_in": data.samples,
            "joined": join.matched,
            "settings": asdict(chosen),
            "writes": [storage.join(out, name) for name in ("keep.parquet", "groups.parquet", "pairs.html", "dedup.json")],
            "first caption": data.rows(np.array([0]), ["caption"])["caption"][0].as_py(),
        }
    folders.make_folder(out)
    with folders.scratch(out, "dedup") as scratch, progress("comparing", None) as advance:
        kept_for, pairs, facts = find_duplicates(data, join, chosen, scratch, advance)
    title = f"Near-duplicates by {chosen.on} embedding, cosine ≥ {chosen.threshold:g}"
    write_results(out, data, kept_for, pairs, title)
    dropped = int((kept_for != np.arange(data.samples)).sum())
    result = {
        "samples_in": data.samples,
        "samples_out": data.samples - dropped,
        "faults": [{name: value for name, value in asdict(fault).items() if name != "slot"} for fault in join.faults],
        "seconds": time.monotonic() - started,
        "keep": storage.join(out, "keep.parquet"),
        "pairs": len(pairs.a),
        "groups": len(np.unique(kept_for[kept_for != np.arange(data.samples)])),
        "dropped": dropped,
        "threshold": chosen.threshold,
        **facts,
    }
    storage.write_bytes(storage.join(out, "dedup.json"), json_module.dumps(result | {"settings": asdict(chosen)}, indent=2).encode())
    return result


def command(
    shards: Annotated[str, typer.Argument(help="folder or URL of tars")],
    out: Annotated[str, typer.Argument(help="folder for keep.parquet, groups.parquet and pairs.html")],
    *,
    embeddings: Annotated[str, typer.Option(help="folder of embeddings, in either layout")] = "",
    on: Annotated[str, typer.Option(help="image, text, or both (near in each)")] = "image",
    threshold: Annotated[float, typer.Option(help="least cosine of near-duplicates")] = 0.95,
    clusters: Annotated[int, typer.Option(help="SemDeDup with this many clusters; 0 = look everywhere")] = 0,
    probes: Annotated[int, typer.Option(help="cells that each vector joins in large sets: more finds more")] = 6,
    exact: Annotated[bool, typer.Option("--exact", help="compare all pairs, however many")] = False,
    seed: Annotated[int, typer.Option(help="of the k-means")] = 0,
    manifest: ManifestFolder = "",
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Write a keep-list with one sample of each group of near-duplicates: the largest picture, of equal ones the first.

    Example: diptych dedup shards/ unique/ --embeddings embeddings/ --threshold 0.95
    """
    settings = {"on": on, "threshold": threshold, "clusters": clusters, "probes": probes, "exact": exact, "seed": seed}
    if dry_run:
        would("look for near-duplicates", lambda: run(shards, out, embeddings, settings, manifest=manifest, dry_run=True), json)
    result = run(shards, out, embeddings, settings, manifest=manifest)
    show_faults(result["faults"])
    if "recall" in result:
        note(f"recall {result['recall']['recall']:.4f}, measured on {result['recall']['pairs']} pairs of 512 samples")
    note(
        f"kept {result['samples_out']:,} of {result['samples_in']:,} samples ({result['groups']:,} groups of near-duplicates), "
        f"{result['seconds']:.1f} s. Look at {out}/pairs.html; train with data.keep={result['keep']}"
    )
    finish(result, json, failed=bool(result["faults"]))


if __name__ == "__main__":
    from diptych.cli import main

    main(["dedup", *sys.argv[1:]])
