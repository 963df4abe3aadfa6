"""Checkpoints that are whole or do not count, written behind the training.

`checkpoints/step_00000100-a0002/` holds `model.safetensors`, `optimizer.safetensors`, `ema.safetensors` (with averages),
`state.json`, and `commit.json` with size and SHA-256 of each. The folder is renamed into place when all of it is on
disk, and only a folder whose files agree with its commit record counts. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diptych.config import ConfigError
from diptych.trainers.attempts import (
    Attempt,
    candidates,
    check_fence,
    checkpoint_name,
    newest_attempt,
    parse_checkpoint_name,
    record_attempt,
)
from diptych.trainers.runfolder import RunFolder
from diptych.trainers.state import TrainState

log = logging.getLogger(__name__)

COMMIT = "commit.json"


class TornCheckpoint(ValueError):  # noqa: N818 - it names what was found
    """A checkpoint that is not what its commit record says."""


@dataclass
class Checkpoint:
    """A loaded checkpoint."""

    name: str
    tensors: TrainState
    state: dict[str, Any]
    """`state.json`: step, slot, samples, world_size, config, data digest, attempt, faults, early stop."""


def verify(folder: RunFolder, name: str, hashes: bool = True) -> None:
    """Raise `TornCheckpoint` unless every file has the size, and with `hashes` the SHA-256, of the commit record."""
    try:
        record = json.loads(folder.read(f"checkpoints/{name}/{COMMIT}"))["files"]
        for file, entry in record.items():
            size = folder.size(f"checkpoints/{name}/{file}")
            if size != entry["size"]:
                raise TornCheckpoint(f"{name}/{file} has {size} bytes, its commit record says {entry['size']}")
            if hashes and folder.sha256(f"checkpoints/{name}/{file}") != entry["sha256"]:
                raise TornCheckpoint(f"{name}/{file} is damaged: its SHA-256 differs from the commit record")
    except FileNotFoundError as error:
        raise TornCheckpoint(f"{name} has no whole commit: {error}") from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TornCheckpoint(f"{name}/{COMMIT} cannot be read: {error!r}") from None


def newest_whole(folder: RunFolder) -> str | None:
    """Name of the newest checkpoint of the history that counts and is whole; says which torn ones it passed over."""
    return _search_whole(folder)[0]


def _search_whole(folder: RunFolder) -> tuple[str | None, tuple[str, ...]]:
    """(the newest whole checkpoint, what was wrong with each newer one)."""
    torn: list[str] = []
    for name in candidates(folder):
        try:
            verify(folder, name)
        except TornCheckpoint as error:
            log.warning("Passing over a torn checkpoint in %s: %s", folder.url, error)
            torn.append(str(error))
            continue
        return name, tuple(torn)
    return None, tuple(torn)


def begin_attempt(folder: RunFolder | str, world_size: int) -> Attempt:
    """Decide what to resume from and record the attempt; from then on every earlier one is fenced. Call it once, on rank 0."""
    folder = RunFolder(folder) if isinstance(folder, str) else folder
    while True:
        number = newest_attempt(folder) + 1
        whole, torn = _search_whole(folder)
        attempt = record_attempt(folder, world_size, whole, number, torn)
        if attempt is not None:
            return attempt


def load(folder: RunFolder | str, name: str, optimizer: bool = True) -> Checkpoint:
    """Read checkpoint `name` (of `checkpoints/`), checking its sizes; hashes were checked when the attempt began."""
    folder = RunFolder(folder) if isinstance(folder, str) else folder
    verify(folder, name, hashes=False)
    place = f"checkpoints/{name}"
    state = json.loads(folder.read(f"{place}/state.json"))
    files = json.loads(folder.read(f"{place}/{COMMIT}"))["files"]
    parts: dict[str, dict[str, Tensor]] = {}
    for part in ("model", "ema", *(["optimizer"] if optimizer else [])):
        parts[part] = _parse(folder, f"{place}/{part}.safetensors") if f"{part}.safetensors" in files else {}
    tensors = TrainState(parts["model"], parts.get("optimizer", {}), parts["ema"], state.get("scaler") or {})
    return Checkpoint(name, tensors, state)


def _parse(folder: RunFolder, file: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    try:
        return parse(folder.read(file))
    except SafetensorError as error:
        received = f"{folder.url}/{file}"
        raise ConfigError("checkpoint", received, "a file in safetensors format; nothing else is ever loaded", str(error)) from None


class CheckpointWriter:
    """Writes checkpoints of one attempt in the background, one at a time, and keeps the newest and the best. Rank 0 only."""

    def __init__(self, folder: RunFolder, attempt: int, keep: int) -> None:
        self.folder, self.attempt, self.keep = folder, attempt, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, tensors: TrainState, state: dict[str, Any], best: str | None = None, committed: Callable[[int], None] | None = None
    ) -> str:
        """Start writing copies of the state; waits for the write before, and raises its error. Returns the checkpoint's name.

        `best` names the checkpoint that retention spares; `committed` is called with the step once the checkpoint counts.
        """
        self.wait()
        name = checkpoint_name(state["step"], self.attempt)
        check_fence(self.folder, self.attempt)

        def work() -> None:
            try:
                self._write(name, tensors, state)
                if committed is not None:
                    committed(state["step"])
                self._retain(best)
            except BaseException as error:  # raised again on the training thread
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()
        return name

    def wait(self) -> None:
        """Wait for the write under way; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, name: str, tensors: TrainState, state: dict[str, Any]) -> None:
        from safetensors.torch import save as serialise

        record: dict[str, dict[str, Any]] = {}

        def recorded(file: str, content: Callable[[], bytes]) -> Callable[[], bytes]:
            def make() -> bytes:
                data = content()
                record[file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                return data

            return make

        files = {"model.safetensors": recorded("model.safetensors", lambda: serialise(tensors.weights))}
        if tensors.ema:
            files["ema.safetensors"] = recorded("ema.safetensors", lambda: serialise(tensors.ema))
        files["optimizer.safetensors"] = recorded("optimizer.safetensors", lambda: serialise(tensors.optimizer))
        files["state.json"] = recorded("state.json", lambda: json.dumps(state | {"scaler": tensors.scaler}, indent=1).encode())
        files[COMMIT] = lambda: json.dumps({"step": state["step"], "attempt": self.attempt, "files": record}, indent=1).encode()
        fence = lambda: check_fence(self.folder, self.attempt)  # noqa: E731
        self.folder.write_folder(f"checkpoints/{name}", files, COMMIT, fence)

    def _retain(self, best: str | None) -> None:
        """Remove all but the newest `keep` of the history that counts, and the best. Leftovers of other histories go too."""
        check_fence(self.folder, self.attempt)
        names = candidates(self.folder)
        spared = {*names[: self.keep], best}
        for name in self.folder.names("checkpoints"):
            if name not in spared and (parse_checkpoint_name(name) or self._is_leftover(name)):
                self.folder.remove(f"checkpoints/{name}")

    def _is_leftover(self, name: str) -> bool:
        """A temporary folder of an earlier attempt that was killed while it wrote."""
        return name.startswith(".step_") and f"-a{self.attempt:04d}." not in name
