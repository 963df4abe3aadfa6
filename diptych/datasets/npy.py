"""`.npy` files of rows, read by ranges and written in pieces; nothing is ever unpickled.

The format is NumPy's own (numpy.lib.format, versions 1 and 2): a short header, then the rows one after the other.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np

from diptych.datasets import ranged, storage

_HEADER_BYTES = 4096


@dataclass(frozen=True)
class NpyFile:
    """Where the rows of an array of floats [rows, …] stand in a file."""

    url: str
    rows: int
    shape: tuple[int, ...]
    """Of one row."""
    dtype: np.dtype
    offset: int
    """Bytes before the first row."""

    @property
    def dim(self) -> int:
        """Numbers of one row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dim * self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop): dtype [stop - start, dim], read-only. Raises `ReadError`."""
        data = ranged.read_range(self.url, self.offset + start * self.row_bytes, (stop - start) * self.row_bytes)
        return np.frombuffer(data, self.dtype).reshape(stop - start, self.dim)

    def read_into(self, start: int, rows: np.ndarray) -> None:
        """As many rows as `rows` has, from `start`: contiguous, dtype [n, dim]. Raises `ReadError`."""
        ranged.read_into(self.url, self.offset + start * self.row_bytes, rows.view(np.uint8).reshape(-1).data)


def open_npy(url: str, sides: int = 1) -> NpyFile:
    """Read the header of an array of float [rows, dim], or of rows with more `sides`.

    Raises `ValueError` for anything else: pickled objects, other shapes or types, Fortran order, a file that was cut.
    """
    size = storage.size(url)
    try:
        found = check_header(ranged.read_range(url, 0, min(size, _HEADER_BYTES)), size)
    except ValueError as error:
        raise ValueError(f"{url} {error}") from None
    if len(found.shape) != 1 + sides or found.fortran or found.dtype.kind != "f" or found.dtype.itemsize > 8:
        order = "Fortran order" if found.fortran else "C order"
        expected = "[rows, dim]" if sides == 1 else f"[rows, …] of {1 + sides} dimensions"
        raise ValueError(f"{url} holds {found.dtype} {list(found.shape)} in {order}; expected float {expected} in C order")
    return NpyFile(url, found.shape[0], found.shape[1:], found.dtype, found.offset)


class Header(NamedTuple):
    """What the start of a `.npy` file says."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    offset: int
    """Bytes before the data."""


def check_header(data: bytes, size: int | None = None) -> Header:
    """Read the header in `data`, the start of a file of `size` bytes (all of it if None).

    Raises `ValueError`, whose message goes on from the file's name, for what is none, pickled objects, and a file that was cut.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:
        raise ValueError(f"is not a .npy file: {error}") from None
    if dtype.hasobject:
        raise ValueError("holds pickled Python objects, which are never loaded; save it as an array of floats")
    size = len(data) if size is None else size
    expected = stream.tell() + math.prod(shape) * dtype.itemsize
    if size < expected:
        raise ValueError(f"was cut: {size} bytes, its header promises {expected}")
    return Header(tuple(int(side) for side in shape), bool(fortran), dtype, stream.tell())


def header_bytes(dtype: np.dtype, rows: int, dim: int) -> bytes:
    """The header of a version 1.0 file, as NumPy itself writes it."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype.str, "fortran_order": False, "shape": (rows, dim)})
    return stream.getvalue()


class NpyWriter:
    """Writes float [rows, dim] in pieces; the file appears under its name once all rows are there.

    Locally a temporary file is renamed into place; object stores show an upload only once it is complete.
    """

    def __init__(self, url: str, dtype: np.dtype, rows: int, dim: int) -> None:
        self.url, self.missing = url, rows
        self._temporary = ""
        if ranged.is_local(url):
            path = ranged.local_path(url)
            handle, self._temporary = tempfile.mkstemp(
                prefix=f".{os.path.basename(path)}.", suffix=".tmp", dir=os.path.dirname(path) or "."
            )
            self._stream = os.fdopen(handle, "wb", buffering=0)
        else:
            fs, path = ranged.file_system(url)
            self._stream = fs.open(path, "wb")
        self._stream.write(header_bytes(dtype, rows, dim))

    def write(self, rows: np.ndarray) -> None:
        """Append rows."""
        self.missing -= len(rows)
        data = np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data
        while data:
            data = data[self._stream.write(data) :]

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        complete = kind is None and self.missing == 0
        assert kind is not None or complete, f"{self.missing} rows are missing in {self.url}"
        if not self._temporary:
            self._stream.close() if complete else getattr(self._stream, "discard", lambda: None)()
            return
        self._stream.close()
        if complete:
            os.chmod(self._temporary, 0o644)
            os.replace(self._temporary, ranged.local_path(self.url))
        else:
            os.unlink(self._temporary)
