"""The command line: `diptych VERB …`, the same as `python -m diptych.pipelines.VERB …`.

Each verb's options stand beside its work, as `command` in `diptych/pipelines/VERB.py`; this module finds it by name when it
is called, so `--help` needs no heavy import. Exit status: 0 done, 1 the work found faults or failed, 2 the call or
the configuration was wrong.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

VERBS: dict[str, str] = {
    "demo": "the main job end to end on generated data",
    "pack": "image folder, table or prompts → shards",
    "ingest": "URL list → shards (img2dataset, on Ray)",
    "index": "build or check the manifest; prints every fault",
    "inspect": "counts, captions and a contact sheet as HTML",
    "embed": "CLIP embeddings in clip-retrieval's layout",
    "reorder": "embeddings in DALLE2-pytorch's layout",
    "filter": "SQL over the manifest → keep-list",
    "dedup": "near-duplicates by embedding → keep-list",
    "keep": "combine keep-lists (and, or, minus)",
    "cache": "latents and text states, computed once",
    "train": "train a task: tracked and exactly resumable",
    "tune": "sweep a task's search space",
    "evaluate": "one table of metrics for a run",
    "generate": "captions, prompts or pictures from a run",
    "export": "a run's model in its ecosystem's own format",
    "report": "one self-contained HTML page of runs",
    "studio": "the web app on trained runs",
    "submit": "the same verb as a Ray job on a cluster",
    "recipes": "every task and recipe; NAME shows its keys",
    "runs": "runs, their status and metrics",
    "doctor": "what this machine can do, what is missing",
}

_RESUME = {
    **dict.fromkeys(("pack", "ingest", "index", "embed", "reorder", "cache"), "the same call goes on with what is missing"),
    "generate": "with --shards the same call goes on with what is missing",
    **dict.fromkeys(("train", "demo"), "the same call with the run's name goes on from its newest checkpoint (`diptych runs` lists names)"),
}
"""What a verb says at Ctrl-C."""

_EXAMPLES = """\
Examples:
  diptych demo
  diptych index shards/
  diptych train coca --recipe smoke data.shards=shards/ workers=2
  diptych train dalle2_prior data.shards=shards/ data.embeddings=embeddings/ train.strategy=zero2
`diptych VERB --help` shows a verb's options. Exit status 0 done, 1 faults or failure, 2 wrong call."""


def available_verbs() -> dict[str, str]:
    """The verbs whose module is installed, in the order of the help page."""
    from importlib.util import find_spec

    return {verb: text for verb, text in VERBS.items() if find_spec(f"diptych.pipelines.{verb}")}


def help_page() -> str:
    """The page of `diptych --help`; fits a screen of 24 × 80 with the verbs in two columns or fewer."""
    lines = ["Usage: diptych VERB [OPTIONS] …", "", "Train text↔image models from webdataset shards on Ray.", ""]
    lines += [f"  {verb:<9} {text}" for verb, text in available_verbs().items()]
    return "\n".join([*lines, "", _EXAMPLES])


def main(argv: list[str] | None = None) -> None:
    """Run one verb and exit the process with its status."""
    arguments = sys.argv[1:] if argv is None else argv
    completing = "_DIPTYCH_COMPLETE" in os.environ
    if not completing and (not arguments or arguments[0] in ("-h", "--help", "help")):
        print(help_page())
        sys.exit(0)
    if not completing and arguments[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(version("diptych"))
        sys.exit(0)
    verb, verbs = arguments[0] if arguments else "", available_verbs()
    if verb not in verbs and not verb.startswith("--") and not completing:
        near = difflib.get_close_matches(verb, verbs, n=1, cutoff=0.4)
        print(f"VERB: received {verb!r}; allowed: {', '.join(verbs)}." + (f" Did you mean {near[0]}?" if near else ""), file=sys.stderr)
        sys.exit(2)
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    from diptych.pipelines import console

    return console.guard(
        lambda: _application(arguments)(args=arguments, prog_name="diptych", standalone_mode=True),
        _RESUME.get(arguments[0] if arguments else "", ""),
    )


def _application(arguments: list[str]) -> Any:
    """A Typer application that holds only the verb that is called, or all for shell completion."""
    import typer

    # Plain help instead of boxes: it fits a screen, and rich's Markdown is not imported for it. Click alone would fill 80 columns of any screen.
    application = typer.Typer(
        rich_markup_mode=None,
        add_completion=True,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    application.callback()(lambda: None)
    verbs = available_verbs()
    for verb in [arguments[0]] if arguments and arguments[0] in verbs else verbs:
        module = importlib.import_module(f"diptych.pipelines.{verb}")
        # An override such as optim.lr=-1 must not be read as an option, hence no interspersed surprises: `--` is not needed.
        settings = getattr(module, "CONTEXT_SETTINGS", None)
        application.command(name=verb, help=module.command.__doc__, context_settings=settings)(module.command)
    return application


if __name__ == "__main__":
    main()
