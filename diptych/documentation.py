"""The strings that stand under the fields of a class, read from its source when they are asked for.

pydantic's `use_attribute_docstrings` reads them at every import, which takes 0.1 s of each start of the command line.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap


def field_documentation(cls: type, name: str) -> str:
    """The string under the field `name` of `cls` or of the base that declares it; empty if there is none."""
    return next((text for owner in cls.__mro__ if (text := _strings_of(owner).get(name))), "")


@functools.cache
def _strings_of(owner: type) -> dict[str, str]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    except (OSError, TypeError):  # built in, or without source
        return {}
    found: dict[str, str] = {}
    for field, text in itertools.pairwise(getattr(definition, "body", [])):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = str(text.value.value) if isinstance(text.value, ast.Constant) else ""
    return found
