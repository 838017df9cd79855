"""Atomic and durable writes, and hashes of files. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from fastfundus.errors import ConfigError

__all__ = ["atomic_write", "hash_file", "open_regular", "read_small", "refuse_mount_point", "sync", "sync_folder"]


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `file` to write to, then rename it to `file`.

    Readers, and a restart after a crash or a power failure, see either the old or the new file, never a partial one.
    Once this returns, the new file is on disk. On an error, the old file is kept and the temporary one is removed.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        sync(partial)
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(file.parent)


def sync(path: Path) -> None:
    """Write a file, or the list of files in a folder, to disk.

    Otherwise a new name may survive a power failure that the content behind it does not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Write the files of a folder without subfolders to disk, and their list, so that it may get another name."""
    for path in (*folder.iterdir(), folder):
        sync(path)


def refuse_mount_point(output: Path) -> None:
    """Raise if a folder cannot be replaced as a whole, because something is mounted there.

    Raises:
        ConfigError: it is a mount point, such as a volume of a container.
    """
    if output.is_mount():
        raise ConfigError(
            f"{output} is a mount point, which cannot be replaced as a whole; give a folder in it, such as "
            f"{output / 'output'}"
        )


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a regular file as 64 hex digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_small(path: Path, max_bytes: int = 64 << 20) -> bytes:
    """Read a regular file that may come from anywhere.

    Raises:
        OSError: it is missing, is not a regular file, or is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise OSError(errno.EFBIG, f"is larger than {max_bytes} bytes", str(path))
        return file.read(max_bytes)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read: a pipe without a writer would be waited for, and a device might never end.

    Raises:
        OSError: it is missing or not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")
