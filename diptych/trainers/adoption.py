"""Beginning a run, or a new generation of one, where another run's checkpoint stands.

The donor's checkpoint is copied into the run as the work of an attempt of its own, so that resumption, retention and fencing know
nothing of donors, and the donor may be pruned or removed afterwards. Weights, moments, averages and the slot are the donor's;
rates are functions of the step and of the new configuration, which therefore wins from the first step on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from diptych.config import ConfigError, RunConfig, get_path
from diptych.trainers.attempts import checkpoint_name, newest_attempt, parse_checkpoint_name, record_attempt
from diptych.trainers.checkpoint import COMMIT, TornCheckpoint, newest_whole, verify
from diptych.trainers.runfolder import RunFolder

_BOUND = ("seed", "train.global_batch_size", "data.shuffle", "data.shuffle_chunk", "data.shuffle_group")
"""What the donor's slot means nothing without."""


def find_checkpoint(source: str, key: str = "train.start_from") -> tuple[RunFolder, str]:
    """(run folder, checkpoint's name) of `RUN` or `RUN/checkpoints/NAME`, whole; `ConfigError` on `key` otherwise."""
    run, separator, name = source.rstrip("/").partition("/checkpoints/")
    folder = RunFolder(run)
    try:
        found: str | None = name
        if separator:
            verify(folder, name)
        else:
            found = newest_whole(folder)
    except TornCheckpoint as error:
        raise ConfigError(key, source, "a whole checkpoint", str(error)) from None
    if found is None or parse_checkpoint_name(found) is None:
        raise ConfigError(key, source, "a run folder with a whole checkpoint, or RUN/checkpoints/NAME", "`diptych runs` lists the runs.")
    return folder, found


def adopt(target: str, source: str, config: RunConfig, digest: str) -> str:
    """Make the run in `target` stand where the checkpoint `source` does; returns the name of the copy.

    The next attempt resumes from it. What `target` did before stays its history up to that step. Raises `ConfigError` where
    seed, global batch or data (`digest`) differ from the donor's: its slot would stand for other samples.
    """
    donor, name = find_checkpoint(source)
    state = json.loads(donor.read(f"checkpoints/{name}/state.json"))
    _check_bound(state, config, digest, source)
    folder = RunFolder(target)
    parsed = parse_checkpoint_name(name)
    assert parsed is not None
    own = newest_whole(folder)
    own_step = parse_checkpoint_name(own) if own else None
    while True:
        number = newest_attempt(folder) + 1
        # An own checkpoint beyond the donor's step is no ancestor of what follows.
        ancestor = own if own_step is not None and own_step[0] <= parsed[0] else None
        if record_attempt(folder, state["world_size"], ancestor, number, start_step=parsed[0]) is not None:
            break
    copy = checkpoint_name(parsed[0], number)
    # The donor's best checkpoint is not in this folder, unless it is the very one that is copied.
    saved = {"saved_name": copy} if state.get("saved_name") == name else {"saved_name": None, "saved_value": None}
    _copy(donor, name, folder, copy, number, state | saved | {"attempt": number, "donor": f"{donor.url}/checkpoints/{name}"})
    return copy


def _check_bound(state: dict[str, Any], config: RunConfig, digest: str, source: str) -> None:
    remedy = "A run that starts from another one goes on with its samples; only hyperparameters may differ."
    for key in _BOUND:
        before, now = state["config"], get_path(config, key)
        for part in key.split("."):
            before = before[part]
        if before != now:
            raise ConfigError(key, now, f"{before!r}, as in {source}", remedy)
    if digest and state["digest"] and state["digest"] != digest:
        raise ConfigError("data.shards", f"data of digest {digest[:12]}", f"that of {source}, digest {state['digest'][:12]}", remedy)


def _copy(donor: RunFolder, name: str, folder: RunFolder, copy: str, attempt: int, state: dict[str, Any]) -> None:
    record = json.loads(donor.read(f"checkpoints/{name}/{COMMIT}"))["files"]
    text = json.dumps(state, indent=1).encode()
    record["state.json"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    files: dict[str, Callable[[], bytes]] = {file: partial(donor.read, f"checkpoints/{name}/{file}") for file in record}
    files["state.json"] = lambda: text
    step = state["step"]
    files[COMMIT] = lambda: json.dumps({"step": step, "attempt": attempt, "files": record}, indent=1).encode()
    folder.write_folder(f"checkpoints/{copy}", files, COMMIT, lambda: None)
