"""open_clip, imported without the packages that it merely offers to use; whatever here needs open_clip takes it from this module.

A bare `import open_clip` also imports timm (which imports wandb), transformers, and through torchvision torch's compiler: more than half of
its CPU time, in every process, for towers and functions that few models have. Here it is imported as where these are not
installed; `complete` brings in the first two for a model with such a tower, and the compiler comes when it is called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# Whole, before anything is hidden: torch's own modules must never meet the stand-in.
import torch  # noqa: F401

_COMPILER = "torch._dynamo.utils"
_TOWERS = (("vision_cfg", "timm_model_name", "timm_model", "timm"), ("text_cfg", "hf_model_name", "hf_model", "transformers"))
"""Part of an architecture, its key that asks for a package, open_clip's module that uses it, the package."""


class _Compiler(ModuleType):
    """Stands for `_COMPILER` while torchvision is imported, which takes one function from there and calls it in its RoI alignment alone."""

    def __getattr__(self, name: str) -> Any:
        if name == "is_compile_supported":
            return lambda device_type: importlib.import_module(_COMPILER).is_compile_supported(device_type)
        if name.startswith("__"):
            raise AttributeError(name)
        # Another version may take more: then there is nothing to gain, and the module itself comes.
        sys.modules.pop(_COMPILER, None)
        return getattr(importlib.import_module(_COMPILER), name)


@contextmanager
def _in_place(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """`modules` stand for those of these names that are not imported yet; None is found as if nothing were installed."""
    known: dict[str, Any] = sys.modules
    absent = {name: module for name, module in modules.items() if name not in known}
    known.update(absent)
    try:
        yield
    finally:
        for name, module in absent.items():
            if known.get(name) is module:
                known.pop(name, None)


with _in_place({_COMPILER: _Compiler(_COMPILER)}):
    import torchvision  # noqa: F401
with _in_place({package: None for *_, package in _TOWERS}):
    import open_clip


def complete(architecture: Mapping[str, Any]) -> None:
    """Before a model of `architecture` (open_clip's `model_cfg`) is made: import what its towers run on."""
    for part, key, module, package in _TOWERS:
        user = getattr(open_clip, module)
        if architecture.get(part, {}).get(key) and getattr(user, package) is None:
            # In place: the classes that open_clip has taken from the module look the package up there.
            importlib.reload(user)
