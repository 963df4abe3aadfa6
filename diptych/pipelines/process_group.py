"""Ray Train's set-up of PyTorch's process group, with the end that a failed one needs.

Where a worker or a node is lost while the group is formed, Ray 2.60 keeps the placement group and the other workers of that start: every
later one waits for room that is never freed. And an error of a worker whose peer went away ends the run, without another try.
"""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from diptych.pipelines.failures import explain


class ProcessGroupConfig(TorchConfig):
    """`TorchConfig` whose failed start gives back what it held, and is tried again under `cluster.controller_failures`."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Runs in Ray's controller."""
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Form the group; raises `WorkerGroupStartupFailedError`, which Ray tries again."""
        try:
            super().on_start(worker_group, backend_config)
        except (RayActorError, RayTaskError) as error:
            # Ray releases the workers and the placement group of a start that failed, if the group does not call itself started.
            worker_group._clear_state()
            raise WorkerGroupStartupFailedError(explain(error)) from error
