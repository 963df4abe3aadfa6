"""`diptych doctor`: what this machine can do, what is missing, and the remedy, before a run finds out.

Every check stands for itself: `ok` false with `needed` true means that training cannot work; without `needed`, something is
slower or one verb is missing. No Ray is started.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from diptych.pipelines.console import finish
from diptych.pipelines.options import AsJson
from diptych.redaction import without_credentials

_SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux; Ray puts its own some 75 bytes below its folder."""
_RAY_SOCKET_SUFFIX_BYTES = 75


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    ok: bool
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do where it is not ok."""
    needed: bool = False
    """Whether training needs it."""


def run() -> dict[str, Any]:
    """`ok` (training can work) and `checks: [{name, ok, detail, remedy, needed}]`."""
    sections: list[Callable[[], Iterator[Check]]] = [_python, _packages, _torch, _memory, _folders, _ray, _tracking, _compilers]
    checks = [check for section in sections for check in section()]
    return {"ok": all(check.ok for check in checks if check.needed), "checks": [asdict(check) for check in checks]}


def _python() -> Iterator[Check]:
    version = platform.python_version()
    yield Check("python", sys.version_info >= (3, 11), f"{version} ({sys.executable})", "Install Python 3.11 or newer.", needed=True)
    in_venv = sys.prefix != sys.base_prefix
    yield Check("virtual environment", in_venv, sys.prefix, "`make install` makes one in .venv, so that other packages stay as they are.")


def _packages() -> Iterator[Check]:
    """Installed versions against what the package declares; an extra that is missing costs only its verbs."""
    from packaging.requirements import Requirement

    missing: dict[str, list[str]] = {}
    extras: dict[str, bool] = {}
    for text in metadata.requires("diptych") or []:
        requirement = Requirement(text)
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"' ") if requirement.marker else ""
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        installed = _version(requirement.name)
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        extras[extra] = extras.get(extra, True) and fits
        if not fits:
            missing.setdefault(extra, []).append(f"{requirement.name}{requirement.specifier} ({installed or 'not installed'})")
    shown = ", ".join(
        f"{name} {_version(name)}" for name in ("torch", "ray", "deepspeed", "transformers", "diffusers", "open_clip_torch", "mlflow")
    )
    lacking = "; ".join(missing.get("", []))
    yield Check("packages", extras.get("", False), lacking or shown, "`make install`, or pip install -c constraints.txt .", needed=True)
    # cpu and gpu exclude each other: the one that is not installed is not missing.
    other = {"cpu": "gpu", "gpu": "cpu"}
    for extra in sorted(name for name in extras if name and not (not extras[name] and extras.get(other.get(name, "")))):
        detail = "installed" if extras[extra] else "; ".join(missing[extra])
        yield Check(f"extra {extra}", extras[extra], detail, f"make install EXTRAS=…,{extra} or pip install '.[{extra}]'")
    yield from _conflicts()


def _conflicts() -> Iterator[Check]:
    both = [name for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11") if _version(name)]
    detail = " and ".join(f"{name} {_version(name)}" for name in both) or "not installed: `dedup` needs it"
    remedy = "They own the same module: keep one." if len(both) > 1 else "Install one of the extras cpu and gpu."
    yield Check("faiss", len(both) == 1, detail, remedy)
    if _version("clip-anytorch"):
        major = int((_version("setuptools") or "0").partition(".")[0])
        yield Check(
            "setuptools", 0 < major < 81, f"{_version('setuptools')}", "clip-anytorch imports pkg_resources: pip install 'setuptools<81'"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Check]:
    """Whether torch and torchvision belong together, what devices there are, and what precision=auto chooses on each."""
    try:
        import torch
        import torchvision  # noqa: F401 - importing it is the check
    except (ImportError, RuntimeError, OSError) as error:
        yield Check("torch", ok=False, detail=str(error), remedy="torch and torchvision must come from the same index.", needed=True)
        return
    from diptych.trainers.precision import resolve_precision

    cpu = resolve_precision("auto", torch.device("cpu"))
    yield Check("torch", ok=True, detail=f"{torch.__version__}, {torch.get_num_threads()} threads", needed=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slow = "" if cpu.name == "bf16" else "Training on this CPU takes several times as long as on one with AMX."
    yield Check("cpu", ok=True, detail=f"{cores} cores; train.precision=auto takes {cpu.name} ({cpu.reason})", remedy=slow)
    if not torch.cuda.is_available():
        seen = shutil.which("nvidia-smi") is not None
        remedy = "The driver is there, but torch cannot use it: compare `nvidia-smi` with torch.version.cuda." if seen else ""
        yield Check("gpu", ok=not seen, detail="none; training runs on the CPU", remedy=remedy)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        chosen = resolve_precision("auto", device)
        free, total = torch.cuda.mem_get_info(device)
        detail = f"{torch.cuda.get_device_name(device)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free; precision=auto takes {chosen.name}"
        yield Check(f"gpu {index}", ok=True, detail=detail, remedy="cluster.gpus_per_worker=1 trains on it.")


def _memory() -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    yield Check("memory", memory.available > 3e9, detail, "A run of 2 workers takes about 3 GB: close something, or set workers=1.")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm")
        remedy = "Ray's object store falls back to slow files: start the container with --shm-size=2g or more."
        yield Check("shared memory", shared.free > 1e9, f"{shared.free / 1e9:.1f} of {shared.total / 1e9:.1f} GB free in /dev/shm", remedy)


def _folders() -> Iterator[Check]:
    for name, folder in (("working folder", Path.cwd()), ("temporary folder", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free / 1e9
        writable = _writable(folder)
        detail = f"{folder}: {free:.0f} GB free" + ("" if writable else ", not writable")
        yield Check(
            name,
            writable and free > 1,
            detail,
            "Runs and Ray's logs are written there: free at least 1 GB, or change to another.",
            needed=True,
        )
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    offline = " (HF_HUB_OFFLINE is set: only what is there already)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    yield Check(
        "hub cache", _writable(existing), f"{cache}{offline}", "Published weights are kept there: set HF_HOME to a writable folder."
    )


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _ray() -> Iterator[Check]:
    address = os.environ.get("RAY_ADDRESS", "")
    where = f"RAY_ADDRESS={address}: verbs join that cluster" if address else "a local Ray is started for each call"
    yield Check("ray", _version("ray") is not None, f"{_version('ray')}; {where}", "`make install`", needed=True)
    folder = os.environ.get("RAY_TMPDIR") or "/tmp/ray"
    length = len(os.fsencode(folder)) + _RAY_SOCKET_SUFFIX_BYTES
    remedy = "Unix sockets allow 107 bytes: set RAY_TMPDIR to a short path."
    yield Check("ray folder", length <= _SOCKET_PATH_BYTES, f"{folder}; its sockets' paths take {length} bytes", remedy, needed=True)
    yield _loopback()
    yield _token()
    under_uv = os.environ.get("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "1").lower() in ("1", "true") and _under_uv_run()
    detail = "started by `uv run`: Ray would rebuild the environment for each worker" if under_uv else "not started by `uv run`"
    yield Check("uv run", not under_uv, detail, "Call .venv/bin/diptych, or set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0.")
    try:
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield Check("open files", files >= 1024, f"limit {files}", "Ray opens many sockets: ulimit -n 65536")
    except ImportError:  # not on Windows
        pass


def _loopback() -> Check:
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        return Check("loopback", ok=True, detail="127.0.0.1 accepts connections", needed=True)
    except OSError as error:
        return Check("loopback", ok=False, detail=str(error), remedy="Ray and gloo talk over 127.0.0.1: allow it.", needed=True)


def _token() -> Check:
    """Ray's token authentication: a local Ray makes itself a token in the home folder; a cluster's must be brought along."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file.is_file()
    if mode.lower() == "disabled":
        remedy = "Anyone who reaches the cluster can run code on it; unset RAY_AUTH_MODE unless the network is closed."
        return Check("ray token", ok=True, detail="RAY_AUTH_MODE=disabled: no token is asked for", remedy=remedy)
    if has_token:
        return Check("ray token", ok=True, detail="there is a token")
    if os.environ.get("RAY_ADDRESS"):
        remedy = "Copy the cluster's token to RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        return Check("ray token", ok=False, detail="none, and RAY_ADDRESS names a cluster", remedy=remedy, needed=mode.lower() == "token")
    parent = next(path for path in token_file.parents if path.exists())
    remedy = "Ray keeps its token there: make it writable, or set RAY_AUTH_TOKEN_PATH to a file of yours."
    return Check("ray token", _writable(parent), f"a local Ray will make one at {token_file}", remedy, needed=True)


def _under_uv_run() -> bool:
    import psutil

    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:
            continue
        if len(words) > 1 and Path(words[0]).name == "uv" and words[1] == "run":
            return True
    return False


def _tracking() -> Iterator[Check]:
    from diptych.config import ConfigError
    from diptych.pipelines import tracking

    try:
        uri = tracking.tracking_uri()
    except ConfigError as error:
        yield Check("mlflow store", ok=False, detail=str(error), remedy=error.remedy, needed=True)
        return
    yield Check("mlflow store", ok=True, detail=without_credentials(uri))


def _compilers() -> Iterator[Check]:
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    remedy = "Needed by train.compile=true only: install g++ and the headers of Python."
    yield Check("C++ compiler", compiler is not None, compiler or "none", remedy)


def report(result: dict[str, Any]) -> str:
    """The checks as lines for people: what is broken carries its remedy."""
    lines = []
    width = max(len(check["name"]) for check in result["checks"])
    for check in result["checks"]:
        mark = "ok  " if check["ok"] else "FAIL" if check["needed"] else "note"
        lines.append(f"{mark}  {check['name']:<{width}}  {check['detail']}")
        if check["remedy"] and not check["ok"]:
            lines.append(f"{'':<{width + 8}}→ {check['remedy']}")
    broken = [check["name"] for check in result["checks"] if check["needed"] and not check["ok"]]
    lines += ["", f"training cannot work yet: {', '.join(broken)}" if broken else "ready to train"]
    return "\n".join(lines)


def command(*, json: AsJson = False) -> None:
    """Check packages, devices, memory, folders and Ray's prerequisites; status 1 if training cannot work.

    Example: diptych doctor
    """
    result = run()
    if not json:
        print(report(result))
    finish(result, json, failed=not result["ok"])


if __name__ == "__main__":
    from diptych.cli import main

    main(["doctor", *sys.argv[1:]])
