"""Reads the file of a photo, whatever is at its path."""

from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path

from fastfundus.errors import PhotoError
from fastfundus.photo.header import MOST_BYTES
from fastfundus.records import Status

__all__ = ["read_photo"]


def read_photo(path: Path) -> bytes:
    """Read a file, unpacked if it is gzipped.

    Raises:
        PhotoError: it is not there, not a file, too large, or may not be read.
    """
    try:
        # Without waiting: opening a pipe that nobody writes to would never end, and reading a device neither.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise PhotoError(Status.UNREADABLE, "cannot be read: it is no regular file")
            if about.st_size > MOST_BYTES:
                raise PhotoError(Status.UNSUPPORTED, f"the file is larger than {MOST_BYTES >> 20} MiB")
            data = file.readall()
    except IsADirectoryError:
        raise PhotoError(Status.UNREADABLE, "cannot be read: it is a folder") from None
    except FileNotFoundError:
        raise PhotoError(Status.UNREADABLE, "the file is not there; check the path") from None
    except PermissionError:
        raise PhotoError(Status.UNREADABLE, "no permission to read the file; run chmod +r on it") from None
    except (OSError, ValueError) as error:
        # ValueError: a null byte in a name.
        text = getattr(error, "strerror", None) or error
        raise PhotoError(Status.UNREADABLE, f"the file cannot be read ({text})") from None
    return _unpacked(data) if data[:2] == b"\x1f\x8b" else data


def _unpacked(data: bytes) -> bytes:
    """Unpack gzip, but never to more than a photo may have.

    Raises:
        PhotoError: it is damaged, or unpacks to too much.
    """
    unpacker = zlib.decompressobj(wbits=31)
    try:
        whole = unpacker.decompress(data, MOST_BYTES)
    except zlib.error as error:
        raise PhotoError(Status.UNREADABLE, f"the gzip file is damaged ({error}); copy it again") from None
    if not unpacker.eof:
        if len(whole) == MOST_BYTES:
            raise PhotoError(Status.UNSUPPORTED, f"the file unpacks to more than {MOST_BYTES >> 20} MiB")
        raise PhotoError(Status.UNREADABLE, "the gzip file is incomplete; copy it again")
    return whole
