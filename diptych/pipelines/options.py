"""Options that several verbs take, each defined once: the same word means the same, and says so in the same words, in every help page."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="one JSON object as the last line")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check the call and show what it would do; write, download and start nothing")]

ManifestFolder = Annotated[str, typer.Option(help="folder of the manifest; default: beside the shards")]
KeepLists = Annotated[str, typer.Option(help="keep-lists, separated by commas")]

RayAddress = Annotated[str, typer.Option(help="Ray address; default: RAY_ADDRESS, else a local Ray")]
Actors = Annotated[int, typer.Option(help="copies of the model; 0 = chosen from the cores")]
CpusPerActor = Annotated[int, typer.Option(help="threads of an actor; 0 = cores over actors")]
GpusPerActor = Annotated[float, typer.Option(help="GPUs of an actor; above 0 it runs on CUDA")]

Checkpoint = Annotated[str, typer.Option(help="newest, best, or a checkpoint's name")]
Averaged = Annotated[bool, typer.Option(help="take the averaged weights, where a run kept some")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto")]
