"""PyTorch's process group on the workers of Ray Train, with the end that a failed start needs.

Ray's own `TorchConfig` does the same on the workers, but importing it imports torch, 1.5 s of a processor, in the driver and in Ray's controller
too, one after the other, before the first worker starts. And where a worker or a node is lost while the group is formed, Ray 2.60 keeps the
placement group and the other workers of that start, so that every later one waits for room that is never freed; an error of a worker whose
peer went away ends the run, without another try.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.util import TrainingFramework

from diptych.pipelines.failures import explain

if TYPE_CHECKING:
    import torch

_SHUTDOWN_SECONDS = 30.0
"""Until workers that do not leave their group are ended with it."""


@dataclass
class ProcessGroupConfig(BackendConfig):
    """A start that fails gives back what it held, and is tried again under `cluster.controller_failures`."""

    backend: str = "gloo"
    """`gloo` or `nccl`."""
    timeout_s: int = 1800
    """Of a collective, in seconds."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Runs in Ray's controller."""
        return _Backend

    @property
    def framework(self) -> TrainingFramework:
        """What Ray's dashboard shows."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """What Ray's dashboard shows."""
        return asdict(self)


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Form the group; raises `WorkerGroupStartupFailedError`, which Ray tries again."""
        assert isinstance(backend_config, ProcessGroupConfig)
        try:
            address, port = worker_group.execute_single(0, get_address_and_port)
            joining = [
                worker_group.execute_single_async(rank, join, address, port, backend_config.backend, backend_config.timeout_s)
                for rank in range(len(worker_group))
            ]
            ray.get(joining)
        except (RayActorError, RayTaskError) as error:
            # Ray releases the workers and the placement group of a start that failed, if the group does not call itself started.
            worker_group._clear_state()
            raise WorkerGroupStartupFailedError(explain(error)) from error

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Leave the group."""
        try:
            ray.get(worker_group.execute_async(leave), timeout=_SHUTDOWN_SECONDS)
        except GetTimeoutError:
            return  # Ray ends the workers next, whatever they wait for.


def join(address: str, port: int, backend: str, timeout_s: int) -> None:
    """On a worker: the environment that torchrun would give it, its device, and its place in the group."""
    from datetime import timedelta

    import torch.distributed as dist

    context = ray.train.get_context()
    places = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
    }
    os.environ.update({name: str(value) for name, value in places.items()})
    if backend == "nccl":
        own_device(True)
        # A collective that fails ends the process instead of leaving it to wait.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def own_device(has_gpu: bool) -> torch.device:
    """On a worker: its GPU, made the current one of this thread, or the CPU."""
    import torch

    if not has_gpu:
        return torch.device("cpu")
    from ray.train.torch import get_device

    device: torch.device = get_device()
    torch.cuda.set_device(device)
    return device


def leave() -> None:
    """On a worker: take down what `join` made."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
