"""Safe reading of photo files from arbitrary paths."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from fastfundus.errors import PhotoError, TransientError
from fastfundus.photo.header import MAX_BYTES
from fastfundus.records import Status

__all__ = ["PAUSES_S", "expansion_limit", "is_unmounted", "missing_reason", "read_patiently", "read_photo", "unpacked"]

PAUSES_S = (0.5, 2.0, 5.0)
"""Pauses in seconds before reading a file again when the storage has failed."""
_OF_THE_PATH = {errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO, errno.EOPNOTSUPP}
"""Errors that say something about the path. All others say something about the storage or this machine."""
_ALWAYS_ALLOWED = 64 << 20
_GZIP = b"\x1f\x8b"
_MAX_MEMBERS = 100_000
_MAX_RATIO = 20


def read_photo(path: Path, *, listed: bool = False) -> bytes:
    """Read a file, decompressing it if it is gzipped.

    Args:
        path: the file.
        listed: whether the file was there when the work began: then it is no fault of its own that it is not any more.

    Raises:
        TransientError: The storage or this machine failed, or the folder of the file has vanished.
        PhotoError: The path is missing, not a regular file, too large, or not readable.
    """
    try:
        # Open without blocking: opening a pipe without a writer would hang, and reading a device might never end.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PhotoError(Status.UNREADABLE, "cannot be read: not a regular file")
            if status.st_size > MAX_BYTES:
                raise PhotoError(Status.UNSUPPORTED, f"the file is larger than {MAX_BYTES >> 20} MiB")
            data = file.readall()
    except ValueError as error:
        # A null byte in the path.
        raise PhotoError(Status.UNREADABLE, f"the file cannot be read ({error})") from None
    except MemoryError:
        raise TransientError("there is not enough memory to read it") from None
    except OSError as error:
        raise _fault(path, error, listed) from None
    return unpacked(data)


def missing_reason(path: Path) -> str | None:
    """Return why a path leads to no file, before the work begins; None if it does, or if the storage is the cause."""
    try:
        os.stat(path)
    except ValueError as error:
        return f"the file cannot be read ({error})"
    except OSError as error:
        fault = _fault(path, error, listed=False)
        return None if isinstance(fault, TransientError) else fault.reason
    return None


def _fault(path: Path, error: OSError, listed: bool) -> PhotoError:
    """Return whether a file or something else is the cause of an error."""
    text = error.strerror or str(error)
    if isinstance(error, IsADirectoryError):
        return PhotoError(Status.UNREADABLE, "cannot be read: it is a folder")
    if isinstance(error, PermissionError):
        if not os.access(path.parent, os.X_OK):
            return TransientError("no permission to enter its folder; run chmod +x on it")
        return PhotoError(Status.UNREADABLE, "no permission to read the file; run chmod +r on it")
    if isinstance(error, FileNotFoundError):
        if not _has_files(path.parent):
            return TransientError("its folder is gone or empty; is the storage still mounted?")
        if not listed:
            return PhotoError(Status.UNREADABLE, "file not found; check the path")
    elif error.errno not in _OF_THE_PATH:
        return TransientError(f"the storage failed ({text})")
    if listed:
        return TransientError(f"it has vanished since the work began ({text}); is the storage still mounted?")
    return PhotoError(Status.UNREADABLE, f"the file cannot be read ({text})")


def read_patiently(
    path: Path,
    *,
    listed: bool = False,
    pauses_s: Sequence[float] = PAUSES_S,
    wait: Callable[[float], object] = time.sleep,
) -> bytes:
    """Read a file as `read_photo` does, and again after each of some pauses while the storage fails.

    Raises:
        PhotoError: See `read_photo`.
    """
    for pause in pauses_s:
        try:
            return read_photo(path, listed=listed)
        except TransientError:
            wait(pause)
    return read_photo(path, listed=listed)


def _has_files(folder: Path) -> bool:
    """Return whether a folder has files: that of a share that is no longer mounted has at most folders of results."""
    try:
        with os.scandir(folder) as entries:
            return any(not entry.is_dir(follow_symlinks=False) for entry in entries)
    except OSError:
        return False


def is_unmounted(folder: Path) -> bool:
    """Return whether a path leads into an empty folder, such as that on which a share should be mounted."""
    for parent in (folder, *folder.parents):
        with contextlib.suppress(OSError), os.scandir(parent) as entries:
            return next(entries, None) is None
    return False


def expansion_limit(size: int) -> int:
    """Return the number of bytes that a compressed file of `size` bytes may expand to.

    Uncompressed photos shrink by a factor of two to ten; what shrinks by a thousand is an attack.
    """
    return min(MAX_BYTES, max(_ALWAYS_ALLOWED, _MAX_RATIO * size))


def unpacked(data: bytes) -> bytes:
    """Decompress the data if it is gzipped, up to the size limit of a photo or 20 times its own size.

    All members of the file are read, as in those of bgzip; what follows them is ignored, as by gunzip.

    Raises:
        PhotoError: The data is damaged, or decompresses to more than the limit.
    """
    limit, place, members = expansion_limit(len(data)), 0, 0
    whole = bytearray()
    try:
        while data.startswith(_GZIP, place):
            place = _unpack_member(data, place, whole, limit)
            members += 1
            if members > _MAX_MEMBERS:
                raise PhotoError(Status.UNSUPPORTED, f"the gzip file has more than {_MAX_MEMBERS} members")
    except zlib.error as error:
        raise PhotoError(Status.UNREADABLE, f"the gzip file is damaged ({error}); copy it again") from None
    return bytes(whole) if members else data


def _unpack_member(data: bytes, place: int, whole: bytearray, limit: int) -> int:
    """Append the content of one member of a gzip file to `whole`, and return the position behind it."""
    unpacker, step = zlib.decompressobj(wbits=31), 4096
    while not unpacker.eof:
        piece = data[place : place + step]
        if not piece:
            raise PhotoError(Status.UNREADABLE, "the gzip file is incomplete; copy it again")
        whole += unpacker.decompress(piece, limit - len(whole) + 1)
        if len(whole) > limit:
            raise PhotoError(Status.UNSUPPORTED, f"the file unpacks to more than {limit >> 20} MiB")
        place += len(piece) - len(unpacker.unused_data)
        # Small first steps, because what follows a small member would be copied once for each of them.
        step = min(2 * step, 1 << 20)
    return place
