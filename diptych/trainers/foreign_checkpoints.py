"""Weights in checkpoints that others wrote: found on disk or on the hub, and read without running what is in them.

Older checkpoints pickle objects of their trainer beside the weights, which `torch.load(weights_only=True)` refuses.
Here such objects become inert, and only tensors and plain containers come through.
"""

from __future__ import annotations

import collections
import contextlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diptych.config import ConfigError

_REBUILD = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class _Inert:
    """Stands for an object whose class is not trusted: takes whatever the pickle gives it and does nothing."""

    def __new__(cls, *_args: Any, **_options: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def __call__(self, *_args: Any, **_options: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """A pickled list subclass appends its items."""

    def extend(self, values: Any) -> None:
        """A pickled list subclass extends itself by its items."""


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        return _REBUILD.get((module, name), _Inert)


def _load(file: Any, **options: Any) -> Any:
    return _TensorUnpickler(file, **options).load()


_TENSORS_ONLY = SimpleNamespace(Unpickler=_TensorUnpickler, load=_load, __name__="tensors_only")


def read_state(path: Path, entries: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights in the checkpoint `path`: its first entry named in `entries`, or the whole file if it has none of them."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TENSORS_ONLY)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ConfigError("task.pretrained", str(path), "a checkpoint of torch.save or safetensors", str(error)[:300]) from error
    state = next((loaded[entry] for entry in entries if entry in loaded), loaded) if isinstance(loaded, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ConfigError("task.pretrained", str(path), f"a checkpoint with {' or '.join(entries)} in it", "It holds no weights.")
    return state


def locate_weights(key: str, source: str, file_name: str, config_name: str) -> Path:
    """The local file of the weights `source`: a file, a folder with `file_name`, or on the hub `org/repo[/path/to/file]`.

    The hub's `config_name` beside the weights comes along, where there is one. Raises `ConfigError` naming `key`.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file_name).is_file():
            raise ConfigError(key, source, f"a folder with {file_name}", "`diptych export` writes one.")
        return path / file_name
    parts = source.split("/")
    if source.startswith(("/", ".", "~")) or len(parts) < 2:
        raise ConfigError(key, source, "an existing file or folder, or a hub name org/repo[/path/to/file]", "Check the path.")
    return _download(key, "/".join(parts[:2]), "/".join(parts[2:]) or file_name, config_name)


def _download(key: str, repository: str, file: str, config_name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    missing = (HfHubHTTPError, LocalEntryNotFoundError, OSError)
    try:
        weights = Path(hf_hub_download(repository, file))
    except missing as error:
        raise ConfigError(key, f"{repository}/{file}", "a file on the Hugging Face hub", str(error).splitlines()[0]) from error
    folder = file.rpartition("/")[0]
    # Without a stored configuration the sizes come from the run's, and loading says so if they differ.
    with contextlib.suppress(*missing):
        hf_hub_download(repository, f"{folder}/{config_name}" if folder else config_name)
    return weights
