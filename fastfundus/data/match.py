"""The one rule by which a name in a table or list denotes a file.

A name matches, in this order: the whole path; the whole path ignoring case and Unicode form; the end of a path; the end
of a path without extensions; a file beside the table; for absolute paths of another machine, a photo whose path in the
source is their end; and all of this again for the path that a URL or an escaped name stands for. A match that is not
unique is an error, and a name with another folder is another file: nobody may get the labels of someone else.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast
from urllib.parse import unquote

from fastfundus.records import PHOTO_SUFFIXES

__all__ = ["Match", "fold_name", "match_listed", "match_names", "without_photo_suffix"]


# A named tuple, because a million of them are made for a large table.
class Match(NamedTuple):
    """The file that a name denotes."""

    key: str | None
    """Key of the file, or None if it is missing or ambiguous."""
    candidates: tuple[str, ...] = ()
    """The keys that fit equally well, if there are several."""
    by_stem: bool = False
    """True if the extensions differ, or one is absent."""
    foreign_path: bool = False
    """True if only the end of an absolute path of another machine agrees."""


_MISSING = Match(None)
_FORMATS = ({".jpg", ".jpeg", ".jpe", ".jfif"}, {".tif", ".tiff"}, {".heic", ".heif", ".hif"}, {".dcm", ".dicom"})


def fold_name(name: str) -> str:
    """Return a path without differences of case, Unicode normal form, slashes, drive letter, "." and empty parts."""
    name = name.replace("\\", "/")
    plain = name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()
    if "//" not in plain and "./" not in plain and ":" not in plain:
        return plain.strip("/")
    parts = re.sub(r"^[a-z]:", "", plain).split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _fold_all(names: Sequence[str], fold: Callable[[str], str] = fold_name) -> list[str]:
    """Fold many names; if none has anything special, all at once and in a tenth of the time."""
    joined = "\n".join(names)
    special = ("\\", ":", "//", "./", "\n/", "/\n")
    if not joined.isascii() or joined.startswith("/") or joined.endswith("/") or any(map(joined.__contains__, special)):
        return list(map(fold, names))
    folded = joined.lower().split("\n")
    return folded if len(folded) == len(names) else list(map(fold, names))


def _fold_file(name: str) -> str:
    """Fold the name of a file in a folder: a colon in it follows no drive."""
    return fold_name("/" + name)


def without_photo_suffix(name: str) -> str:
    """Return a name without the extension of a photo; numbers at the end of DICOM identifiers are no extension."""
    stem, dot, suffix = name.rpartition(".")
    if not dot:
        return name
    if suffix.lower() == "gz":
        name = stem
        stem, dot, suffix = name.rpartition(".")
    return stem if dot and "." + suffix.lower() in PHOTO_SUFFIXES else name


def match_names(names: Sequence[str], keys: Iterable[str], folders: Sequence[Path], root: str = "") -> list[Match]:
    """Find the file that each name denotes.

    Args:
        names: paths or parts of paths, as written in a table.
        keys: normalised absolute paths of the photos found.
        folders: folders to which names may be relative, by precedence. A file that exists there counts, too.
        root: the source that contains the photos; paths of another machine end like their paths in it.

    Returns:
        A match for each name.
    """
    found = dict.fromkeys(keys)
    bases = list(dict.fromkeys(os.path.abspath(folder) for folder in folders))
    # A name without a folder can only be that of a photo directly in a base, and often there is none.
    direct = [base for base in bases if any(key.rfind("/") == len(base) and key.startswith(base) for key in found)]
    matches: list[Match | None] = [
        _whole(name, found, bases if "/" in name else direct) if direct or "/" in name or "\0" in name else None
        for name in names
    ]
    if None not in matches:
        return matches  # type: ignore[return-value]
    index, disk = _Index(found, root), _Disk()
    folded_bases = [fold_name(base) for base in bases]
    for position, plain in enumerate(_fold_all(names)):
        if matches[position] is not None:
            continue
        if not index.undotted and "." not in plain and "/" not in plain and (stem := index.by_stem(plain)):
            # The usual name of a table, in half the time.
            matches[position] = stem
            continue
        name = names[position]
        # Whatever ends like the name has its last part.
        known = (index.undotted or "." in plain) and index.has_last(plain)
        matches[position] = (
            (index.whole(plain, folded_bases) if known else None)
            or (index.ending(plain) if known else None)
            or index.stem_ending(plain)
            or _on_disk(name, bases, disk)
            or (index.foreign(plain) if _is_absolute(name) else None)
            or _MISSING
        )
    _drop_inconsistent(names, matches, index)  # type: ignore[arg-type]
    return _from_urls(names, matches, lambda again: match_names(again, found, folders, root))  # type: ignore[arg-type]


def _drop_inconsistent(names: Sequence[str], matches: list[Match], index: _Index) -> None:
    """Give up matches of another machine's paths that would place its source in two folders, one within the other.

    If `/mnt/x/siteA/2.jpg` is `siteA/2.jpg`, then `/mnt/x/siteB/1.jpg` is not the `1.jpg` beside the folders.
    """
    roots = {
        position: index.foreign_root(names[position], match.key)
        for position, match in enumerate(matches)
        if match.foreign_path and match.key is not None
    }
    distinct = set(roots.values())
    below = {root for root in distinct if any(str(parent) in distinct for parent in PurePosixPath(root).parents)}
    for position, root in roots.items() if below else ():
        if root in below:
            matches[position] = _MISSING


def _from_urls(names: Sequence[str], matches: list[Match], match: Callable[[list[str]], list[Match]]) -> list[Match]:
    """Match the names that are still missing again, if they are URLs or escaped."""
    written = {
        at: plain for at, name in enumerate(names) if matches[at] is _MISSING and (plain := _from_url(name)) != name
    }
    for at, found in zip(written, match(list(written.values())) if written else [], strict=True):
        matches[at] = found
    return matches


def _from_url(name: str) -> str:
    """Return the path that a URL or an escaped name stands for, as labelling tools write them."""
    if "://" in name:
        # The host is no folder here; some tools give the path as a query.
        path, _, query = name.split("://", 1)[1].partition("?")
        name = path[path.find("/") :] if "/" in path else path
        name = query.removeprefix("d=") if query.startswith("d=") else name
    elif "?d=" in name:
        name = name.split("?d=", 1)[1]
    return unquote(name) if "%" in name else name


def _is_absolute(name: str) -> bool:
    return name[:1] in ("/", "\\") or name[1:2] == ":"


def match_listed(names: Sequence[str], folder: Path) -> list[Match]:
    """Find the files that a list denotes, where no folder of photos is given.

    Args:
        names: paths relative to `folder`, or absolute. Where one does not exist, the files beside it are searched for
            one that differs by case, Unicode form or extension only.
        folder: folder of the list.
    """
    matches = match_names(names, (), (folder,))
    missing = {os.path.dirname(os.path.join(folder, name)) for name, m in zip(names, matches, strict=True) if not m.key}
    if not missing:
        return matches
    nearby = []
    for parent in missing:
        try:
            with os.scandir(parent) as entries:
                nearby += [os.path.abspath(entry.path) for entry in entries if not entry.name.startswith(".")]
        except (OSError, ValueError):
            # The folder itself is missing; its files are reported one by one.
            continue
    photos = [key for key in nearby if os.path.splitext(key)[1].lower() in (*PHOTO_SUFFIXES, ".gz")]
    again = match_names(names, photos, (folder,))
    # A list names files, so that another format of the same name is another file.
    return [
        _MISSING if match.by_stem and not _same_format(name, match) else match
        for name, match in zip(names, again, strict=True)
    ]


def _same_format(name: str, match: Match) -> bool:
    if without_photo_suffix(name) == name:
        return True
    suffixes = {os.path.splitext(path)[1].lower() for path in (name, *(match.candidates or (str(match.key),)))}
    return any(suffixes <= family for family in _FORMATS)


class _Disk:
    """Which files exist, from one listing of each folder: names in a table are many, their folders are few."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def has(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder or "/"))
            except (OSError, ValueError):
                self._names[folder] = frozenset()
        return name in self._names[folder] and os.path.isfile(path)


def _places(name: str, bases: list[str]) -> list[str]:
    if name[:1] == "/" or "./" in name or "//" in name or name[-1:] in ("/", "."):
        return [os.path.normpath(os.path.join(base, name)) for base in bases]
    return [f"{base}/{name}" for base in bases]


def _whole(name: str, found: dict[str, None], bases: list[str]) -> Match | None:
    if "\0" in name:
        return _MISSING
    return next((Match(place) for place in _places(name, bases) if place in found), None)


def _on_disk(name: str, bases: list[str], disk: _Disk) -> Match | None:
    return next((Match(place) for place in _places(name, bases) if disk.has(place)), None)


def _by_name(names: list[str], keys: list[str]) -> dict[str, str | list[str]]:
    """Return the key, or the list of keys, of each name."""
    if len(index := dict(zip(names, keys, strict=True))) == len(keys):
        # Most names have one key, and a million lists would take seconds to make.
        return cast(dict[str, str | list[str]], index)
    several: dict[str, str | list[str]] = {}
    for name, key in zip(names, keys, strict=True):
        before = several.setdefault(name, key)
        if isinstance(before, list):
            before.append(key)
        elif before is not key:
            several[name] = [before, key]
    return several


def _all(index: dict[str, str | list[str]], name: str) -> list[str]:
    hits = index.get(name, [])
    return [hits] if isinstance(hits, str) else hits


class _Index:
    """The photos by folded path, by last part, and by last part without its extension."""

    def __init__(self, keys: Iterable[str], root: str) -> None:
        self._start = len(fold_name(root)) + 1 if root else 0
        self._keys = list(keys)
        last = _fold_all([key[key.rfind("/") + 1 :] for key in self._keys], _fold_file)
        self._last = _by_name(last, self._keys)
        self._stem = _by_name(list(map(without_photo_suffix, last)), self._keys)
        self.undotted = not all("." in name for name in last)

    @cached_property
    def _whole(self) -> dict[str, str | list[str]]:
        return _by_name(list(map(fold_name, self._keys)), self._keys)

    def has_last(self, plain: str) -> bool:
        """Return whether any photo has the last part of a path as its own."""
        return plain[plain.rfind("/") + 1 :] in self._last

    def whole(self, plain: str, bases: list[str]) -> Match | None:
        """Match a whole path."""
        for base in bases:
            # Paths that differ by case only are passed over: `ending` reports them as ambiguous.
            if isinstance(key := self._whole.get(f"{base}/{plain}"), str):
                return Match(key)
        return None

    def ending(self, plain: str) -> Match | None:
        """Match the end of a path."""
        hits = _all(self._last, plain[plain.rfind("/") + 1 :])
        if len(hits) > 1 or "/" in plain:
            hits = [key for key in hits if f"/{fold_name(key)}".endswith(f"/{plain}")]
        return _unique(hits)

    def by_stem(self, plain: str) -> Match | None:
        """Match the last part of a path without its extension, if only one photo has it."""
        found = self._stem.get(plain)
        return Match(found, (), True) if isinstance(found, str) else None

    def stem_ending(self, plain: str) -> Match | None:
        """Match the end of a path, ignoring extensions."""
        folder, _, last = plain.rpartition("/")
        # Of `a.tif.jpg` and `a.jpg`, the first is what a program makes of `a.tif`.
        found = self._stem.get(last) or self._stem.get(without_photo_suffix(last))
        if not folder and isinstance(found, str):
            return Match(found, (), True)
        hits = [] if found is None else [found] if isinstance(found, str) else found
        if folder:
            hits = [key for key in hits if f"/{fold_name(key)}".rpartition("/")[0].endswith(f"/{folder}")]
        return _unique(hits, by_stem=True)

    def foreign_root(self, name: str, key: str) -> str:
        """Return the folder that is the source on another machine, if a name of it denotes this photo."""
        inner = without_photo_suffix(fold_name(key)[self._start :])
        return without_photo_suffix(fold_name(name)).removesuffix(inner).rstrip("/")

    def foreign(self, plain: str) -> Match | None:
        """Match a path of another machine that ends like the path of a photo within the source."""
        last = plain[plain.rfind("/") + 1 :]
        hits = [key for key in _all(self._last, last) if f"/{plain}".endswith(f"/{fold_name(key)[self._start :]}")]
        if hits:
            return _unique(hits, foreign_path=True)
        stem = without_photo_suffix(plain)
        hits = [
            key
            for key in _all(self._stem, without_photo_suffix(last))
            if f"/{stem}".endswith("/" + without_photo_suffix(fold_name(key)[self._start :]))
        ]
        return _unique(hits, by_stem=True, foreign_path=True)


def _unique(hits: list[str], *, by_stem: bool = False, foreign_path: bool = False) -> Match | None:
    if not hits:
        return None
    if len(hits) > 1:
        return Match(None, tuple(hits), by_stem, foreign_path)
    return Match(hits[0], (), by_stem, foreign_path)
