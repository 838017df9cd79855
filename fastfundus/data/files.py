"""Which files of a folder or a list are photos."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from fastfundus.data.match import Match, match_listed
from fastfundus.data.tables import read_text
from fastfundus.errors import DataError
from fastfundus.photo.header import OTHER_PICTURES
from fastfundus.records import PHOTO_SUFFIXES

__all__ = ["find_files", "is_photo", "read_list"]

_PICTURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|II\*\0|MM\0\*|II\+\0|MM\0\+|BM.{4}\0{4}|RIFF.{4}WEBP"
    rb"|\0{3}\x0cjP  |\xff\x4f\xff\x51|.{4}ftyp(?:heic|heix|heim|heis|hevc|mif1|msf1|avif|avis)|8BPS",
    re.DOTALL,
)
"""The first bytes of pictures: JPEG, PNG, GIF, TIFF, BigTIFF, BMP, WebP, JPEG 2000, HEIC, AVIF, Photoshop."""


def find_files(folder: Path, notes: list[str], lost: list[str]) -> Iterator[str]:
    """Yield the path of every file below a folder, sorted, beginning with the folder as it is given.

    Args:
        folder: the folder to search. Hidden folders, which contain thumbnails and trash, are left out.
        notes: receives links to folders, which are not followed because they could form a cycle.
        lost: receives folders that cannot be searched.
    """

    def complain(error: OSError) -> None:
        lost.append(f"{error.filename}: cannot be searched ({error.strerror}); run chmod +rx on it")

    for parent, folders, files in os.walk(folder, onerror=complain):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        notes += [
            f"{Path(parent) / name}: links to folders are not followed; give the target to include its photos"
            for name in folders
            if os.path.islink(os.path.join(parent, name))
        ]
        # Strings, because a million paths as objects take a quarter of a minute.
        start = "" if parent == "." else parent.rstrip("/") + "/"
        yield from (start + name for name in sorted(files))


def is_photo(path: str) -> bool:
    """Return whether a file of a folder is a photo: by its extension, or by its first bytes."""
    name = path[path.rfind("/") + 1 :]
    stem, dot, suffix = name.lower().rpartition(".")
    if dot and suffix == "gz":
        # Photos may be gzipped, as in STARE.
        return stem[stem.rfind(".") :] in PHOTO_SUFFIXES
    if dot and f".{suffix}" in PHOTO_SUFFIXES:
        return True
    if name == "DICOMDIR":
        return False
    try:
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            start = file.read(132)
    except OSError as error:
        # What cannot be read now may be a photo: it gets a row that says so.
        return error.errno in (errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
    known = (_PICTURES, *OTHER_PICTURES.values())
    return start[128:] == b"DICM" or any(pattern.match(start) for pattern in known)


def _with_slashes(line: str, folder: Path) -> str:
    """Return a line with the slashes of this system, unless a file has a backslash in its name."""
    if "\\" not in line or os.path.lexists(folder / line.replace("\0", "")):
        return line
    return line.replace("\\", "/")


def read_list(path: Path) -> tuple[list[Path], list[str]]:
    """Read the paths in a list file, relative to it, without empty lines and lines that begin with #.

    Returns:
        The paths, and notes for the user.

    Raises:
        DataError: the file cannot be read, names nothing, or a name denotes several files.
    """
    text, notes = read_text(path)
    lines = [_with_slashes(line.strip().strip('"'), path.parent) for line in text.splitlines()]
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise DataError("names no photo; give one path per line", path=path)
    folders = {line for line in named if "\0" not in line and os.path.isdir(path.parent / line)}
    matches = iter(match_listed([line for line in named if line not in folders], path.parent))
    paths = []
    for line in named:
        match = Match(None) if line in folders else next(matches)
        if match.candidates:
            raise DataError(f"{line} fits {' and '.join(match.candidates[:3])}; write the extension", path=path)
        paths.append(Path(match.key) if match.key is not None else path.parent / line.replace("\0", "\\0"))
    return paths, notes
