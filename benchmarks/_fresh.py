"""Measurements in processes of their own, with packages of peers that this environment lacks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def add_peers_option(parser: argparse.ArgumentParser) -> None:
    """`--peers FOLDER`."""
    parser.add_argument("--peers", type=Path, help="folder with packages of peers, searched before the environment")


def can_import(package: str, peers: Path | None) -> bool:
    """Whether a measurement will find `package`."""
    return importlib.util.find_spec(package) is not None or (peers is not None and (peers / package).is_dir())


def environment(peers: Path | None = None, threads: int = 1) -> dict[str, str]:
    """For a process that finds this checkout, and the packages of `peers` before those of the environment."""
    path = os.pathsep.join(filter(None, [str(peers.resolve()) if peers else "", str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": path}


def fresh(script: str, words: Sequence[str], peers: Path | None = None, threads: int = 1) -> dict[str, Any]:
    """The JSON that `script`, called with `words`, prints as its last line; ends this process where that one fails."""
    found = subprocess.run([sys.executable, script, *words], env=environment(peers, threads), capture_output=True, text=True, check=False)
    if found.returncode:
        sys.stderr.write(found.stderr[-4000:])
        raise SystemExit(f"{Path(script).name} {' '.join(words)} ended with {found.returncode}")
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result
