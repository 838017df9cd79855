"""What an adapter says about a data set: where its photos are, what their paths and tables tell, and its traps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Adapter", "Column", "Groups", "Table", "stem"]

Groups = Mapping[str, str]
"""Named groups that a pattern found in a path; those that took no part are left out."""


def stem(text: str, groups: Groups) -> str:
    """Make a key of a file name: without its ending, about which releases disagree."""
    return text.rsplit(".", 1)[0] if text.lower().endswith((".jpg", ".jpeg", ".png", ".tif", ".ppm")) else text


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of a table, and what it becomes."""

    name: str
    """Column of the manifest."""
    headers: tuple[str, ...]
    """How releases of the set spell it; compared without case and blanks."""
    values: Mapping[str, float | str | None] | None = None
    """What its texts mean, lower case; a text that is not here is unknown, never negative. None keeps numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A label file of the set."""

    file: str
    """Pattern of its path; its groups are at hand when keys are made."""
    key: tuple[str, ...] = ()
    """Headers of the column that names the photo."""
    key_of: Callable[[str, Groups], str] = lambda text, groups: text
    """Makes a photo's key of that cell and the groups of the file's path."""
    columns: tuple[Column, ...] = ()
    rest: bool = False
    """Whether all other columns are kept too, as numbers or text."""
    delimiter: str = ","
    header: tuple[str, ...] = ()
    """Header of a file that has none."""
    rows_of: Callable[[Mapping[str, str], Groups], Iterable[tuple[str, dict[str, Any]]]] | None = None
    """Takes a row apart where it describes several photos: gives key and columns of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """One public data set.

    Patterns are regular expressions on the path within the source: forward slashes, %20 undone, without regard to case;
    folders may stand before them, since archives unpack into one or two more. The groups that a photo's pattern may
    name: `id`, `patient`, `eye`, `side` (of an official split) and `class`; others serve masks and keys.
    """

    name: str
    """For `--adapter`."""
    title: str
    """What users call it."""
    photos: tuple[str, ...]
    """Patterns of its photos."""
    marks: tuple[str, ...]
    """Patterns of files that give the set away; each must be there for it to be recognised."""
    key: Callable[[Groups], str] = lambda groups: groups["id"]
    """A photo's key in the tables."""
    tables: tuple[Table, ...] = ()
    classes: Mapping[str, Mapping[str, float | str | None]] | None = None
    """What the group `class` means, lower case: columns of the manifest."""
    sides: Mapping[str, str] | None = None
    """What the group `side` means, lower case: "train", "val" or "test"."""
    masks: Mapping[str, str] | None = None
    """Columns that hold the path of a mask: templates of the groups, relative to where the photo's pattern begins."""
    absent_masks: bool = False
    """Whether a mask that is not there says that there is no such lesion: `has_<name>` is then 0 or 1."""
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda columns: columns
    """Last word on a photo's columns."""
    traps: tuple[str, ...] = ()
    """What users should know, a sentence each; said when the adapter is used."""
