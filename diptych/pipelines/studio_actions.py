"""What the studio's buttons do: read the form, ask the models, keep each picture with its settings, and say what went wrong."""

from __future__ import annotations

import functools
import io
import secrets
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from diptych.config import ConfigError
from diptych.datasets.images import BadImageError
from diptych.pipelines.paint_worker import read_source
from diptych.pipelines.studio_models import Engine, PainterFacts
from diptych.trainers.picture_files import read_about, read_metadata, save_picture
from diptych.trainers.pictures import PaintError, PictureRequest, PictureSettings

MOST_PROMPTS, MOST_SAMPLES = 8, 6
_SEEDS = 2**31
Shown = list[tuple[str, str]]
"""Files with what stands below them."""


def said(action: Callable[..., Any]) -> Callable[..., Any]:
    """`action` with what a person can mend shown as a message on the page instead of a traceback."""

    def tell(error: Exception) -> gr.Error:
        text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        return gr.Error(text, duration=30, title="This did not work", print_exception=False)

    @functools.wraps(action)
    def streamed(*arguments: Any) -> Iterator[Any]:
        try:
            yield from action(*arguments)
        except (ConfigError, PaintError, BadImageError, ValueError, OSError) as error:
            raise tell(error) from error

    return streamed


@dataclass
class PaintForm:
    """The fields that all painting tabs share, as they stand in the form."""

    samples: int
    steps: int
    sampler: str
    seed: int
    """-1 = a new one each time."""
    guidance: tuple[float, ...]
    strength: float = 0.8

    def settings(self) -> PictureSettings:
        """As the painter takes them. Raises `ConfigError` for what is out of range."""
        return PictureSettings(steps=self.steps, sampler=self.sampler, guidance=self.guidance, strength=self.strength)

    def first_seed(self) -> int:
        """The seed of the first picture."""
        if self.seed < -1:
            raise ConfigError("Seed", self.seed, "a whole number from 0, or -1 for a new one each time")
        return secrets.randbelow(_SEEDS) if self.seed == -1 else self.seed


class Actions:
    """The buttons, on one engine and one folder of pictures. Holds nothing of any user."""

    def __init__(self, engine: Engine, facts: PainterFacts | None, folder: Path, model: str) -> None:
        self.engine, self.facts, self.folder, self.model = engine, facts, folder, model

    def write(self, prompt: str, keywords: int, strategy: str, seed: int) -> Iterator[tuple[str, str]]:
        """(completed prompt, what to say of it)."""
        if not prompt.strip():
            raise ConfigError("Prompt", "nothing", "the beginning of a prompt", "Example: a castle on a hill,")
        chosen = secrets.randbelow(_SEEDS) if seed == -1 else int(seed)
        text = self.engine.complete(prompt, int(keywords), strategy, chosen)
        yield text, f"{text.count(',') + 1} keywords, {strategy}, seed {chosen}"

    def dream(self, prompts: str, form: PaintForm) -> Iterator[tuple[Shown, str]]:
        """Pictures of each line of `prompts`, as they are made."""
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not 1 <= len(lines) <= MOST_PROMPTS:
            raise ConfigError("Prompts", len(lines), f"1 to {MOST_PROMPTS} lines", "Write what the picture shows, one prompt a line.")
        groups = [[PictureRequest(line) for _ in range(form.samples)] for line in lines]
        yield from self._paint(groups, form)

    def vary(self, image: bytes, prompt: str, form: PaintForm) -> Iterator[tuple[Shown, str]]:
        """Variations of a picture's file."""
        if not image:
            raise ConfigError("Picture", "nothing", "a picture", "Drop one into the field, or choose a file.")
        source, _ = read_source(image, b"", self._shape())
        yield from self._paint([[PictureRequest(prompt.strip(), image=source)] for _ in range(form.samples)], form)

    def inpaint(self, drawn: dict[str, Any] | None, prompt: str, form: PaintForm) -> Iterator[tuple[Shown, str]]:
        """Paint anew what was drawn over; `drawn` is an image editor's value."""
        background = (drawn or {}).get("background")
        if drawn is None or background is None:
            raise ConfigError("Picture", "nothing", "a picture", "Drop one into the field, then draw over what is to be painted anew.")
        keep = np.ones(background.shape[:2], np.uint8) * 255
        for layer in drawn["layers"]:
            keep[layer[..., 3] > 0] = 0
        if keep.all():
            raise ConfigError("Mask", "nothing drawn", "something drawn over the picture", "Draw over what is to be painted anew.")
        source, mask = read_source(png_of(background[..., :3]), png_of(keep), self._shape())
        yield from self._paint([[PictureRequest(prompt.strip(), image=source, mask=mask)] for _ in range(form.samples)], form)

    def read(self, image: bytes, count: int, captioner: bool, prompter: bool) -> Iterator[tuple[str, list[list[Any]]]]:
        """(caption, rows of prompt and cosine) for a picture's file."""
        if not image:
            raise ConfigError("Picture", "nothing", "a picture", "Drop one into the field, or choose a file.")
        caption = self.engine.caption(image) if captioner else ""
        yield caption, []
        if prompter:
            yield caption, [[text, round(cosine, 3)] for text, cosine in self.engine.nearest(image, int(count))]

    def shown(self) -> Shown:
        """The newest pictures of the folder, newest first."""
        lines = read_metadata(self.folder)[-200:][::-1]
        return [(str(self.folder / line["file_name"]), below(line)) for line in lines if (self.folder / line["file_name"]).is_file()]

    def about(self, path: str) -> dict[str, Any]:
        """What a picture says of itself."""
        return read_about(Path(path))

    def archive(self) -> str:
        """A zip of all pictures with their metadata, for download."""
        path = self.folder / "pictures.zip"
        temporary = path.with_suffix(f".{secrets.token_hex(4)}.part")
        with zipfile.ZipFile(temporary, "w") as file:
            for each in sorted([*self.folder.glob("*.png"), self.folder / "metadata.jsonl"]):
                if each.is_file():
                    file.write(each, each.name)
        temporary.replace(path)
        return str(path)

    def _shape(self) -> tuple[int, int]:
        assert self.facts is not None
        return self.facts.size, self.facts.size

    def _paint(self, groups: Sequence[Sequence[PictureRequest]], form: PaintForm) -> Iterator[tuple[Shown, str]]:
        """Paint group by group; what is there so far after each, so that the page fills and a cancel loses little."""
        settings, seed, total = form.settings(), form.first_seed(), sum(map(len, groups))
        about = {"model": self.model, "seed": seed} | settings.model_dump(exclude_defaults=True)
        found: Shown = []
        started, number = time.monotonic(), 0
        yield found, f"0 of {total} pictures, seed {seed}"
        for group in groups:
            requests = [
                PictureRequest(each.prompt, seed + number + index, each.image, each.mask, each.negative_prompt)
                for index, each in enumerate(group)
            ]
            images, scores = self.engine.paint(requests, settings)
            for request, image, score in zip(requests, images, scores, strict=True):
                line = about | {"number": int(time.time()) % 100_000, "prompt": request.prompt, "mode": request.mode, "seed": request.seed}
                line |= {} if score is None else {"clip_score": round(score, 2)}
                found = [*found, (str(save_picture(self.folder, image, line)), below(line))]
            number += len(group)
            seconds = time.monotonic() - started
            left = f", {seconds / number * (total - number):.0f} s left" if number < total else f" in {seconds:.1f} s"
            yield found, f"{number} of {total} pictures{left}, seeds from {seed}"


def below(line: dict[str, Any]) -> str:
    """What stands below a picture."""
    score = f" · CLIP {line['clip_score']:.1f}" if "clip_score" in line else ""
    return f"{line.get('prompt') or line.get('mode', '')} · seed {line.get('seed')}{score}"


def png_of(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] or [H, W] as a PNG's bytes."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
