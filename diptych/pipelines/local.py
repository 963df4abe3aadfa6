"""A whole run in this process with one worker, without Ray Train: for tests, and for benchmarks that measure something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.config import RunConfig
from diptych.pipelines.prepare import prepare
from diptych.pipelines.runs_folder import write_driver
from diptych.pipelines.trial import Trial

if TYPE_CHECKING:
    from diptych.pipelines.session import StreamFactory


def train_here(config: RunConfig, run_dir: Path, trial: Trial | None = None, make_stream: StreamFactory | None = None) -> dict[str, Any]:
    """Prepare and train `config` with one worker, leaving the run folder that `diptych train` would; returns `result.json`.

    `trial` says where a sweep would stop it; without `make_stream` threads of this process read, and no Ray is needed.
    """
    import torch

    from diptych.pipelines.session import own_reading, payload_of, run_session

    run_dir.mkdir(parents=True, exist_ok=True)
    prepared = prepare(config, run_dir)
    (run_dir / "config.json").write_text(prepared.config.to_json(public=True))
    stream = make_stream or own_reading(prepared.config)
    result = run_session(payload_of(prepared, run_dir, trial), prepared.config, torch.device("cpu"), stream)
    write_driver(run_dir, {"driver": "", "status": result["status"], "digest": prepared.facts["digest"], "run_id": "", "uri": ""})
    return json.loads((run_dir / "result.json").read_text())
