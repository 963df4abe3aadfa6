"""A real Ray of several nodes on this machine: own ports and folder, token authentication, nodes that come and are killed."""

from __future__ import annotations

import atexit
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

MEGABYTES = 1 << 20


def ray_variables() -> dict[str, str]:
    """For a process that starts a Ray, before it imports one: it reads these once and keeps the token that it has seen first.

    A token of its own, so that neither that of the user is used nor one is left in their home; and nodes that may start slowly.
    """
    folder = tempfile.mkdtemp(prefix="dip-token-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A node that is not up after 30 s, which a loaded machine takes, would else be given up.
        "RAY_raylet_start_wait_time_s": "180",
    }


class NodesOfRay:
    """Raylets of a `ray.cluster_utils.Cluster`. This process joins no Ray; drivers are processes with `environment`."""

    def __init__(self, folder: str, head_cpus: int, dashboard: bool) -> None:
        from ray.cluster_utils import Cluster

        self.folder = Path(folder)
        self._started = 0
        head: dict[str, Any] = {"num_cpus": head_cpus, "temp_dir": self._folder_of_node(), "object_store_memory": 200 * MEGABYTES}
        head |= {"include_dashboard": dashboard} | ({"dashboard_port": 0} if dashboard else {})
        self.cluster = Cluster(shutdown_at_exit=True)
        self.cluster.add_node(**head)

    @property
    def environment(self) -> dict[str, str]:
        """What a driver needs to join: the address; the token is inherited."""
        return {"RAY_ADDRESS": str(self.cluster.address), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}

    @property
    def dashboard(self) -> str:
        """URL of the job server."""
        return f"http://{self.cluster.webui_url}"

    def owns(self, process: psutil.Process) -> bool:
        """Whether a process runs below one of these nodes; others may run a Ray on this machine too.

        By its parents: Ray's title of a process overwrites the environment that the system shows of it.
        """
        ours = {started.process.pid for node in self.cluster.list_all_nodes() for started in _processes(node)}
        return any(parent.pid in ours for parent in process.parents())

    def add(self, cpus: int = 1) -> Any:
        """Start a node."""
        return self.cluster.add_node(num_cpus=cpus, object_store_memory=150 * MEGABYTES, temp_dir=self._folder_of_node())

    def _folder_of_node(self) -> str:
        """As on machines of their own: in a shared one, a node that unpacks a job's folder removes it below the job of another node."""
        self._started += 1
        return str(self.folder / str(self._started))

    def kill(self, node: Any) -> None:
        """SIGKILL a node's raylet and all that it started, as a machine that goes away."""
        pids = [started.process.pid for started in _processes(node)]
        below = [child for pid in pids if psutil.pid_exists(pid) for child in psutil.Process(pid).children(recursive=True)]
        self.cluster.remove_node(node, allow_graceful=False)
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _processes(node: Any) -> list[Any]:
    """What Ray started for a node: its raylet and helpers."""
    return [started for kind in node.all_processes.values() for started in kind]


@contextmanager
def nodes_of_ray(monkeypatch: Any, head_cpus: int = 0, dashboard: bool = False) -> Iterator[NodesOfRay]:
    """A head of its own, in a process with `ray_variables`; every process that is started below inherits the token."""
    # Sockets have short names only, so not below pytest's long folder.
    folder = tempfile.mkdtemp(prefix="dip-", dir="/tmp")
    # A node of one CPU would keep one idle process, and start another for every read.
    monkeypatch.setenv("RAY_num_workers_soft_limit", "4")
    nodes = NodesOfRay(folder, head_cpus, dashboard)
    try:
        yield nodes
    finally:
        nodes.cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
