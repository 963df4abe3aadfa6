"""`diptych studio`: a web page on trained runs, with a tab for each thing that they can do."""

from __future__ import annotations

import functools
import ipaddress
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from diptych.config import ConfigError
from diptych.pipelines.console import finish, note, would
from diptych.pipelines.options import AsJson, Averaged, Checkpoint, Device, DryRun


def run(
    runs: list[str], *, clip: str = "", host: str = "127.0.0.1", port: int = 0, auth: str = "", out: str = "studio", serve: int = 0,
    gpus_per_replica: float = 0.0, checkpoint: str = "newest", averaged: bool = True, device: str = "auto", block: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Open the studio on `runs`; with `block`, returns when it is stopped. Returns `address, pictures, app`.

    `serve` above 0 puts the models into as many replicas of Ray Serve at most; 0 keeps them in this process. Raises `ConfigError`
    for runs that do not go together, an address beyond this machine without `auth`, and where gradio is not installed. With `dry_run`
    nothing is loaded, and what would be is returned.
    """
    from diptych.pipelines.runs_folder import find_run
    from diptych.pipelines.studio_models import ServedModels, StudioModels, studio_spec
    from diptych.pipelines.trained import described

    users = read_users(auth)
    check_address(host, users)
    try:
        from diptych.pipelines import studio_app
    except ModuleNotFoundError as error:
        raise ConfigError("studio", error.name, "an environment with gradio", 'Install the extra: pip install "diptych[studio]"') from error
    spec = studio_spec(runs, clip=clip, checkpoint=checkpoint, averaged=averaged, device=device)
    folder = Path(out).absolute()
    if dry_run:
        about = {"address": f"http://{host}:{port or 'the first free port from 7860 on'}", "users": len(users), "writes": str(folder)}
        about |= {"replicas": serve, "gpus": serve * gpus_per_replica, "device": device, "clip": clip or "none"}
        return about | {"runs": [described(find_run(run), checkpoint, averaged) for run in runs]}
    folder.mkdir(parents=True, exist_ok=True)
    note(f"loading {len(runs)} runs" + (f" into up to {serve} replicas" if serve else ""))
    with _ray(serve):
        engine = ServedModels(spec, serve, gpus_per_replica) if serve else StudioModels(spec)
        app = studio_app.build(spec, engine, folder, max(1, serve))
        address = studio_app.launch(app, host, port, users, folder, block=False)
        note(f"the studio is at {address} (Ctrl-C stops it); pictures go to {folder}")
        if block:
            app.block_thread()
            app.close()
            if isinstance(engine, ServedModels):
                engine.close()
    return {"address": address, "pictures": str(folder), "app": app}


def _ray(replicas: int) -> Any:
    if not replicas:
        return nullcontext()
    from diptych.pipelines.ray_context import ray_session

    return ray_session(replicas + 1)


def read_users(auth: str) -> list[tuple[str, str]]:
    """(user, password) of each line `user:password` of the file `auth`; empty for none. `ConfigError` for a file without any."""
    if not auth:
        return []
    path = Path(auth)
    lines = [line.strip() for line in path.read_text().splitlines()] if path.is_file() else []
    users = [(line.partition(":")[0], line.partition(":")[2]) for line in lines if line and not line.startswith("#")]
    if not users or not all(user and password for user, password in users):
        raise ConfigError("--auth", auth, "a file of lines user:password", "It stays on this machine; keep it readable for you alone.")
    return users


def check_address(host: str, users: list[tuple[str, str]]) -> None:
    """`ConfigError` for an address that others can reach without a password."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not users:
        raise ConfigError("--host", host, "127.0.0.1, or another address with --auth", "Name a file of lines user:password.")


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="run folders, or names under runs/; one of each task")],
    *,
    clip: Annotated[str, typer.Option(help="CLIP (name, folder, exported run): the prior's, and scores each picture")] = "",
    host: Annotated[str, typer.Option(help="address to listen on; others than this machine's own need --auth")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 = the first free one from 7860 on")] = 0,
    auth: Annotated[str, typer.Option(help="file of lines user:password")] = "",
    out: Annotated[str, typer.Option(help="folder for the pictures that are made")] = "studio",
    serve: Annotated[int, typer.Option(help="replicas of Ray Serve at most; 0 = the models stay in this process")] = 0,
    gpus_per_replica: Annotated[float, typer.Option(help="GPUs of each replica")] = 0.0,
    checkpoint: Checkpoint = "newest",
    averaged: Averaged = True,
    device: Device = "auto",
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Open a web page on RUNs: keywords, dreams, variations, inpainting, prompts from pictures, and a gallery.

    Example: diptych studio runs/prompts runs/painter runs/captioner
    """
    call = functools.partial(
        run, runs, clip=clip, host=host, port=port, auth=auth, out=out, serve=serve, gpus_per_replica=gpus_per_replica, checkpoint=checkpoint,
        averaged=averaged, device=device, dry_run=dry_run,
    )  # fmt: skip
    if dry_run:
        would("open the studio", call, json)
    result = call()
    finish({key: result[key] for key in ("address", "pictures")}, json)


if __name__ == "__main__":
    from diptych.cli import main

    main(["studio", *sys.argv[1:]])
