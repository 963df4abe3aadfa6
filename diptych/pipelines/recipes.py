"""`diptych recipes`: every task and recipe; with a name, the whole configuration and what each key means."""

from __future__ import annotations

import inspect
import json as json_module
import sys
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import typer
from pydantic.fields import FieldInfo

from diptych.config import Config, ConfigError, load_recipe, recipes_of, task_config_class, task_names
from diptych.documentation import field_documentation
from diptych.pipelines.console import finish
from diptych.pipelines.options import AsJson
from diptych.tune_spaces import spaces_of

_BOUNDS = (
    (annotated_types.Ge, "ge", "≥"),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "≤"),
    (annotated_types.Lt, "lt", "<"),
)


def run(name: str = "", recipe: str = "") -> dict[str, Any]:
    """Without a name, `tasks: [{task, summary, recipes: [{name, summary}], spaces: [{name, summary}]}]`.

    With `TASK [RECIPE]` or `TASK/RECIPE` also `task, recipe, documentation`, the stored form `config`, and `keys: [{key, value,
    type, allowed, documentation}]` of that recipe (of `smoke`, if none is named). Raises `ConfigError` for unknown names.
    """
    if not name:
        return {"tasks": [_summary(task) for task in task_names()]}
    task, _, after_slash = name.partition("/")
    if recipe and after_slash:
        raise ConfigError("NAME", f"{name} {recipe}", "TASK, TASK RECIPE or TASK/RECIPE")
    chosen = recipe or after_slash or "smoke"
    config = load_recipe(task, chosen)
    return {
        "tasks": [_summary(task)],
        "task": task,
        "recipe": chosen,
        "documentation": inspect.getdoc(recipes_of(task)[chosen]) or "",
        "config": json_module.loads(config.to_json()),
        "keys": _keys(config),
    }


def _summary(task: str) -> dict[str, Any]:
    recipes = [{"name": name, "summary": _first_line(function)} for name, function in recipes_of(task).items()]
    spaces = [{"name": name, "summary": _first_line(function)} for name, function in spaces_of(task).items()]
    return {"task": task, "summary": _first_line(task_config_class(task)), "recipes": recipes, "spaces": spaces}


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _keys(config: Config, prefix: str = "") -> list[dict[str, Any]]:
    stored = config.model_dump(mode="json")
    rows: list[dict[str, Any]] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            rows += _keys(value, f"{prefix}{name}.")
        else:
            documentation = " ".join(field_documentation(type(config), name).split())
            row = {"key": prefix + name, "value": stored[name], "type": _type_name(field.annotation), "allowed": _allowed(field)}
            rows.append(row | {"documentation": documentation})
    return rows


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "choice"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation).replace("typing.", "")


def _allowed(field: FieldInfo) -> str:
    """Choices or bounds, for people; empty where the type says all."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(map(str, get_args(field.annotation)))
    bounds = [f"{sign} {getattr(item, name):g}" for item in field.metadata for kind, name, sign in _BOUNDS if isinstance(item, kind)]
    return " and ".join(bounds)


def report(result: dict[str, Any]) -> str:
    """The result as text for people; the lines of keys can be pasted into a `train` call."""
    if "keys" not in result:
        lines = [
            "Start one with `diptych train TASK --recipe NAME`, search with `diptych tune TASK --space NAME`; `diptych recipes TASK NAME` shows the keys.",
            "",
        ]
        for task in result["tasks"]:
            lines += [f"{task['task']}: {task['summary']}"]
            lines += [f"  {recipe['name']:<20} {recipe['summary']}" for recipe in task["recipes"]]
            lines += [f"  to search: {', '.join(space['name'] for space in task['spaces']) or 'no named space'}", ""]
        return "\n".join(lines).rstrip()
    others = ", ".join(recipe["name"] for recipe in result["tasks"][0]["recipes"] if recipe["name"] != result["recipe"])
    lines = [
        f"{result['task']} / {result['recipe']}",
        "",
        result["documentation"],
        "",
        f"Other recipes of {result['task']}: {others or 'none'}",
        "Spaces for `diptych tune`:",
        *[f"  {space['name']:<20} {space['summary']}" for space in result["tasks"][0]["spaces"]],
    ]
    section = None
    for row in result["keys"]:
        if (head := row["key"].rpartition(".")[0]) != section:
            section = head
            lines.append("")
        allowed = f" ({row['allowed']})" if row["allowed"] else ""
        lines.append(f"{row['key']}={_as_argument(row['value'])}\n    {row['documentation']}{allowed}")
    return "\n".join(lines)


def _as_argument(value: Any) -> str:
    return value if isinstance(value, str) else json_module.dumps(value, separators=(",", ":"))


def command(
    name: Annotated[str, typer.Argument(help="TASK or TASK/RECIPE")] = "",
    recipe: Annotated[str, typer.Argument(help="a recipe of TASK; default: smoke")] = "",
    *,
    json: AsJson = False,
) -> None:
    """List every task and recipe; with NAME, its whole configuration and what each key means.

    Example: diptych recipes coca demo
    """
    result = run(name, recipe)
    if not json:
        print(report(result))
    finish(result, json)


if __name__ == "__main__":
    from diptych.cli import main

    main(["recipes", *sys.argv[1:]])
