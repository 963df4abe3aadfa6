"""Self-contained HTML to look at samples: thumbnails inline, captions beside them, no script and no request to anywhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

import numpy as np

from diptych.batches import ImageNeed
from diptych.datasets import ranged
from diptych.datasets.images import BadImageError, decode_image
from diptych.datasets.manifest import Manifest
from diptych.datasets.survey import IMAGE_EXTENSIONS

SIDE = 160
"""Side of a thumbnail, in pixels."""
_CAPTION_CHARACTERS = 300
_STYLE = """
:root { color-scheme: light dark } body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } table { border-collapse: collapse }
td, th { border: 1px solid #8886; padding: .3em .6em; text-align: left; vertical-align: top } td.n { text-align: right }
.grid { display: grid; gap: 1em; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)) } figure { margin: 0; overflow-wrap: anywhere }
figcaption { font-size: 12px } img { background: #8883; max-width: 100% } .missing { background: #8883; height: 160px; padding: .5em }
.pair { display: flex; gap: 1em; margin: 1em 0 } .pair > * { flex: 0 0 220px } .bar { background: #4a7ab5; height: 1em; min-width: 1px }
"""


@dataclass(frozen=True)
class Thumbnail:
    """One sample to show."""

    name: str
    """Shard and key."""
    caption: str
    image: str
    """A data URL; empty where there is no picture."""
    reason: str
    """Why there is none."""

    def html(self, note: str = "") -> str:
        """A figure."""
        picture = f'<img src="{self.image}" alt="" loading="lazy">' if self.image else f'<div class="missing">{escape(self.reason)}</div>'
        caption = self.caption if len(self.caption) <= _CAPTION_CHARACTERS else self.caption[:_CAPTION_CHARACTERS] + "…"
        head = f"<b>{escape(note)}</b><br>" if note else ""
        return f"<figure>{picture}<figcaption>{head}{escape(caption)}<br><small>{escape(self.name)}</small></figcaption></figure>"


def thumbnails(manifest: Manifest, rows: np.ndarray, side: int = SIDE) -> list[Thumbnail]:
    """The samples of these manifest rows, each picture `side` × `side` with a white border."""
    rows = np.asarray(rows, np.int64)
    if not len(rows):
        return []
    facts = manifest.rows(rows, ["key", "caption"]).to_pylist()
    shards, offsets, sizes = manifest.members(rows, IMAGE_EXTENSIONS)
    need, drawn = ImageNeed(side, "pad"), np.zeros(4)
    found = []
    for fact, shard, offset, size in zip(facts, shards.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
        image, reason = "", "no picture"
        if offset >= 0:
            try:
                image = _data_url(decode_image(ranged.read_range(manifest.shard_url(shard), offset, size), need, drawn))
            except (BadImageError, OSError) as error:
                reason = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the file", str(error))  # Pillow names its own buffer
        found.append(Thumbnail(f"{manifest.shard_names[shard]}/{fact['key']}", fact["caption"] or "", image, reason))
    return found


def _data_url(pixels: np.ndarray) -> str:
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def page(title: str, sections: Sequence[tuple[str, str]]) -> bytes:
    """A whole page of (heading, HTML) sections."""
    body = "".join((f"<h2>{escape(heading)}</h2>" if heading else "") + html for heading, html in sections)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{_STYLE}</style>'
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head><body><h1>{escape(title)}</h1>{body}</body></html>\n'
    return text.encode("utf-8", "replace")


def grid(items: Sequence[str]) -> str:
    """Figures side by side."""
    return f'<div class="grid">{"".join(items)}</div>'


def pair(left: str, right: str, note: str) -> str:
    """Two figures and what is to be said of them."""
    return f'<div class="pair">{left}{right}<p>{escape(note)}</p></div>'


def facts_table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    return "<table>" + "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows) + "</table>"


def histogram(counts: Sequence[tuple[str, int]]) -> str:
    """Bars of counts by label."""
    most = max((count for _, count in counts), default=0) or 1
    lines = [
        f'<tr><td>{escape(label)}</td><td class="n">{count:,}</td><td style="width:24em"><div class="bar" style="width:{100 * count / most:.1f}%">'
        "</div></td></tr>"
        for label, count in counts
    ]
    return f"<table>{''.join(lines)}</table>"
