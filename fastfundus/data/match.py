"""The one rule by which a name in a table or list denotes a file.

A name matches, in this order: the whole path; the whole path ignoring case and Unicode form; the end of a path; the end
of a path without extensions; and, only if no name of the table agrees with the folders at all, the bare file name,
because tables often carry the paths of another machine. A match that is not unique is an error: nobody may get the
labels of someone else.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastfundus.records import PHOTO_SUFFIXES

__all__ = ["Match", "fold_name", "match_listed", "match_names", "without_photo_suffix"]

_Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """The file that a name denotes."""

    key: str | None
    """Key of the file, or None if it is missing or ambiguous."""
    candidates: tuple[str, ...] = ()
    """The keys that fit equally well, if there are several."""
    by_stem: bool = False
    """True if the extensions differ, or one is absent."""
    by_bare_name: bool = False
    """True if the folders disagree."""


def fold_name(name: str) -> str:
    """Return a name without differences of case, Unicode normal form and direction of slashes."""
    return unicodedata.normalize("NFC", name).casefold().replace("\\", "/")


def without_photo_suffix(name: str) -> str:
    """Return a name without the extension of a photo; numbers at the end of DICOM identifiers are no extension."""
    path = PurePosixPath(name)
    if path.suffix.lower() == ".gz":
        name, path = name[:-3], PurePosixPath(path.stem)
    return name.removesuffix(path.suffix) if path.suffix.lower() in PHOTO_SUFFIXES else name


def match_names(names: Sequence[str], keys: Iterable[str], folders: Sequence[Path]) -> list[Match]:
    """Find the file that each name denotes.

    Args:
        names: paths or parts of paths, as written in a table.
        keys: normalised absolute paths of the photos found.
        folders: folders to which names may be relative, by precedence. A file that exists there counts, too.

    Returns:
        A match for each name.
    """
    found = dict.fromkeys(keys)
    bases = [os.path.abspath(folder) for folder in folders]
    matches: list[Match | None] = [_whole(name, found, bases) for name in names]
    if all(match is not None for match in matches):
        return [match for match in matches if match is not None]
    photos = {key: _parts(key) for key in found}
    folded = {"/".join(parts): key for key, parts in photos.items()}
    exact, stem = _by_last(photos, lambda part: part), _by_last(photos, without_photo_suffix)
    weak: list[int] = []
    folders_agree = any(match is not None and _has_folder(name) for match, name in zip(matches, names, strict=True))
    for index, name in enumerate(names):
        if matches[index] is not None:
            continue
        parts = _parts(name)
        whole = next((folded[p] for base in bases if (p := "/".join((*_parts(base), *parts))) in folded), None)
        match = Match(whole) if whole else _ending(parts, exact, photos) or _stem_ending(parts, stem, photos)
        matches[index] = match
        if match is None:
            weak.append(index)
        elif len(parts) > 1:
            folders_agree = True
    for index in weak:
        # Where folders tell files apart, a name with another folder is another file.
        matches[index] = Match(None) if folders_agree else _bare(_parts(names[index]), exact, stem)
    return [match or Match(None) for match in matches]


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
    # A list names folders, so that a bare name in another folder is another file.
    return [Match(None) if match.by_bare_name and not match.candidates else match for match in again]


def _whole(name: str, found: dict[str, None], bases: list[str]) -> Match | None:
    if "\0" in name:
        return Match(None)
    places = [os.path.normpath(os.path.join(base, name)) for base in bases]
    for place in places:
        if place in found:
            return Match(place)
    for place in places:
        if len(os.path.basename(place)) <= 255 and os.path.isfile(place):
            return Match(place)
    return None


def _parts(name: str) -> _Parts:
    """Split a path into folded parts, without a drive letter, "." and empty parts."""
    plain = re.sub(r"^[a-z]:", "", fold_name(name))
    return tuple(part for part in plain.split("/") if part not in ("", "."))


def _has_folder(name: str) -> bool:
    return len(_parts(name)) > 1


def _by_last(photos: dict[str, _Parts], change: Callable[[str], str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = defaultdict(list)
    for key, parts in photos.items():
        index[change(parts[-1])].append(key)
    return index


def _ending(parts: _Parts, index: dict[str, list[str]], photos: dict[str, _Parts]) -> Match | None:
    """Match names that are the end of a path."""
    if not parts:
        return None
    hits = [key for key in index.get(parts[-1], ()) if photos[key][-len(parts) :] == parts]
    return _unique(hits)


def _stem_ending(parts: _Parts, index: dict[str, list[str]], photos: dict[str, _Parts]) -> Match | None:
    """Match names that are the end of a path if extensions are ignored."""
    if not parts:
        return None
    hits = [
        key for key in index.get(without_photo_suffix(parts[-1]), ()) if photos[key][-len(parts) : -1] == parts[:-1]
    ]
    return _unique(hits, by_stem=True)


def _bare(parts: _Parts, exact: dict[str, list[str]], stem: dict[str, list[str]]) -> Match | None:
    if not parts:
        return None
    match = _unique(exact.get(parts[-1], []), by_bare_name=True)
    return match or _unique(stem.get(without_photo_suffix(parts[-1]), []), by_stem=True, by_bare_name=True)


def _unique(hits: list[str], *, by_stem: bool = False, by_bare_name: bool = False) -> Match | None:
    if not hits:
        return None
    if len(hits) > 1:
        return Match(None, tuple(hits), by_stem, by_bare_name)
    return Match(hits[0], (), by_stem, by_bare_name)
