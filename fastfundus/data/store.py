"""Pixels on disk: uint8 [N, S, S, 3] in `photos.npy`, continued in `photos-00001.npy`, ... when one file is too large.

Written with plain writes, not through a memory map: a full disk is then an error that can be said, where a memory map
kills the process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import DataError

__all__ = ["SHARD_BYTES", "JoinedPhotos", "PhotoArray", "PhotoStore", "open_photos"]

SHARD_BYTES = 64 * 2**30
"""Size of one file at most: easy to copy, and below the limits of every file system and object store."""


class PhotoArray(Protocol):
    """Photos as uint8 [N, S, S, 3]: a NumPy array, or files that are read like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, S, S, 3]."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]: ...


class JoinedPhotos:
    """Several arrays of photos, one behind the other, read like one by a row number or an array of them.

    Args:
        parts: of photos of one size.
        count: how many of all photos are read; None reads them all.
    """

    def __init__(self, parts: Sequence[PhotoArray], count: int | None = None) -> None:
        self._parts = parts
        self._begins = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self._begins[-1]) if count is None else count, *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        if np.ndim(rows) == 0:
            row = range(len(self))[int(rows)]
            part = int(np.searchsorted(self._begins, row, side="right")) - 1
            return self._parts[part][row - int(self._begins[part])]
        return np.stack([self[row] for row in rows]) if len(rows) else np.empty((0, *self.shape[1:]), np.uint8)


def open_photos(folder: Path, count: int, size: int, per_file: int) -> PhotoArray:
    """Open the first `count` photos for reading, memory-mapped.

    Files may hold more than `count`: what a later build is adding.

    Raises:
        OSError: a file is missing or cut off.
        ValueError: a file is no array of such photos.
    """
    parts = []
    for number in range(max(1, -(-count // per_file))):
        part = np.load(_file(folder, number), mmap_mode="r", allow_pickle=False)
        if part.shape[1:] != (size, size, 3) or part.dtype != np.uint8:
            raise ValueError(f"{_file(folder, number).name} holds {part.dtype} {part.shape}")
        parts.append(part)
    if sum(map(len, parts)) < count:
        raise ValueError(f"holds {sum(map(len, parts))} photos, its manifest says {count}")
    return parts[0][:count] if len(parts) == 1 else JoinedPhotos(parts, count)


class PhotoStore:
    """Writes photos by position, from any thread; unwritten positions read as zeros and take no room on the disk.

    Args:
        folder: where the files are.
        size: side of a photo in pixels.
        per_file: photos in each file.
    """

    def __init__(self, folder: Path, size: int, per_file: int) -> None:
        self._folder, self._size, self._per_file = folder, size, per_file
        self._bytes = size * size * 3
        self._open: dict[int, int] = {}

    def write(self, row: int, image: NDArray[np.uint8]) -> None:
        """Write one photo.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        number, place = divmod(row, self._per_file)
        file = self._descriptor(number)
        view = np.ascontiguousarray(image).data.cast("B")
        at = _HEADER + place * self._bytes
        while view:
            written = os.pwrite(file, view, at)
            view, at = view[written:], at + written

    def cut(self, count: int) -> None:
        """Take away whatever lies behind the first `count` photos: leavings of a build that was given up."""
        last = max(0, -(-count // self._per_file) - 1)
        held = count - last * self._per_file
        os.ftruncate(self._descriptor(last), _HEADER + held * self._bytes)
        number = last + 1
        while _file(self._folder, number).exists():
            _file(self._folder, number).unlink()
            number += 1

    def finish(self, count: int) -> None:
        """Give the files their final length and headers, and have them written to the disk."""
        for number in range(max(1, -(-count // self._per_file))):
            file = self._descriptor(number)
            held = min(count - number * self._per_file, self._per_file)
            os.ftruncate(file, _HEADER + held * self._bytes)
            os.pwrite(file, _header((held, self._size, self._size, 3)), 0)
            os.fsync(file)

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            os.close(file)
        self._open.clear()

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            self._open[number] = os.open(_file(self._folder, number), os.O_RDWR | os.O_CREAT, 0o666)
        return self._open[number]


_HEADER = 128


def _header(shape: tuple[int, ...]) -> bytes:
    """A version 1 header of NumPy's format, padded to one length so that it can be rewritten as photos are added."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    body = text.encode().ljust(_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def _file(folder: Path, number: int) -> Path:
    return folder / ("photos.npy" if number == 0 else f"photos-{number:05d}.npy")


def not_written(folder: Path, error: OSError, done: int) -> DataError:
    """What to tell the user when a write failed."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    cure = "make room" if full else "mend that"
    return DataError(
        f"cannot be written after {done} photos ({error.strerror or error}); {cure} and run the same command again: "
        "what was prepared is kept",
        path=folder,
    )
