"""The run folder, on local disk or any fsspec URL: whole files, exclusive files, and folders that appear at once.

Locally a file or folder is written beside its place, synced and renamed into it. Object stores have no rename and need
none: an object appears whole, and a folder counts only once its last object, the commit record, is there.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors that another try would only repeat."""


class StorageFailed(RuntimeError):  # noqa: N818 - it names what happened
    """The run folder cannot be read or written; `lasting` if a new attempt would fail again."""

    def __init__(self, message: str, lasting: bool) -> None:
        super().__init__(message)
        self.lasting = lasting

    def __reduce__(self) -> tuple[Any, ...]:
        return (StorageFailed, (str(self), self.lasting))


class RunFolder:
    """Paths inside are relative, with slashes. Accesses to a remote store are repeated `retries` times, with growing pauses."""

    def __init__(self, url: str, retries: int = 5) -> None:
        import fsspec

        self.url, self.retries = str(url), retries
        self.fs, root = fsspec.core.url_to_fs(self.url)
        self.local = self.fs.protocol in ("file", "local") or "file" in tuple(self.fs.protocol)
        self.root = root.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return (RunFolder, (self.url, self.retries))

    def _remote(self, access: Callable[[], T]) -> T:
        """`access()`, tried again after what may pass: a store that is overloaded or restarts. Raises `OSError`."""
        for attempt in range(self.retries):
            try:
                return access()
            except (FileNotFoundError, FileExistsError, PermissionError):
                raise
            except Exception as error:  # Clients of stores have errors of their own.
                if self.local:
                    raise
                log.warning("%s does not answer (%s); trying again", self.url, error)
                time.sleep(min(0.2 * 2**attempt, 10.0))
        try:
            return access()
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def path(self, name: str = "") -> str:
        """Full path of `name` for `fs`."""
        return f"{self.root}/{name}" if name else self.root

    def names(self, folder: str) -> list[str]:
        """Sorted base names in `folder`; empty if it does not exist. Listings are never cached."""
        self.fs.invalidate_cache()
        try:
            found = self._remote(lambda: self.fs.ls(self.path(folder), detail=False))
        except FileNotFoundError:
            return []
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in found} - {""})

    def exists(self, name: str) -> bool:
        """Whether a file is there now."""
        self.fs.invalidate_cache()
        return bool(self._remote(lambda: self.fs.exists(self.path(name))))

    def size(self, name: str) -> int:
        """Bytes of a file; `FileNotFoundError` if there is none."""
        self.fs.invalidate_cache()
        return int(self._remote(lambda: self.fs.info(self.path(name)))["size"])

    def read(self, name: str) -> bytes:
        """Content of a file."""
        return bytes(self._remote(lambda: self.fs.cat_file(self.path(name))))

    def sha256(self, name: str) -> str:
        """Digest of a file, read in pieces."""

        def once() -> str:
            digest = hashlib.sha256()
            with self.fs.open(self.path(name), "rb") as file:
                while piece := file.read(1 << 22):
                    digest.update(piece)
            return digest.hexdigest()

        return self._remote(once)

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, replacing what was there at once."""
        if not self.local:
            self._put(name, data)
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
            whole = file.tell()
            try:
                file.write(data)
                file.flush()
            except OSError:
                # Half a line would spoil the next one.
                os.truncate(target, whole)
                raise

    def write_folder(self, name: str, files: dict[str, Callable[[], bytes]], last: str, before_commit: Callable[[], None]) -> None:
        """Write `files` (made one at a time) as folder `name`; it counts once `last` is in place.

        `before_commit` runs just before the folder appears and may raise to prevent it. What a failure leaves is removed.
        """
        if not self.local:
            for file, content in files.items():
                if file == last:
                    before_commit()
                self._put(f"{name}/{file}", content())
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

    def _put(self, name: str, data: bytes) -> None:
        self._remote(lambda: self.fs.pipe_file(self.path(name), data))

    def remove(self, name: str) -> None:
        """Remove a file or a folder; nothing happens if it is gone already."""
        try:
            self._remote(lambda: self.fs.rm(self.path(name), recursive=True))
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
