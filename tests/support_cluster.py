"""A real Ray of several nodes on this machine: own ports and folder, token authentication, nodes that come and are killed."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

MEGABYTES = 1 << 20


class NodesOfRay:
    """Raylets of a `ray.cluster_utils.Cluster`. This process joins no Ray; drivers are processes with `environment`."""

    def __init__(self, folder: str, token: str, head_cpus: int, dashboard: bool) -> None:
        from ray.cluster_utils import Cluster

        self.token, self.folder = token, Path(folder)
        head: dict[str, Any] = {"num_cpus": head_cpus, "temp_dir": folder, "object_store_memory": 200 * MEGABYTES}
        head |= {"include_dashboard": dashboard} | ({"dashboard_port": 0} if dashboard else {})
        self.cluster = Cluster(shutdown_at_exit=True)
        self._start(head)

    @property
    def environment(self) -> dict[str, str]:
        """What a driver needs to join: the address; the token is inherited."""
        return {"RAY_ADDRESS": str(self.cluster.address), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}

    @property
    def dashboard(self) -> str:
        """URL of the job server."""
        return f"http://{self.cluster.webui_url}"

    def owns(self, process: psutil.Process) -> bool:
        """Whether a process runs below one of these nodes; others may run a Ray on this machine too."""
        return str(process.environ().get("RAY_AUTH_TOKEN_PATH", "")) == self.token

    def add(self, cpus: int = 1) -> Any:
        """Start a node."""
        return self._start({"num_cpus": cpus, "object_store_memory": 150 * MEGABYTES})

    def _start(self, arguments: dict[str, Any]) -> Any:
        """Ray gives a node 30 s to start, which a loaded machine may not keep."""
        for attempt in range(4):
            try:
                return self.cluster.add_node(**arguments)
            except Exception as error:
                if attempt == 3 or "timed out during startup" not in str(error):
                    raise
        raise AssertionError

    def kill(self, node: Any) -> None:
        """SIGKILL a node's raylet and all that it started, as a machine that goes away."""
        raylets = [process.process.pid for processes in node.all_processes.values() for process in processes]
        below = [child for pid in raylets if psutil.pid_exists(pid) for child in psutil.Process(pid).children(recursive=True)]
        self.cluster.remove_node(node, allow_graceful=False)
        for process in below:
            if process.is_running():
                process.kill()


@contextmanager
def nodes_of_ray(monkeypatch: Any, head_cpus: int = 0, dashboard: bool = False) -> Iterator[NodesOfRay]:
    """A head with a token of its own; every process that is started below the test inherits the token."""
    # Sockets have short names only, so not below pytest's long folder.
    folder = tempfile.mkdtemp(prefix="dip-", dir="/tmp")
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    # A node of one CPU would keep one idle process, and start another for every read.
    monkeypatch.setenv("RAY_num_workers_soft_limit", "4")
    nodes = NodesOfRay(os.path.join(folder, "ray"), str(token), head_cpus, dashboard)
    try:
        yield nodes
    finally:
        nodes.cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
