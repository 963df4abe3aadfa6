"""Generated captioned scenes: soft-shaded shapes on a pleasant ground, with a caption from a small grammar.

A scene is a pure function of (seed, index), and no two indices below `CAPTIONS` share a caption, so retrieval among any
held-out set has exactly one right answer. For the demo, tests and benchmarks; NumPy and Pillow only.

Grammar: `a <colour> <shape> <relation> <a|two|three> <colour> <shape>[s] on a <ground> background`, with `an` before a vowel.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 52),
    "orange": (246, 140, 36),
    "yellow": (250, 214, 50),
    "green": (52, 168, 83),
    "blue": (46, 108, 224),
    "purple": (134, 70, 190),
    "pink": (245, 128, 178),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
RELATIONS = ("above", "below", "left of", "right of")
COUNTS = {2: "two", 3: "three"}
"""One of the second object is `a` or `an`."""
GROUNDS: dict[str, tuple[int, int, int]] = {
    "cream": (250, 240, 220),
    "grey": (186, 190, 198),
    "mint": (200, 236, 214),
    "sky": (190, 222, 246),
    "dark": (44, 48, 62),
}
_KINDS = len(COLOURS) * len(SHAPES)
# One of each kind could be told from either side, so there the first is the upper or left one: a picture has one caption.
_ARRANGEMENTS = [(relation, 1) for relation in ("above", "left of")] + [(relation, count) for relation in RELATIONS for count in COUNTS]
CAPTIONS = _KINDS * (_KINDS - 1) * len(_ARRANGEMENTS) * len(GROUNDS)
"""Different captions of the grammar: 86,100."""
_SUPERSAMPLE = 2
Placed = tuple[tuple[float, float, float], tuple[str, str]]
"""((x, y, diameter) in shares of the side, (colour, shape)) of an object."""
_FIRST = re.compile(rf"\ban? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


@dataclass(frozen=True)
class Scene:
    """What one picture shows; `caption` says it in words."""

    first: tuple[str, str]
    """Colour and shape of the first object."""
    relation: str
    count: int
    """How many of the second object there are."""
    second: tuple[str, str]
    ground: str

    @property
    def caption(self) -> str:
        """One sentence of the grammar."""
        noun = self.second[1] + ("s" if self.count > 1 else "")
        count = COUNTS.get(self.count) or _article(self.second[0])
        objects = f"{_article(self.first[0])} {' '.join(self.first)} {self.relation} {count} {self.second[0]} {noun}"
        return f"{objects} on a {self.ground} background"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def parse_first_object(caption: str) -> tuple[str, str] | None:
    """(colour, shape) of the first object that `caption` names, or None if it names none."""
    found = _FIRST.search(caption.lower())
    return (found[1], found[2]) if found else None


@functools.lru_cache(maxsize=4)
def _order(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(CAPTIONS)


def describe(seed: int, index: int) -> Scene:
    """The scene of `index`, without drawing it. Indices from `CAPTIONS` on repeat captions with other positions."""
    code = int(_order(seed)[index % CAPTIONS])
    code, ground = divmod(code, len(GROUNDS))
    code, arrangement = divmod(code, len(_ARRANGEMENTS))
    first, second = divmod(code, _KINDS - 1)
    # The second kind is one of the others, so that the sentence always tells two kinds of object apart.
    second += second >= first
    relation, count = _ARRANGEMENTS[arrangement]
    return Scene(_kind(first), relation, count, _kind(second), list(GROUNDS)[ground])


def _kind(code: int) -> tuple[str, str]:
    return list(COLOURS)[code // len(SHAPES)], SHAPES[code % len(SHAPES)]


def render(seed: int, index: int, size: int = 128) -> tuple[Image.Image, str]:
    """The picture of `index` (RGB, `size` × `size` pixels) and its caption."""
    scene = describe(seed, index)
    return compose(scene.ground, functools.partial(_places, scene), np.random.default_rng((seed, index)), size), scene.caption


def compose(ground: str, places: Callable[[np.random.Generator], list[Placed]], rng: np.random.Generator, size: int = 128) -> Image.Image:
    """The picture (RGB, `size` × `size` pixels) of the objects that `places` puts, by what it draws from `rng`, on a ground of `GROUNDS`."""
    canvas = _ground(ground, size * _SUPERSAMPLE, rng)
    for place, (colour, shape) in places(rng):
        _draw(canvas, place, colour, shape, rng)
    return canvas.reduce(_SUPERSAMPLE)


def samples(seed: int, start: int, stop: int, size: int = 128) -> Iterator[dict[str, Any]]:
    """Scenes `start` to `stop` as `shards.ShardWriter` takes them: `jpg`, `txt`, and what they show as `json`."""
    for index in range(start, stop):
        image, caption = render(seed, index, size)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=92)
        scene = describe(seed, index)
        facts = {
            "colour": scene.first[0],
            "shape": scene.first[1],
            "relation": scene.relation,
            "count": scene.count,
            "ground": scene.ground,
        }
        yield {"jpg": data.getvalue(), "txt": caption, "json": facts | {"scene": index}}


def _ground(name: str, side: int, rng: np.random.Generator) -> Image.Image:
    """A gradient with a soft light in one upper corner."""
    light = (rng.uniform(0.1, 0.9), rng.uniform(-0.1, 0.3))
    y, x = np.mgrid[0:8, 0:8] / 7.0
    shade = 1.05 - 0.22 * np.hypot(x - light[0], y - light[1])
    pixels = np.clip(np.array(GROUNDS[name]) * shade[..., None], 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def _places(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """The relation decides which half each kind takes."""
    along = rng.uniform(-0.14, 0.14)
    near = rng.uniform(0.25, 0.28)
    diameter = {1: 0.45, 2: 0.4, 3: 0.31}[scene.count]
    pitch = {1: 0.0, 2: 0.44, 3: 0.32}[scene.count]
    spots = [(0.5 + along, near, 0.45, scene.first)]
    for number in range(scene.count):
        offset = (number - (scene.count - 1) / 2) * pitch + (rng.uniform(-0.12, 0.12) if scene.count == 1 else 0.0)
        spots.append((0.5 + offset, 0.74 + rng.uniform(-0.02, 0.02), diameter, scene.second))
    placed = []
    for across, depth, width, kind in spots:
        # Laid out as "first above the others"; the other relations mirror and turn that.
        depth = depth if scene.relation in ("above", "left of") else 1 - depth
        x, y = (across, depth) if scene.relation in ("above", "below") else (depth, across)
        placed.append(((x, y, width * rng.uniform(0.9, 1.0)), kind))
    return placed


@functools.lru_cache(maxsize=64)
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners in the unit disc; curved shapes as fine polygons."""
    if shape == "square":
        return tuple((0.82 * x, 0.82 * y) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1)))
    if shape == "triangle":
        return tuple((math.sin(t), 0.14 - math.cos(t)) for t in (0.0, 2 * math.pi / 3, 4 * math.pi / 3))
    if shape == "star":
        return tuple(((1.0, 0.42)[k % 2] * math.sin(math.pi * k / 5), -(1.0, 0.42)[k % 2] * math.cos(math.pi * k / 5)) for k in range(10))
    turns = [2 * math.pi * k / 48 for k in range(48)]
    if shape == "heart":
        height = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in turns]
        return tuple((math.sin(t) ** 3, -h / 16.0) for t, h in zip(turns, height, strict=True))
    return tuple((0.95 * math.cos(t), 0.95 * math.sin(t)) for t in turns)


def _draw(canvas: Image.Image, place: tuple[float, float, float], colour: str, shape: str, rng: np.random.Generator) -> None:
    """One object with its shadow, shaded from the upper left."""
    side = canvas.width
    radius = place[2] * side / 2
    extent = int(radius * 1.5) * 2
    centre = extent / 2
    turn = rng.uniform(-0.2, 0.2)
    cosine, sine = math.cos(turn) * radius, math.sin(turn) * radius
    mask = Image.new("L", (extent, extent))
    pen = ImageDraw.Draw(mask)
    pen.polygon([(centre + x * cosine - y * sine, centre + x * sine + y * cosine) for x, y in _outline(shape)], fill=255)
    if shape == "ring":
        hole = 0.48 * radius
        pen.ellipse((centre - hole, centre - hole, centre + hole, centre + hole), fill=0)
    corner = (int(place[0] * side - centre), int(place[1] * side - centre))
    shadow = mask.filter(ImageFilter.BoxBlur(radius * 0.12)).point(lambda value: value * 0.38)
    shift = int(radius * 0.14)
    canvas.paste((18, 20, 30), (corner[0] + shift, corner[1] + shift), shadow)
    canvas.paste(_paint(colour, extent), corner, mask)


@functools.lru_cache(maxsize=256)
def _paint(colour: str, extent: int) -> Image.Image:
    """A tile of the colour, lighter towards the upper left."""
    y, x = np.mgrid[-1:1:9j, -1:1:9j]
    light = 1.1 - 0.16 * (x + y) - 0.1 * (x**2 + y**2)
    base = np.array(COLOURS[colour], float)
    pixels = np.clip(base * light[..., None] + 70 * np.clip(light[..., None] - 1.12, 0, None), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((extent, extent), Image.Resampling.BICUBIC)
