"""A bundle as one file: a ZIP archive whose members are stored as they are. No torch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
import zipfile
from pathlib import Path

from fastfundus.errors import BundleError

__all__ = ["Unpacked", "is_archive", "pack"]

_SUFFIX = ".zip"
_DESCRIPTION = "bundle.json"
_MOST_DESCRIPTION_BYTES = 64 << 20


def is_archive(path: Path) -> bool:
    """Whether a bundle of this name is one file."""
    return path.suffix.lower() == _SUFFIX


def pack(folder: Path, file: Path) -> None:
    """Write a bundle's folder into one file, which appears when it is complete.

    Weights hardly shrink, so nothing is compressed; dates are left out, so that the same bundle gives the same bytes.
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
    finally:
        Path(name).unlink(missing_ok=True)


class Unpacked:
    """A bundle of one file in a temporary folder, which goes when this object does, or when Python ends.

    Args:
        file: the bundle.

    Raises:
        BundleError: as `_unpack`.
    """

    def __init__(self, file: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fastfundus-bundle-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        _unpack(file, self.folder)


def _unpack(file: Path, folder: Path) -> None:
    """Unpack a bundle: its description and the files that it names, nothing else.

    Args:
        file: from anywhere, not trusted.
        folder: empty; nothing is written outside it.

    Raises:
        BundleError: it is no archive, is damaged, holds other members than its description says, or compressed ones.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if _DESCRIPTION not in names:
                raise BundleError(
                    f"{file}: is no engine bundle (no {_DESCRIPTION} in it); make one with fastfundus build-engine"
                )
            for member in members:
                name = member.filename
                # A name with a folder in it could lead anywhere; compressed members could grow without end.
                if Path(name).name != name or "\\" in name or name in (".", ".."):
                    raise BundleError(f"{file}: names a file outside the bundle ({name!r}); do not use it")
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                    raise BundleError(f"{file}: {name} is compressed, bundles are stored; pack it again without")
            if len(set(names)) != len(names):
                raise BundleError(f"{file}: holds two files of one name; do not use it")
            if archive.getinfo(_DESCRIPTION).file_size > _MOST_DESCRIPTION_BYTES:
                raise BundleError(f"{file}: its {_DESCRIPTION} is too large to be one; do not use it")
            wanted = {_DESCRIPTION, *json.loads(archive.read(_DESCRIPTION)).get("files", {})}
            if extra := sorted(set(names) - wanted):
                raise BundleError(f"{file}: holds {extra[0]!r}, which its {_DESCRIPTION} does not name; do not use it")
            for member in members:
                with archive.open(member) as source, (folder / member.filename).open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except FileNotFoundError:
        raise BundleError(f"{file}: is not there; give a bundle that fastfundus build-engine made") from None
    except (zipfile.BadZipFile, ValueError, AttributeError, OSError, EOFError, NotImplementedError) as error:
        raise BundleError(
            f"{file}: cannot be unpacked ({error or type(error).__name__}); copy it again or build the engine again"
        ) from None
