"""What people look at while a run trains: a table of held-out samples after each validation, with their pictures.

`samples/step_00000100.json` holds the task's table, `samples/step_00000100.jpg` the pictures of its rows, or
`samples/step_00000100_<grid>.jpg` those that the task made; the driver copies them to MLflow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from diptych.trainers.task import Batch, Task

_COLUMNS, _GAP = 8, 2


def write_samples(folder: Path, step: int, task: Task, batch: Batch) -> None:
    """Write what `task` shows of `batch` after `step` steps; nothing if it shows nothing."""
    table = task.show(batch)
    if table is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    about = {"title": table.title, "step": step, "columns": table.columns, "rows": table.rows}
    (folder / f"step_{step:08d}.json").write_text(json.dumps(about, ensure_ascii=False, default=str))
    for grid in table.grids:
        write_grid(folder / f"step_{step:08d}_{grid.name}.jpg", grid.images, grid.columns)
    if not table.grids and "image" in batch:
        write_grid(folder / f"step_{step:08d}.jpg", batch["image"].cpu().numpy())


def write_grid(path: Path, images: np.ndarray, columns: int = _COLUMNS, gap: int = _GAP) -> None:
    """Write uint8 [B, H, W, 3] pictures as one, `columns` to a row, white between them."""
    from PIL import Image

    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + (index // columns) * (height + gap), gap + (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    Image.fromarray(sheet).save(path, quality=92)


def grid_boxes(size: tuple[int, int], count: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each of `count` pictures in a grid of `size` (width, height) that `write_grid` wrote."""
    rows = -(-count // _COLUMNS)
    width, height = (size[0] - _GAP) // _COLUMNS - _GAP, (size[1] - _GAP) // rows - _GAP
    places = [(_GAP + (index % _COLUMNS) * (width + _GAP), _GAP + (index // _COLUMNS) * (height + _GAP)) for index in range(count)]
    return [(left, top, left + width, top + height) for left, top in places]
