"""Declarative description of a data set: locations of its photos, meaning of its paths and tables, and pitfalls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Adapter", "Column", "Groups", "Table", "stem"]

Groups = Mapping[str, str]
"""Named groups that a pattern matched in a path; groups that did not participate are omitted."""


def stem(text: str, groups: Groups) -> str:
    """Return a file name without its extension, which differs between releases, for use as a key."""
    return text.rsplit(".", 1)[0] if text.lower().endswith((".jpg", ".jpeg", ".png", ".tif", ".ppm")) else text


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of a table, and its translation to a manifest column."""

    name: str
    """Name of the manifest column."""
    headers: tuple[str, ...]
    """Spellings in the releases of the data set; compared ignoring case, spaces, underscores and hyphens."""
    values: Mapping[str, float | str | None] | None = None
    """Values by lower-case cell text; any other text is unknown, never negative. None keeps the cell's own value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A label file of the data set."""

    file: str
    """Pattern of its path; the matched groups are passed to `key_of` and `rows_of`."""
    key: tuple[str, ...] = ()
    """Headers of the column that identifies the photo."""
    key_of: Callable[[str, Groups], str] = lambda text, groups: text
    """Computes the photo's key from that cell and the groups of the file's path."""
    columns: tuple[Column, ...] = ()
    rest: bool = False
    """True to keep all other columns too, as numbers or text."""
    delimiter: str = ","
    header: tuple[str, ...] = ()
    """Header to use for a file that has none."""
    rows_of: Callable[[Mapping[str, str], Groups], Iterable[tuple[str, dict[str, Any]]]] | None = None
    """Splits a row that describes several photos into the key and columns of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """One public data set.

    Patterns are case-insensitive regular expressions on the path within the source, with forward slashes and %20
    decoded. Leading folders are allowed, since archives often unpack into one or two extra folders. Photo patterns may
    contain the groups `id`, `patient`, `eye`, `side` (of an official split) and `class`; other groups serve masks and
    keys.
    """

    name: str
    """Value of `--adapter`."""
    title: str
    """Name shown to users."""
    photos: tuple[str, ...]
    """Patterns of the photos."""
    marks: tuple[str, ...]
    """Patterns of files that identify the data set; it is detected only if every pattern matches a file."""
    key: Callable[[Groups], str] = lambda groups: groups["id"]
    """Computes the key of a photo in the tables."""
    tables: tuple[Table, ...] = ()
    classes: Mapping[str, Mapping[str, float | str | None]] | None = None
    """Manifest columns by lower-case value of the group `class`."""
    sides: Mapping[str, str] | None = None
    """"train", "val" or "test" by lower-case value of the group `side`."""
    masks: Mapping[str, str] | None = None
    """Mask paths by name, as templates of the groups, relative to the start of the photo's pattern."""
    absent_masks: bool = False
    """True if a missing mask file means that the lesion is absent; `has_<name>` is then set to 0 or 1."""
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda columns: columns
    """Final adjustment of a photo's columns."""
    traps: tuple[str, ...] = ()
    """Pitfalls for users, one sentence each; shown when the adapter is used."""
