"""Single-file bundles: ZIP archives with uncompressed members. Does not need torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
import weakref
import zipfile
from pathlib import Path

from fastfundus.errors import BundleError
from fastfundus.files import open_regular, sync

__all__ = ["MAX_DESCRIPTION_BYTES", "Unpacked", "is_archive", "pack"]

_SUFFIX = ".zip"
_DESCRIPTION = "bundle.json"
MAX_DESCRIPTION_BYTES = 16 << 20
_PREFIX = "fastfundus-bundle-"
_ORPHAN_S = 60


def is_archive(path: Path) -> bool:
    """Return whether a bundle of this name is a single file."""
    return path.suffix.lower() == _SUFFIX


def pack(folder: Path, file: Path) -> None:
    """Pack a bundle's folder into one file with an atomic write.

    Members are not compressed because weights hardly shrink. Timestamps are omitted so that the same bundle always
    produces the same bytes.
    """
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(folder.iterdir()):
                member = zipfile.ZipInfo(path.name)
                member.external_attr = 0o644 << 16
                with archive.open(member, "w", force_zip64=True) as target, path.open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 20)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(file)
        sync(file.parent)
    finally:
        Path(name).unlink(missing_ok=True)


class Unpacked:
    """Single-file bundle unpacked to a temporary folder, which is deleted with this object or when Python exits.

    Args:
        file: path of the bundle.

    Raises:
        BundleError: see `_unpack`.
    """

    def __init__(self, file: Path) -> None:
        _remove_orphans()
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Held while the folder is in use: the lock of a process that was killed is released.
        lock = os.open(self.folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)
        weakref.finalize(self, _remove, self.folder, lock)
        _unpack(file, self.folder)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _remove_orphans() -> None:
    """Remove the folders that killed processes of this user have left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                facts = os.fstat(lock)
                # A younger folder may not be locked yet.
                if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > _ORPHAN_S:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _unpack(file: Path, folder: Path) -> None:
    """Unpack a bundle: its `bundle.json` and the files listed there, and nothing else.

    Args:
        file: path of the bundle; its content is not trusted.
        folder: empty folder to unpack to; nothing is written outside it.

    Raises:
        BundleError: if the file is not an archive, is damaged, or contains compressed or unlisted members.
    """
    try:
        # Opening a pipe by its name would wait for its writer.
        with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if _DESCRIPTION not in names:
                raise BundleError(
                    f"{file}: not an engine bundle (no {_DESCRIPTION} inside); create one with fastfundus build-engine"
                )
            for member in members:
                name = member.filename
                # A name with a folder could point outside the bundle; a compressed member could expand without limit.
                if Path(name).name != name or "\\" in name or name in (".", ".."):
                    raise BundleError(f"{file}: names a file outside the bundle ({name!r}); do not use it")
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                    raise BundleError(f"{file}: {name} is compressed; pack the bundle again without compression")
            if len(set(names)) != len(names):
                raise BundleError(f"{file}: contains two files of the same name; do not use it")
            if archive.getinfo(_DESCRIPTION).file_size > MAX_DESCRIPTION_BYTES:
                raise BundleError(f"{file}: its {_DESCRIPTION} is larger than any valid one; do not use it")
            wanted = {_DESCRIPTION, *json.loads(archive.read(_DESCRIPTION)).get("files", {})}
            if extra := sorted(set(names) - wanted):
                raise BundleError(f"{file}: contains {extra[0]!r}, which {_DESCRIPTION} does not list; do not use it")
            for member in members:
                with archive.open(member) as source, (folder / member.filename).open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except FileNotFoundError:
        raise BundleError(f"{file}: not found; give a bundle created by fastfundus build-engine") from None
    except (zipfile.BadZipFile, ValueError, AttributeError, OSError, EOFError, NotImplementedError) as error:
        raise BundleError(
            f"{file}: cannot be unpacked ({error or type(error).__name__}); copy it again or rebuild the engine"
        ) from None
