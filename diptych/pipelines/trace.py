"""`trace.parquet`: which sample stood where, over the history that counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.datasets.manifest import Manifest


def write_trace(run_dir: Path, manifest: Manifest) -> Path:
    """Merge the workers' trace parts, with shard and key from the manifest, into `run_dir/trace.parquet`.

    Columns: step, rank, slot, shard, key, row, attempt; one row per sample, padding left out, steps that were redone after
    a crash once, as redone.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from diptych.pipelines.runs_folder import records
    from diptych.trainers.journal import read_trace

    trace = read_trace(records(run_dir))
    names = np.asarray(manifest.shard_names, dtype=object)
    # A run visits a sample once per epoch; look each up once.
    unique, inverse = np.unique(trace["row"].to_numpy(), return_inverse=True)
    samples = (
        manifest.rows(unique, ["shard", "key"])
        if len(unique)
        else pa.table({"shard": pa.array([], pa.int32()), "key": pa.array([], pa.string())})
    )
    shards = pa.array(names[samples["shard"].to_numpy()][inverse], pa.string())
    columns = {"step": trace["step"], "rank": trace["rank"], "slot": trace["slot"], "shard": shards}
    columns |= {"key": samples["key"].take(pa.array(inverse)), "row": trace["row"], "attempt": trace["attempt"]}
    target = run_dir / "trace.parquet"
    pq.write_table(pa.table(columns), target)
    return target
