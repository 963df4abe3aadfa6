"""What a painting process does: open the painter once, paint parts of the work, write files or whole shards.

A part that is written as a shard is done or not there at all, so a call that was killed goes on with what is missing. A picture that
cannot be made (NaN) is a fault of its own; the others of its batch are painted without it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diptych.config import ConfigError

if TYPE_CHECKING:
    from diptych.trainers.clip_embedder import Embedder
    from diptych.trainers.pictures import Painter, PictureRequest, PictureSettings

_JPEG_QUALITY = 95


@dataclass(frozen=True)
class PictureJob:
    """One picture of a call."""

    number: int
    """Of its prompt."""
    prompt: str
    sample: int
    """Of the prompt's pictures."""
    seed: int


@dataclass(frozen=True)
class Part:
    """Pictures that are written together."""

    number: int
    """Of the shard, where shards are written."""
    jobs: tuple[PictureJob, ...]

    def row(self) -> dict[str, Any]:
        """As a row of Ray Data."""
        return {"number": self.number, "jobs": json.dumps([asdict(job) for job in self.jobs])}

    @classmethod
    def of(cls, row: dict[str, Any]) -> Part:
        """What `row` wrote."""
        return cls(int(row["number"]), tuple(PictureJob(**job) for job in json.loads(row["jobs"])))


@dataclass(frozen=True)
class PaintSpec:
    """What every painting process needs to know; small and picklable."""

    make: Callable[[], Painter]
    """Opens the models, in the process that calls it."""
    settings: PictureSettings
    out: str
    """Folder of the files or of the shards."""
    samples_per_shard: int = 0
    """0 = files."""
    batch_size: int = 8
    """Pictures painted together."""
    image: bytes = b""
    """A picture to vary or to paint into, as a file's bytes."""
    mask: bytes = b""
    """What of it to keep, as a file's bytes; of the picture's own size."""
    invert_mask: bool = False
    """White is painted anew and black kept, as in diffusers."""
    negative_prompt: str = ""
    score: Callable[[], Embedder] | None = None
    """Opens the CLIP that scores each picture."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the metadata of each picture says besides: run, checkpoint, settings."""


class Painted(NamedTuple):
    """A picture, or why there is none."""

    about: dict[str, Any]
    image: np.ndarray | None
    """uint8 [H, W, 3]."""
    fault: str


def read_source(
    image: bytes, mask: bytes, shape: tuple[int, int], *, invert: bool = False
) -> tuple[np.ndarray | None, np.ndarray | None]:  # fmt: skip
    """A picture's and a mask's files → uint8 [H, W, 3] and bool [H, W] of `shape`, True = keep; None where there is no file.

    White keeps and black is painted anew, or the other way round with `invert`. Both are made to cover `shape` and cropped alike.
    Raises `ConfigError` for a file that is no picture, and for a mask of another size than its picture.
    """
    if not image:
        if mask:
            raise ConfigError("--mask", "a mask alone", "a mask beside --init-image", "It says what of that picture to keep.")
        return None, None
    picture = _decode(image, "--init-image", shape)
    if not mask:
        return picture, None
    (width, height), (mask_width, mask_height) = _size(image, "--init-image"), _size(mask, "--mask")
    if (width, height) != (mask_width, mask_height):
        received = f"{mask_width} × {mask_height} pixels"
        raise ConfigError("--mask", received, f"{width} × {height}, the size of the picture", "Draw the mask on the picture itself.")
    keep = _decode(mask, "--mask", shape).max(axis=2) >= 128
    return picture, ~keep if invert else keep


def _decode(data: bytes, key: str, shape: tuple[int, int]) -> np.ndarray:
    from diptych.batches import ImageNeed
    from diptych.datasets.images import BadImageError
    from diptych.pipelines.generate_from_images import decode_alone

    try:
        return decode_alone(data, ImageNeed.of_shape(*shape))
    except BadImageError as error:
        raise ConfigError(key, "a file that cannot be decoded", "a picture (JPEG, PNG, WebP)", str(error)) from error


def _size(data: bytes, key: str) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return picture.size
    except UnidentifiedImageError as error:
        raise ConfigError(key, "a file that cannot be decoded", "a picture (JPEG, PNG, WebP)") from error


class PaintWorker:
    """A painter with its way of writing; made once in each process of a pool."""

    def __init__(self, spec: PaintSpec) -> None:
        """Raises `ConfigError` for models or inputs that do not fit."""
        self.spec = spec
        self.painter = spec.make()
        self.embedder = spec.score() if spec.score is not None else None
        shape = spec.settings.shape(self.painter.size)
        self.image, self.mask = read_source(spec.image, spec.mask, shape, invert=spec.invert_mask)

    def write(self, part: Part, advance: Callable[[int], None] | None = None) -> list[dict[str, Any]]:
        """Paint and write one part; what is to be said of each picture, with `file` and `fault`."""
        if self.spec.samples_per_shard:
            return self._write_shard(part, advance)
        from diptych.trainers.picture_files import save_picture

        rows = []
        for one in self.paint(part.jobs, advance):
            path = "" if one.image is None else str(save_picture(Path(self.spec.out), one.image, one.about))
            rows.append(one.about | {"file": path, "fault": one.fault})
        return rows

    def _write_shard(self, part: Part, advance: Callable[[int], None] | None) -> list[dict[str, Any]]:
        from diptych.datasets.shards import ShardWriter, sample_key, shard_name

        size, rows = self.spec.samples_per_shard, []
        writer = ShardWriter(self.spec.out, size)

        def samples() -> Iterator[dict[str, Any]]:
            for index, one in enumerate(self.paint(part.jobs, advance)):
                place = f"{shard_name(part.number)}.tar/{sample_key(part.number, index, size)}"
                rows.append(one.about | {"file": place, "fault": one.fault})
                if one.image is None:
                    yield {"txt": one.about["prompt"], "json": one.about, "status": "failed_to_download", "error_message": one.fault}
                else:
                    yield {"jpg": _jpeg(one.image), "txt": one.about["prompt"], "json": one.about}

        writer.write_shard(part.number, samples())
        return rows

    def paint(self, jobs: Sequence[PictureJob], advance: Callable[[int], None] | None = None) -> Iterator[Painted]:
        """The pictures of `jobs`, in order, a batch at a time."""
        from diptych.trainers.picture_metrics import prompt_scores
        from diptych.trainers.pictures import PictureRequest

        for start in range(0, len(jobs), self.spec.batch_size):
            part = jobs[start : start + self.spec.batch_size]
            requests = [PictureRequest(job.prompt, job.seed, self.image, self.mask, self.spec.negative_prompt) for job in part]
            made = self._attempt(requests)
            scores = prompt_scores(self.embedder, [image for image, _ in made], [job.prompt for job in part])
            for job, (image, fault), score in zip(part, made, scores, strict=True):
                about = asdict(job) | self.spec.about | ({} if score is None else {"clip_score": round(score, 3)})
                yield Painted(about, image, fault)
            if advance is not None:
                advance(len(part))

    def _attempt(self, requests: list[PictureRequest]) -> list[tuple[np.ndarray | None, str]]:
        """Each request's picture, or the reason why there is none."""
        from diptych.trainers.pictures import PaintError

        try:
            return [(image, "") for image in self.painter.paint(requests, self.spec.settings)]
        except PaintError as error:
            if len(requests) == 1:
                return [(None, str(error))]
            return [made for request in requests for made in self._attempt([request])]


class PooledPainter:
    """A `PaintWorker` in a pool of Ray Data, which hands on what is refused as a row: Ray would bury it among tracebacks."""

    def __init__(self, spec: PaintSpec) -> None:
        self.worker: PaintWorker | None = None
        self.refusal: ConfigError | None = None
        try:
            self.worker = PaintWorker(spec)
        except ConfigError as error:
            self.refusal = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Paint and write one part; a row of Ray Data in and out, with `refused` where there is a `ConfigError`."""
        part, rows = Part.of(row), []
        try:
            if self.refusal is not None:
                raise self.refusal
            assert self.worker is not None
            rows = self.worker.write(part)
        except ConfigError as error:
            refused = json.dumps([error.key, str(error.received), error.allowed, error.remedy])
            return {"number": part.number, "rows": "[]", "refused": refused}
        return {"number": part.number, "rows": json.dumps(rows, default=str), "refused": ""}


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()
