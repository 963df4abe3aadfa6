"""A worker's share of one step as micro-batches on its device: pieces in order, or pieces of one shape each where pictures have buckets.

With buckets a worker runs as many passes as its samples need, which differs between workers and steps. Losses are sums over samples, divided
by the weight of the whole global batch, so that each sample counts the same however they were grouped, and nothing is dropped or moved to
another step.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

from diptych.batches import AspectBuckets
from diptych.trainers.task import Batch, Task

# Pixels are shared with read workers and never written to; see `to_device`.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)

Arrays = dict[str, np.ndarray]


def make_micro_batches(task: Task, arrays: Arrays, count: int, device: torch.device) -> list[Batch]:
    """The rows of `arrays` in `count` micro-batches, or more with buckets, none larger; on `device`, with the task's draws."""
    found = [to_device(part, device) for part in split(arrays, count, task.config.shape_buckets)]
    return [batch | task.draws(batch) for batch in found]


def split(arrays: Arrays, count: int, buckets: AspectBuckets | None = None) -> list[Arrays]:
    """`count` equal pieces along B, of which B is a multiple; with `buckets` pieces of at most that size, each of one shape and in it."""
    rows, rest = divmod(len(arrays["weight"]), count)
    assert rest == 0, (len(arrays["weight"]), count)
    if buckets is None:
        return [{key: array[start : start + rows] for key, array in arrays.items()} for start in range(0, rows * count, rows)]
    pieces = []
    for bucket in np.unique(arrays["bucket"]).tolist():
        places = np.flatnonzero(arrays["bucket"] == bucket)
        for start in range(0, len(places), rows):
            part = places[start : start + rows]
            pieces.append({key: in_shape(array[part], key, bucket, buckets) for key, array in arrays.items()})
    return pieces


def in_shape(rows: np.ndarray, key: str, bucket: int, buckets: AspectBuckets) -> np.ndarray:
    """`[B, …]` of the batch's `key` in the shape of `bucket`, from rows that are as long as the square's; see `AspectBuckets`."""
    tail = buckets.tail(key, bucket, rows.shape[1:])
    return rows.reshape(len(rows), -1)[:, : math.prod(tail)].reshape(len(rows), *tail)


def to_device(arrays: Arrays, device: torch.device) -> Batch:
    """Arrays of a share as tensors on `device`, through pinned memory where that is another one."""
    batch = {}
    for key, array in arrays.items():
        # A task may change its batch in place. Pixels it has to convert first, and they are most of the bytes, so these are not copied.
        array = np.ascontiguousarray(array) if array.dtype == np.uint8 else np.require(array, requirements=["C", "W"])
        tensor = torch.from_numpy(array)
        batch[key] = tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
    return batch
