"""`diptych submit VERB …`: the same verb as a Ray job on a cluster, from this folder, with its output followed here.

The working folder travels with the job (`.gitignore` and `.rayignore` count), so the cluster runs the code that stands here. The job
runs `python -m diptych.pipelines.VERB …` as its driver. Ray's token opens the cluster; it is read where Ray reads it and never sent
along as part of the job.
"""

from __future__ import annotations

import asyncio
import functools
import json as json_module
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diptych.config import ConfigError
from diptych.pipelines.console import finish, note, would
from diptych.pipelines.options import AsJson, DryRun
from diptych.redaction import is_secret_name, without_credentials

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONTEXT_SETTINGS = {"allow_interspersed_args": False}
"""What follows VERB belongs to the verb, options included."""

_NEVER_SENT = (
    ".git",
    ".venv",
    ".uv",
    "runs",
    "mlruns",
    "mlartifacts",
    "mlflow.db*",
    "*.tar",
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    ".netrc",
    ".aws",
    ".ssh",
)
"""Left out of every package, whatever the folder's own ignore files say: what is large, and what may hold secrets."""
_AGENT_SECONDS = 180
"""How long a cluster that has just started may have no agent for jobs yet."""
_STOP_SECONDS = 120
"""How long a stopped job may take to write its checkpoint before Ray kills it; Ray's own default is 3 s."""
_HOW_TO_AUTHENTICATE = (
    "Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token (on its head: `ray get-auth-token`), with RAY_AUTH_MODE=token. "
    "Authentication stays on."
)


def run(
    verb: str,
    arguments: list[str],
    address: str = "",
    *,
    working_dir: str = ".",
    excludes: tuple[str, ...] = (),
    runtime_env: str = "",
    environment: tuple[str, ...] = (),
    name: str = "",
    wait: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Submit `verb arguments` and, with `wait`, print its output until it ends; with `dry_run` only return what would be sent.

    Returns `job, address, status` (Ray's word, such as SUCCEEDED) and `exit_status` of the verb (None while it runs). Raises
    `ConfigError` for a cluster that does not answer, a token that is missing or wrong, or a folder that is too large.
    """
    from diptych.cli import available_verbs

    verbs = [known for known in available_verbs() if known != "submit"]
    if verb not in verbs:
        raise ConfigError("VERB", verb, ", ".join(verbs))
    # Checked before anything is sent: what is wrong here needs no cluster.
    environment_of_job = job_environment(runtime_env, environment, working_dir, excludes)
    entrypoint = shlex.join(["python", "-m", f"diptych.pipelines.{verb}", *arguments])
    if dry_run:
        return {"entrypoint": entrypoint, "address": address or "as the environment says", "runtime_env": environment_of_job}
    client = connect(address)
    job = _submit(client, entrypoint, environment_of_job, name, working_dir)
    note(f"job {job} on {client.get_address()}: {entrypoint}")
    if wait:
        follow(client, job)
    return outcome(client, job)


def job_environment(file: str, variables: tuple[str, ...], working_dir: str, excludes: tuple[str, ...]) -> dict[str, Any]:
    """Ray's runtime environment: that of the YAML or JSON `file`, the folder, and variables given as NAME (from here) or NAME=VALUE."""
    import yaml

    if not Path(working_dir).is_dir():
        raise ConfigError(
            "--working-dir", working_dir, "a folder of this machine", "It is sent to the cluster; it holds the package diptych."
        )
    described: Any = {}
    if file:
        if not Path(file).is_file():
            raise ConfigError("--runtime-env", file, "a YAML or JSON file with Ray's runtime environment")
        described = yaml.safe_load(Path(file).read_text())
        if not isinstance(described, dict):
            raise ConfigError("--runtime-env", file, "a mapping such as `pip: [timm]`")
    given = dict(described.get("env_vars") or {})
    for variable in variables:
        key, separator, value = variable.partition("=")
        if not separator and key not in os.environ:
            raise ConfigError("--env", key, "NAME=VALUE, or the name of a variable that is set here")
        given[key] = value if separator else os.environ[key]
    for key, value in given.items():
        _refuse_secret(key, str(value))
    left_out = [*_NEVER_SENT, *described.get("excludes", []), *excludes]
    return {
        **described,
        "working_dir": working_dir,
        "excludes": left_out,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS), **given},
    }


def _refuse_secret(key: str, value: str) -> None:
    """A job's environment is shown by the dashboard and kept by the cluster."""
    if is_secret_name(key) or without_credentials(value) != value:
        remedy = (
            "A job's variables are shown by Ray's dashboard and `ray job list`. Set it on the nodes: cluster.yaml, a Kubernetes secret."
        )
        raise ConfigError("--env", key, "variables that are no secrets", remedy)


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at `address` (empty = RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or a Ray of this machine)."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if address:
        # Ray lets the environment win over the argument; here it is the other way round, as everywhere.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "a Ray of this machine"
    try:
        return JobSubmissionClient()
    except AuthenticationError as error:
        raise ConfigError("RAY_AUTH_TOKEN", _token_state(error), f"the token of the cluster at {where}", _HOW_TO_AUTHENTICATE) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        remedy = (
            "The dashboard's URL, such as http://head:8265. A cluster behind a firewall: `ray dashboard cluster.yaml` forwards the port."
        )
        raise ConfigError("--address", where, f"a running cluster's job server ({_first_line(error)})", remedy) from None


def _token_state(error: Exception) -> str:
    """What is wrong with the token, never the token itself."""
    text = str(error).lower()
    return "a wrong token" if "403" in text or "invalid" in text or "forbidden" in text else "no token"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _submit(client: JobSubmissionClient, entrypoint: str, environment: dict[str, Any], name: str, working_dir: str) -> str:
    deadline = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment, submission_id=name or None))
        except (RuntimeError, ValueError) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise _refusal(error, name, working_dir) from None
        note("the cluster is still starting; trying again")
        time.sleep(3.0)


def _refusal(error: Exception, name: str, working_dir: str) -> ValueError:
    """What the user can do about a job that was not taken."""
    text = str(error)
    if "exceeds the maximum size" in text or "too large" in text.lower():
        remedy = "Name what the job does not need: --exclude, .gitignore or .rayignore. Data belongs into shared storage."
        return ConfigError("--working-dir", working_dir, "a folder of at most 100 MiB", remedy)
    if "already exists" in text:
        return ConfigError("--name", name, "a name that no job of this cluster has", "Leave it out to get a new one.")
    return ValueError(f"the cluster refused the job: {_first_line(error)}")


def follow(client: JobSubmissionClient, job: str) -> None:
    """Print the job's output until it ends. Ctrl-C asks whether to stop it, to leave it running, or to go on."""
    seen = [0]
    while not client.get_job_status(job).is_terminal():
        try:
            asyncio.run(_print_from(client, job, seen))
        except KeyboardInterrupt:
            if not _go_on(client, job):
                return
        except (RuntimeError, OSError) as error:
            note(f"the connection was lost ({_first_line(error)}); following again")
            time.sleep(2.0)
    # What was written between the last line and the end.
    _write(client.get_job_logs(job)[seen[0] :])


async def _print_from(client: JobSubmissionClient, job: str, seen: list[int]) -> None:
    """Each connection tells the log from its start, so what was printed before is passed over."""
    position = 0
    async for text in client.tail_job_logs(job):
        position += len(text)
        if position > seen[0]:
            _write(text[seen[0] - position :])
            seen[0] = position


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _go_on(client: JobSubmissionClient, job: str) -> bool:
    """What Ctrl-C means; False = no longer follow."""
    how = f"`diptych submit --stop {job}` stops it, `diptych submit --follow {job}` follows it again"
    if not sys.stdin.isatty():
        note(f"the job goes on; {how}")
        return False
    try:
        answer = input("\n[s]top the job, [l]eave it running, or [c]ontinue to follow? ").strip().lower()[:1]
    except (EOFError, KeyboardInterrupt):
        answer = "l"
    if answer == "s":
        client.stop_job(job)
        note("asked to stop: the run writes a checkpoint and ends")
        return True
    if answer == "l":
        note(f"the job goes on; {how}")
        return False
    return True


def outcome(client: JobSubmissionClient, job: str) -> dict[str, Any]:
    """`job, address, status, exit_status` and Ray's `message` for a job that failed."""
    details = client.get_job_info(job)
    status = str(details.status.value if hasattr(details.status, "value") else details.status)
    message = (details.message or "") if status == "FAILED" else ""
    found = {"job": job, "address": client.get_address(), "status": status, "exit_status": details.driver_exit_code, "message": message}
    if status == "FAILED" and details.driver_exit_code is None:
        note(f"the job did not start: {message.strip()}")
    return found


def command(
    verb: Annotated[str, typer.Argument(metavar="VERB", help="a verb and its arguments")] = "",
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS")] = None,
    *,
    address: Annotated[str, typer.Option(help="URL of the dashboard; default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS")] = "",
    working_dir: Annotated[str, typer.Option(help="folder to send; the job starts in a copy of it")] = ".",
    exclude: Annotated[list[str] | None, typer.Option(help="leave out of it, as in .gitignore (repeatable)")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME or NAME=VALUE for the job; no secrets (repeatable)")] = None,
    runtime_env: Annotated[str, typer.Option(help="YAML or JSON with Ray's runtime environment (pip, image_uri, …)")] = "",
    name: Annotated[str, typer.Option(help="the job's id; default: one that Ray makes")] = "",
    dry_run: DryRun = False,
    wait: Annotated[bool, typer.Option(help="follow the output until the job ends")] = True,
    follow_job: Annotated[str, typer.Option("--follow", metavar="JOB", help="follow a job that was submitted before")] = "",
    stop: Annotated[str, typer.Option(metavar="JOB", help="stop a job: its run writes a checkpoint and ends")] = "",
    json: AsJson = False,
) -> None:
    """Run VERB as a job on a Ray cluster, with this folder's code. Options of `submit` stand before VERB.

    Ends with the verb's own exit status. Example: diptych submit --address http://head:8265 train coca output=/shared/runs
    """
    if follow_job or stop:
        result = _existing(connect(address), follow_job, stop)
    elif verb:
        kept, variables = tuple(exclude or ()), tuple(env or ())
        call = functools.partial(
            run, verb, arguments or [], address, working_dir=working_dir, excludes=kept, runtime_env=runtime_env, environment=variables,
            name=name, wait=wait, dry_run=dry_run,
        )  # fmt: skip
        if dry_run:
            would("submit", call, json)
        result = call()
    else:
        raise ConfigError("VERB", "", "a verb, or --follow or --stop with a job", "Example: diptych submit train coca output=/shared/runs")
    _end(result, json)


def _existing(client: JobSubmissionClient, followed: str, stopped: str) -> dict[str, Any]:
    job = followed or stopped
    try:
        status = client.get_job_status(job)
        if stopped and not status.is_terminal():
            client.stop_job(job)
            note(f"asked {job} to stop: its run writes a checkpoint and ends")
    except RuntimeError as error:
        raise ConfigError("JOB", job, f"a job of this cluster ({_first_line(error)})") from None
    if followed:
        follow(client, job)
    return outcome(client, job)


def _end(result: dict[str, Any], json: bool) -> None:
    """Exit with the verb's own status; a job that was stopped or never started has failed."""
    note(f"job {result['job']}: {result['status']}")
    if result["status"] == "FAILED" and result["exit_status"]:
        if json:
            _write(json_module.dumps(result) + "\n")
        raise SystemExit(result["exit_status"])
    finish(result, json, failed=result["status"] in ("FAILED", "STOPPED"))


if __name__ == "__main__":
    from diptych.cli import main

    main(["submit", *sys.argv[1:]])
