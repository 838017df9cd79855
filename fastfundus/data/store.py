"""Pixels on disk: uint8 [N, S, S, 3] in `photos.npy`, continued in `photos-00001.npy`, ... once a file is full.

Pixels are written with plain writes rather than through a memory map: a full disk then raises an error that can be
reported, whereas a memory map would kill the process.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import DataError

__all__ = ["SHARD_BYTES", "CheckedPhotos", "JoinedPhotos", "PhotoArray", "PhotoStore", "checksum_of", "open_photos"]

SHARD_BYTES = 64 * 2**30
"""Maximum size of one file: easy to copy, and below the limits of common file systems and object stores."""


class PhotoArray(Protocol):
    """Photos as uint8 [N, S, S, 3]: a NumPy array, or files read like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, S, S, 3]."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]: ...


class JoinedPhotos:
    """Several arrays of photos concatenated into one, indexed by a row number, a slice or an array of row numbers.

    Args:
        parts: arrays of photos of the same size.
        count: number of photos to expose; None exposes all.
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


def checksum_of(pixels: NDArray[np.uint8]) -> int:
    """Return the CRC-32 of the pixels of one photo, as manifests store it."""
    return zlib.crc32(np.ascontiguousarray(pixels).data)


class CheckedPhotos:
    """Photos whose pixels are compared with their checksums when they are read for the first time.

    Args:
        photos: the photos.
        checksums: CRC-32 of the pixels of each photo; None for photos without pixels.
        names: name of each photo, for messages.
        path: the cache, for messages.
    """

    def __init__(self, photos: PhotoArray, checksums: Sequence[int | None], names: Sequence[str], path: Path) -> None:
        self.unchecked = photos
        """The same photos, without comparison."""
        self._names, self._path = names, path
        self._checksums = np.array([-1 if value is None else value for value in checksums], np.int64)
        self._seen = self._checksums < 0
        self.shape, self.dtype = photos.shape, np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.unchecked)

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]:
        """Return photos.

        Raises:
            DataError: the pixels of a photo have changed since they were written.
        """
        photos = self.unchecked[rows]
        if np.ndim(rows) == 0 and not isinstance(rows, slice):
            self._check(range(len(self))[int(rows)], photos)
            return photos
        unseen = np.flatnonzero(~self._seen[rows])
        if len(unseen):
            numbers = np.arange(len(self))[rows]
            for place in unseen:
                self._check(int(numbers[place]), photos[place])
        return photos

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint8]:
        return np.asarray(self[:], dtype)

    def _check(self, row: int, pixels: NDArray[np.uint8]) -> None:
        if self._seen[row]:
            return
        if checksum_of(pixels) != self._checksums[row]:
            raise DataError(
                f"the pixels of {self._names[row]} have changed since they were prepared; list all such photos with "
                "fastfundus cache verify, and prepare them again into a new folder",
                path=self._path,
            )
        self._seen[row] = True


def open_photos(folder: Path, count: int, size: int, per_file: int) -> PhotoArray:
    """Open the first `count` photos for reading, memory-mapped.

    Files may contain more than `count` photos while a later build is adding some.

    Raises:
        OSError: a file is missing or truncated.
        ValueError: a file does not contain an array of such photos.
    """
    parts = []
    for number in range(max(1, -(-count // per_file))):
        if not _file(folder, number).is_file():
            raise ValueError(f"{_file(folder, number).name} is missing")
        part = np.load(_file(folder, number), mmap_mode="r", allow_pickle=False)
        if part.shape[1:] != (size, size, 3) or part.dtype != np.uint8:
            raise ValueError(f"{_file(folder, number).name} contains {part.dtype} {part.shape}")
        parts.append(part)
    if sum(map(len, parts)) < count:
        raise ValueError(f"contains {sum(map(len, parts))} photos, but its manifest lists {count}")
    return parts[0][:count] if len(parts) == 1 else JoinedPhotos(parts, count)


class PhotoStore:
    """Writer of photos by position, from any thread; unwritten positions read as zeros and take no disk space.

    Args:
        folder: folder of the files.
        size: side length of a photo in pixels.
        per_file: number of photos per file.
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
        """Truncate the files after the first `count` photos, removing what an abandoned build left."""
        last = max(0, -(-count // self._per_file) - 1)
        held = count - last * self._per_file
        os.ftruncate(self._descriptor(last), _HEADER + held * self._bytes)
        number = last + 1
        while _file(self._folder, number).exists():
            _file(self._folder, number).unlink()
            number += 1

    def read(self, row: int) -> bytes:
        """Return the bytes of one photo, fewer if the file ends within it."""
        number, place = divmod(row, self._per_file)
        return os.pread(self._descriptor(number), self._bytes, _HEADER + place * self._bytes)

    def finish(self, count: int) -> None:
        """Set the final length and header of each file, and flush the files to disk."""
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
    """Return a NumPy format 1.0 header, padded to a fixed length so that it can be rewritten as photos are added."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    body = text.encode().ljust(_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def _file(folder: Path, number: int) -> Path:
    return folder / ("photos.npy" if number == 0 else f"photos-{number:05d}.npy")


def not_written(folder: Path, error: OSError, done: int) -> DataError:
    """Return the error for a failed write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    cure = "free up space" if full else "fix the cause"
    return DataError(
        f"cannot be written after {done} photos ({error.strerror or error}); {cure} and run the same command again: "
        "finished photos are kept",
        path=folder,
    )
