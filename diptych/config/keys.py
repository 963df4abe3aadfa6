"""Dotted keys: `KEY=VALUE` applied, read and explained. Every complaint names the nearest key that there is."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterable
from typing import Any, get_args

import pydantic

from diptych.config.base import C, Config, ConfigError
from diptych.documentation import field_documentation


def build(cls: type[C], data: dict[str, Any], prefix: str = "") -> C:
    """`cls(**data)`, with pydantic's complaints as one `ConfigError` on the first offending key."""
    try:
        return cls(**data)
    except pydantic.ValidationError as error:
        raise _explain(cls, error, prefix) from None


def apply_overrides(config: C, overrides: Iterable[str]) -> C:
    """Return `config` with each `dotted.key=value` applied, all at once if need be. Values are read as JSON where they parse, else as text."""
    changes: dict[str, str] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError("KEY=VALUE", override, "a dotted configuration key, '=', and a value", "Example: train.steps=200")
        changes[key.strip()] = text
    while changes:
        refused: dict[str, ConfigError] = {}
        for key, text in changes.items():
            try:
                config = _set_text(config, key, text)
            except ConfigError as error:
                refused[key] = error
        if len(refused) == len(changes):
            break
        # What was refused may be right beside what stood after it.
        changes = {key: changes[key] for key in refused}
    else:
        return config
    with contextlib.suppress(ConfigError, KeyError, AttributeError):
        return _set_together(config, {key: _parse(text) for key, text in changes.items()})
    raise next(iter(refused.values()))


def _set_together(config: C, changes: dict[str, Any]) -> C:
    """`config` with all of `changes` made at once, then validated: a model and its tokenizer are right only together."""
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    for name in {key.partition(".")[0] for key in changes}:
        inner = {key.partition(".")[2]: value for key, value in changes.items() if key.partition(".")[0] == name}
        fields[name] = _set_together(fields[name], inner) if isinstance(fields[name], Config) else inner[""]
    return build(type(config), fields)


def _set_text(config: C, key: str, text: str) -> C:
    parsed = _parse(text)
    try:
        return set_path(config, key, parsed)
    except ConfigError as error:
        if isinstance(parsed, str):
            raise
        # Text that also reads as JSON, such as a run called 2024, is text where only text is allowed.
        try:
            return set_path(config, key, text)
        except ConfigError:
            raise error from None


def set_path(config: C, key: str, value: Any) -> C:
    """Return `config` with the field at the dotted path `key` set to `value`, validated again up to the root."""
    path = key.split(".")
    chain: list[Config] = [config]
    for name in path[:-1]:
        inner = getattr(chain[-1], name, None) if name in type(chain[-1]).model_fields else None
        if not isinstance(inner, Config):
            raise _unknown_key(config, key, value)
        chain.append(inner)
    if path[-1] not in type(chain[-1]).model_fields:
        raise _unknown_key(config, key, value)
    if isinstance(getattr(chain[-1], path[-1]), Config):
        raise ConfigError(key, value, f"one of its keys: {', '.join(type(getattr(chain[-1], path[-1])).model_fields)}")
    new: Any = value
    for depth in range(len(path) - 1, -1, -1):
        owner = chain[depth]
        fields = {name: getattr(owner, name) for name in type(owner).model_fields} | {path[depth]: new}
        new = build(type(owner), fields, ".".join(path[:depth]))
    return new


def get_path(config: Config, key: str) -> Any:
    """The value at the dotted path `key`; `ConfigError` with the nearest key if there is none."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Config) or name not in type(value).model_fields:
            raise _unknown_key(config, key)
        value = getattr(value, name)
    return value


def dotted_keys(config: Config, prefix: str = "") -> dict[str, Any]:
    """Every leaf of `config` as dotted key → value, in the order of the fields."""
    leaves: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        leaves |= dotted_keys(value, f"{prefix}{name}.") if isinstance(value, Config) else {f"{prefix}{name}": value}
    return leaves


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _unknown_key(config: Config, key: str, received: Any = "no value") -> ConfigError:
    known = list(dotted_keys(config))
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    near = near or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    remedy = f"Did you mean {' or '.join(near)}?" if near else "`diptych recipes NAME` lists the keys."
    section = key.rpartition(".")[0]
    inside = [name for name in known if name.rpartition(".")[0] == section]
    return ConfigError(key, received, f"an existing key, such as {', '.join((inside or list(type(config).model_fields))[:8])}, …", remedy)


def _explain(cls: type[Config], error: pydantic.ValidationError, prefix: str) -> ConfigError:
    first = error.errors()[0]
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    key = ".".join([prefix] * bool(prefix) + [str(part) for part in first["loc"]])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), list(cls.model_fields), n=2, cutoff=0.5)
        return ConfigError(key, first["input"], "no such key", f"Did you mean {' or '.join(near)}?" if near else "")
    name = str(first["loc"][0]) if first["loc"] else ""
    field = cls.model_fields.get(name)
    received = first["input"]
    allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    choices = get_args(field.annotation) if field is not None and str(field.annotation).startswith("typing.Literal") else ()
    remedy = field_documentation(cls, name)
    if choices and isinstance(received, str):
        near = difflib.get_close_matches(received, [str(choice) for choice in choices], n=1, cutoff=0.4)
        allowed, remedy = ", ".join(map(str, choices)), (f"Did you mean {near[0]}?" if near else remedy)
    return ConfigError(key, received, allowed, remedy)
