"""With what code, packages and machines a run was made: logged with it, so that it can be made again. No variables of the environment."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

_CODE = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """`diptych, commit, code_digest, changed, python, platform, cpus, memory_bytes, packages` of this process."""
    from importlib.metadata import distributions

    import psutil

    packages = {str(found.metadata["Name"]): found.version for found in distributions() if found.metadata["Name"]}
    return {
        "diptych": packages.get("diptych", ""),
        "commit": commit(),
        "changed": changed(),
        "code_digest": code_digest(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def cluster() -> dict[str, Any]:
    """Ray's version and what each living node offers; Ray must be joined."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    offered = [{key: value for key, value in node.items() if not key.startswith("node:")} for node in nodes]
    return {"ray": ray.__version__, "resources": ray.cluster_resources(), "nodes": offered}


def commit() -> str:
    """Commit of the checkout that runs, or empty for an installed package or a job's copy of the folder."""
    return _git("rev-parse", "HEAD")


def changed() -> bool:
    """Whether that checkout's files differ from its commit."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over the package's modules by name: the code's identity where there is no commit, as in a job on a cluster."""
    digest = hashlib.sha256()
    for file in sorted(_CODE.rglob("*.py")):
        digest.update(str(file.relative_to(_CODE)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    folder = _CODE.parent
    if not (folder / ".git").exists():
        return ""
    try:
        answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()
