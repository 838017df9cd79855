"""Safe reading of photo files from arbitrary paths."""

from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path

from fastfundus.errors import PhotoError
from fastfundus.photo.header import MAX_BYTES
from fastfundus.records import Status

__all__ = ["expansion_limit", "read_photo", "unpacked"]

_ALWAYS_ALLOWED = 64 << 20
_MAX_RATIO = 20


def read_photo(path: Path) -> bytes:
    """Read a file, decompressing it if it is gzipped.

    Raises:
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
    except IsADirectoryError:
        raise PhotoError(Status.UNREADABLE, "cannot be read: it is a folder") from None
    except FileNotFoundError:
        raise PhotoError(Status.UNREADABLE, "file not found; check the path") from None
    except PermissionError:
        raise PhotoError(Status.UNREADABLE, "no permission to read the file; run chmod +r on it") from None
    except (OSError, ValueError) as error:
        # ValueError: a null byte in the path.
        text = getattr(error, "strerror", None) or error
        raise PhotoError(Status.UNREADABLE, f"the file cannot be read ({text})") from None
    return unpacked(data)


def expansion_limit(size: int) -> int:
    """Return the number of bytes that a compressed file of `size` bytes may expand to.

    Uncompressed photos shrink by a factor of two to ten; what shrinks by a thousand is an attack.
    """
    return min(MAX_BYTES, max(_ALWAYS_ALLOWED, _MAX_RATIO * size))


def unpacked(data: bytes) -> bytes:
    """Decompress the data if it is gzipped, up to the size limit of a photo or 20 times its own size.

    Raises:
        PhotoError: The data is damaged, or decompresses to more than the limit.
    """
    if data[:2] != b"\x1f\x8b":
        return data
    unpacker = zlib.decompressobj(wbits=31)
    limit = expansion_limit(len(data))
    try:
        whole = unpacker.decompress(data, limit)
    except zlib.error as error:
        raise PhotoError(Status.UNREADABLE, f"the gzip file is damaged ({error}); copy it again") from None
    if not unpacker.eof:
        if len(whole) == limit:
            raise PhotoError(Status.UNSUPPORTED, f"the file unpacks to more than {limit >> 20} MiB")
        raise PhotoError(Status.UNREADABLE, "the gzip file is incomplete; copy it again")
    return whole
