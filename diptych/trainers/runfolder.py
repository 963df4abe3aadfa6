"""The run folder, on local disk or any fsspec URL: whole files, exclusive files, and folders that appear at once.

Locally a file or folder is written beside its place, synced and renamed into it. Object stores have no rename and need
none: an object appears whole, and a folder counts only once its last object, the commit record, is there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RunFolder:
    """Paths inside are relative, with slashes."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = str(url)
        self.fs, root = fsspec.core.url_to_fs(self.url)
        self.local = self.fs.protocol in ("file", "local") or "file" in tuple(self.fs.protocol)
        self.root = root.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return (RunFolder, (self.url,))

    def path(self, name: str = "") -> str:
        """Full path of `name` for `fs`."""
        return f"{self.root}/{name}" if name else self.root

    def names(self, folder: str) -> list[str]:
        """Sorted base names in `folder`; empty if it does not exist. Listings are never cached."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in found} - {""})

    def exists(self, name: str) -> bool:
        """Whether a file is there now."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes of a file; `FileNotFoundError` if there is none."""
        self.fs.invalidate_cache()
        return int(self.fs.info(self.path(name))["size"])

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return bytes(self.fs.cat_file(self.path(name)))

    def sha256(self, name: str) -> str:
        """Digest of a file, read in pieces."""
        digest = hashlib.sha256()
        with self.fs.open(self.path(name), "rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        return digest.hexdigest()

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, replacing what was there at once."""
        if not self.local:
            self.fs.pipe_file(self.path(name), data)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            _write_synced(temporary, data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that must not exist yet; False if another writer was first. Never leaves a half-written file."""
        if not self.local:
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except (FileExistsError, OSError):
                if self.exists(name):
                    return False
                raise
            return True
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            _write_synced(temporary, data)
            # Unlike a rename, a hard link refuses to replace, and the file appears with its content.
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)
        return True

    def append(self, name: str, data: bytes) -> None:
        """Append to a local file that this process alone writes."""
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            file.write(data)

    def write_folder(self, name: str, files: dict[str, Callable[[], bytes]], last: str, before_commit: Callable[[], None]) -> None:
        """Write `files` (made one at a time) as folder `name`; it counts once `last` is in place.

        `before_commit` runs just before the folder appears and may raise to prevent it. What a failure leaves is removed.
        """
        if not self.local:
            for file, content in files.items():
                if file == last:
                    before_commit()
                self.fs.pipe_file(self.path(f"{name}/{file}"), content())
            return
        target = Path(self.path(name))
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        try:
            for file, content in files.items():
                _write_synced(temporary / file, content())
            sync_folder(temporary)
            before_commit()
            if target.exists():
                # A torn folder of this very name; it was passed over when the attempt began.
                shutil.rmtree(target)
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(target.parent)

    def remove(self, name: str) -> None:
        """Remove a file or a folder; nothing happens if it is gone already."""
        try:
            self.fs.rm(self.path(name), recursive=True)
        except FileNotFoundError:
            return


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
