"""Web pages → a list of image URLs with captions, for `diptych ingest`: polite, and only what a site permits.

`robots.txt` of each host is honoured (and its `Crawl-delay`), pages that forbid indexing are passed over, and requests to
one host are at least `delay_seconds` apart. Only the pages given are read; links are not followed. The caption of an image is its
`figcaption`, else its alternative text, else its title.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
import urllib.robotparser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin, urlsplit

from diptych.batches import Fault

USER_AGENT = "diptych"
PAGE_BYTES = 16 << 20
"""Longest page that is read."""
_FORBIDDING = {"noindex", "noimageindex", "noai", "noimageai", "none"}


@dataclass(frozen=True)
class FoundImage:
    """One image of a page."""

    url: str
    caption: str
    """Empty where the page says nothing."""
    page: str


class _Images(HTMLParser):
    """Collects images with their captions. Source of the elements: the HTML standard, 4.4.12 and 4.8."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.base, self.page, self.forbidden = page, page, False
        self.found: list[tuple[str, str]] = []
        self._figures: list[tuple[int, str]] = []
        self._caption: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "base" and values.get("href"):
            self.base = urljoin(self.page, values["href"])
        elif tag == "meta" and values.get("name", "").lower() in ("robots", USER_AGENT):
            self.forbidden |= bool({part.strip().lower() for part in values.get("content", "").split(",")} & _FORBIDDING)
        elif tag == "figure":
            self._figures.append((len(self.found), ""))
        elif tag == "figcaption":
            self._caption = []
        elif tag == "img":
            source = _largest(values.get("srcset", "")) or values.get("data-src") or values.get("src") or ""
            if source and not source.startswith("data:"):
                caption = values.get("alt", "").strip() or values.get("title", "").strip()
                self.found.append((urldefrag(urljoin(self.base, source))[0], " ".join(caption.split())))

    def handle_endtag(self, tag: str) -> None:
        if tag == "figcaption" and self._caption is not None:
            text, self._caption = " ".join("".join(self._caption).split()), None
            if self._figures and text:
                self._figures[-1] = (self._figures[-1][0], text)
        elif tag == "figure" and self._figures:
            start, text = self._figures.pop()
            if text:
                self.found[start:] = [(url, text) for url, _ in self.found[start:]]

    def handle_data(self, data: str) -> None:
        if self._caption is not None:
            self._caption.append(data)


def _largest(srcset: str) -> str:
    """The candidate with the largest width or density."""
    best, best_size = "", -1.0
    for candidate in srcset.split(", "):
        url, _, descriptor = candidate.strip().partition(" ")
        digits = descriptor.strip().rstrip("wx,")
        size = float(digits) if digits.replace(".", "", 1).isdigit() else 1.0
        if url and size > best_size:
            best, best_size = url.rstrip(","), size
    return best


def images_of(html: str, page: str) -> list[FoundImage]:
    """Images of one page, each URL once; none if the page forbids indexing."""
    parser = _Images(page)
    parser.feed(html)
    parser.close()
    if parser.forbidden:
        return []
    unique: dict[str, str] = {}
    for url, caption in parser.found:
        if urlsplit(url).scheme in ("http", "https") and (url not in unique or not unique[url]):
            unique[url] = caption
    return [FoundImage(url, caption, page) for url, caption in unique.items()]


class _Host:
    """What one host permits, and when it was asked last."""

    def __init__(self, root: str, delay_seconds: float, timeout_seconds: float) -> None:
        self.asked = 0.0
        self._robots: urllib.robotparser.RobotFileParser | None = urllib.robotparser.RobotFileParser(f"{root}/robots.txt")
        self._default = True
        try:
            self._robots.parse(_get(f"{root}/robots.txt", timeout_seconds)[0].splitlines())
        except (OSError, ValueError) as error:
            # A host that refuses or fails to show its rules is left alone; one that has none permits (RFC 9309, 2.3.1).
            status = error.code if isinstance(error, urllib.error.HTTPError) else 500
            self._robots, self._default = None, 400 <= status < 500 and status not in (401, 403, 429)
        wanted = self._robots.crawl_delay(USER_AGENT) if self._robots else None
        self.delay_seconds = max(delay_seconds, float(wanted or 0))

    def permits(self, page: str) -> bool:
        """Whether the host's rules let us read the page."""
        return self._robots.can_fetch(USER_AGENT, page) if self._robots else self._default

    def wait(self) -> None:
        time.sleep(max(0.0, self.asked + self.delay_seconds - time.monotonic()))
        self.asked = time.monotonic()


def read_pages(
    pages: Sequence[str],
    delay_seconds: float = 1.0,
    timeout_seconds: float = 10.0,
    advance: Callable[[int], None] = lambda _pages: None,
) -> Iterator[FoundImage | Fault]:
    """Images of the pages in their order; a `Fault` for each page that is forbidden or cannot be read."""
    hosts: dict[str, _Host] = {}
    for page in pages:
        parts = urlsplit(page)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            yield Fault("", page, "bad_page", "not an http or https URL")
            continue
        root = f"{parts.scheme}://{parts.netloc}"
        if root not in hosts:
            hosts[root] = _Host(root, delay_seconds, timeout_seconds)
        host = hosts[root]
        if not host.permits(page):
            yield Fault("", page, "forbidden_page", f"{root}/robots.txt forbids it, or could not be read")
            continue
        host.wait()
        try:
            html, directives = _get(page, timeout_seconds)
        except (OSError, ValueError) as error:
            yield Fault("", page, "unreadable_page", str(error))
            continue
        if directives & _FORBIDDING:
            yield Fault("", page, "forbidden_page", f"its X-Robots-Tag header says {', '.join(sorted(directives))}")
            continue
        yield from images_of(html, page)
        advance(1)


def _get(url: str, timeout_seconds: float) -> tuple[str, set[str]]:
    """(text, directives of the `X-Robots-Tag` headers)."""
    # The scheme was checked by the caller, and urllib follows redirects to http, https and ftp only.
    request = urllib.request.Request(url, headers={"User-Agent": f"{USER_AGENT} (+https://diptych.readthedocs.io)"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:  # noqa: S310
        tags = answer.headers.get_all("X-Robots-Tag", [])
        data = answer.read(PAGE_BYTES)
        charset = answer.headers.get_content_charset() or "utf-8"
    directives = {part.strip().lower() for tag in tags for part in tag.rpartition(":")[2].split(",")}
    try:
        return data.decode(charset, "replace"), directives
    except LookupError:
        return data.decode("utf-8", "replace"), directives
