"""URL lists → the rows of each shard, as img2dataset's own reader cuts them: csv, tsv, json, jsonl, parquet, txt, `.gz` too.

A list is one file or a folder of files of one format, local or remote. Shards are numbered through the files in the
order of their names, so the same list always gives the same shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diptych.config import ConfigError
from diptych.datasets import folders, storage
from diptych.datasets.ingest import IngestOptions, ShardJob

FORMATS = ("parquet", "csv", "tsv", "jsonl", "json", "txt", "csv.gz", "tsv.gz", "jsonl.gz", "json.gz", "txt.gz")
URL_COLUMNS = ("url", "URL", "image_url", "image_urls", "img_url", "link")
CAPTION_COLUMNS = ("caption", "TEXT", "text", "captions", "prompt", "title", "alt")
_RESERVED = ("key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message", "exif")
_HEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class UrlList:
    """A list whose format and columns are known."""

    location: str
    """One file, or a folder of files of one format; absolute."""
    format: str
    files: tuple[str, ...]
    url_column: str
    caption_column: str
    """Empty = no captions."""

    @classmethod
    def open(cls, location: str, options: IngestOptions, scratch: str) -> UrlList:
        """Find out format and columns. A list on a web server is copied to the local folder `scratch` first.

        Raises `ConfigError` where there is no list, its format is unknown, or a column is missing.
        """
        location = storage.absolute(location)
        if location.startswith(("http://", "https://")):
            location = _fetch(location, scratch)
        files = _files(location)
        kind = _format_of(files[0])
        odd = [file for file in files if not file.endswith(f".{kind}")]
        assert not odd, odd
        columns = _columns_of(files[0], kind)
        url = _choose("url_column", options.url_column, URL_COLUMNS, columns)
        wants_caption = options.caption_column not in ("", "none")
        if wants_caption:
            caption = _choose("caption_column", options.caption_column, CAPTION_COLUMNS, columns)
        else:
            caption = "" if options.caption_column == "none" else next((name for name in CAPTION_COLUMNS if name in columns), "")
        for name in (*options.save_columns, *([options.verify_hash_column] if options.verify_hash_column else [])):
            if name not in columns:
                raise ConfigError("save_columns", name, f"columns of {files[0]}: {', '.join(columns)}")
        reserved = sorted(set(options.save_columns) & set(_RESERVED) | set(options.save_columns) & {url, caption})
        if reserved:
            raise ConfigError("save_columns", ", ".join(reserved), "columns that img2dataset does not write itself")
        return cls(location, kind, tuple(files), url, caption)

    def fingerprint(self, options: IngestOptions) -> dict[str, Any]:
        """What decides which sample stands where: files, columns, options that change the stored bytes."""
        facts = [
            (url.rpartition("/")[2], found.size if found else -1)
            for url, found in zip(self.files, storage.stat_many(self.files), strict=True)
        ]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        transport = {"timeout_seconds", "retries", "threads"}
        kept = options.model_dump(mode="json", exclude=transport)
        return {"list": digest, "url_column": self.url_column, "caption_column": self.caption_column, **kept}

    def jobs(self, out: str, options: IngestOptions, skip: set[int], retry: bool = False) -> Iterator[ShardJob]:
        """A job for every shard that is not in `skip`; its rows are written to `out`/_tmp as it comes up."""
        from img2dataset.reader import Reader

        temporary = storage.join(out, "_tmp")
        folders.make_folder(temporary)
        reader = Reader(
            self.location, self.format, self.url_column, self.caption_column or None, options.verify_hash_column or None,
            options.compute_hash if options.verify_hash_column else None, list(options.save_columns) or None,
            options.samples_per_shard, skip, temporary,
        )  # fmt: skip
        rows = iter(reader)
        while True:
            with _quiet():
                found = _next(rows, self.files[0])
            if found is None:
                return
            yield ShardJob(found[0], found[1], out, tuple(reader.column_list), options, retry)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """img2dataset tells its progress on standard output, which belongs to `--json`."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _next(rows: Iterator[tuple[int, str]], file: str) -> tuple[int, str] | None:
    try:
        return next(rows, None)
    except (pa.ArrowException, KeyError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError("URLS", file, f"one of {', '.join(FORMATS)}", f"It cannot be read: {error}") from None


def _files(location: str) -> list[str]:
    if any(location.endswith(f".{kind}") for kind in FORMATS) and not (storage.is_local(location) and os.path.isdir(location)):
        if not storage.exists(location):
            raise ConfigError("URLS", location, "a list of URLs that exists", "Check the path.")
        return [location]
    for kind in FORMATS:
        found = folders.list_files(location, f".{kind}")
        if found:
            return found
    raise ConfigError(
        "URLS", location, f"a file, or a folder of files, of {', '.join(FORMATS)}", "`diptych ingest --list-sets` shows known sets."
    )


def _format_of(file: str) -> str:
    return max((kind for kind in FORMATS if file.endswith(f".{kind}")), key=len)


def _columns_of(file: str, kind: str) -> list[str]:
    if kind.startswith("txt"):
        return ["url"]
    compression = "gzip" if kind.endswith(".gz") else None
    try:
        if kind == "parquet":
            with folders.open_input(file) as stream:
                return list(pq.read_schema(stream).names)
        fs, path = storage.file_system(file)
        with fs.open(path, "rb", compression=compression) as stream:
            if kind.startswith("json") and not kind.startswith("jsonl"):
                import pandas as pd

                return [str(name) for name in pd.read_json(stream).columns]
            head = stream.read(_HEAD_BYTES).decode("utf-8-sig", "replace")
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ConfigError("URLS", file, f"a readable {kind} file", str(error)) from None
    line = head.partition("\n")[0]
    if kind.startswith("jsonl"):
        try:
            return list(json.loads(line))
        except ValueError as error:
            raise ConfigError("URLS", file, "a JSON object per line", str(error)) from None
    import csv

    return next(csv.reader([line], delimiter="\t" if kind.startswith("tsv") else ","), [])


def _choose(key: str, given: str, usual: tuple[str, ...], columns: list[str]) -> str:
    found = given if given in columns else "" if given else next((name for name in usual if name in columns), "")
    if not found:
        raise ConfigError(
            key, given or f"none of {', '.join(usual)}", f"columns of the list: {', '.join(columns[:20])}", "Name the column."
        )
    return found


def _fetch(url: str, scratch: str) -> str:
    """Copy a list from a web server: it is read several times, and img2dataset takes a page with links for a folder."""
    name = url.partition("?")[0].rstrip("/").rpartition("/")[2]
    if not any(name.endswith(f".{kind}") for kind in FORMATS):
        raise ConfigError("URLS", url, f"a URL that ends in one of {', '.join(FORMATS)}")
    Path(scratch).mkdir(parents=True, exist_ok=True)
    target = os.path.join(scratch, name)
    storage.write_bytes(target, storage.read_bytes(url))
    return target
