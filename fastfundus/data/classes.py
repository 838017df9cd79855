"""Folders that name splits and classes, such as `train/normal/1.jpg` or `Glaucoma/2.png`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fastfundus.data.roles import SPLITS
from fastfundus.identifiers import is_patient_folder, normal_eye
from fastfundus.records import NORMAL_NAMES

__all__ = ["FolderLayout", "is_normal_class", "read_folders", "split_of"]

_MAX_SPLITS, _MAX_CLASSES, _MIN_PHOTOS_OF_A_CLASS = 6, 40, 3
_MIN_SHARE = 0.9
"""Share of the photos that must follow a layout: an overview or a mask beside them does not change it."""
_SPLIT_FOLDER = re.compile(
    r"(?:[a-z0-9][.)]\s*)?(train|training|val|valid|validation|dev|test|testing)"
    r"(?:[ _-]?(?:set|images?|imgs|data|dataset))?"
)
_DOUBTFUL = re.compile(r"suspect|ungrad|unknown|unclear|uncertain|other|poor|bad|quality|unlabel|todo", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FolderLayout:
    """Split and class of every photo according to its folders."""

    splits: dict[str, str] = field(default_factory=dict)
    """"train", "val" or "test" by key; empty if the folders name no splits."""
    classes: dict[str, str] = field(default_factory=dict)
    """Name of the class by key; empty if the folders name no classes."""
    used: dict[str, int] = field(default_factory=dict)
    """Number of leading folders of each path that name a split or a class."""
    notes: tuple[str, ...] = ()


def is_normal_class(name: str) -> bool:
    """Return whether a class means that nothing was found; a leading number or letter, as in `0_normal`, is ignored."""
    plain = " ".join(re.sub(r"[_\-.]+", " ", name).lower().split())
    bare = re.sub(r"^(\d{1,2}|[a-h]) (?=\D)", "", plain)
    return bare in _NORMAL or plain in _NORMAL


_NORMAL = {" ".join(name.replace("_", " ").split()) for name in NORMAL_NAMES} | {
    "no disease", "no diseases", "0", "grade 0", "level 0", "class 0", "normal fundus", "normal retina", "normal eye",
    "normal eyes", "healthy eye", "healthy eyes", "healthy retina", "normals", "no finding", "no findings", "non dr",
    "no abnormality", "no retinopathy", "control", "controls", "normal control", "negative", "non glaucoma",
    "no glaucoma", "not glaucoma", "glaucoma negative", "non glaucomatous",
}  # fmt: skip


def read_folders(names: Mapping[str, str], *, require_classes: bool = False) -> FolderLayout:
    """Read splits and classes from the folders of photos.

    Folders are splits if every photo is in a folder such as "train" or "test", at the same depth, and there are at
    least two. Folders are classes if every photo is one folder deeper than its split; without splits, one class must be
    called "normal" or the like, unless classes are required.

    Args:
        names: path of each photo relative to the folder that contains all of them, by key.
        require_classes: True if the user says that the folders are classes.
    """
    parents = {key: tuple(name.split("/")[:-1]) for key, name in names.items()}
    splits, position = _find_splits(parents)
    hints = [] if splits else _hint_at_splits(parents)
    rest = {
        key: parts if position is None else (*parts[:position], *parts[position + 1 :])
        for key, parts in parents.items()
        if not splits or key in splits
    }
    classes, notes = _find_classes(rest, with_splits=bool(splits), require_classes=require_classes)
    if not classes and not require_classes:
        hints += _hint_at_classes(rest)
    notes += hints
    used = {key: (1 if key in splits else 0) + (1 if key in classes else 0) for key in names}
    outside = [
        name for key, name in names.items() if (splits and key not in splits) or (classes and key not in classes)
    ]
    if outside:
        notes.append(
            f"{len(outside)} photos are in no such folder, such as {outside[0]}: they have no split and no class"
        )
    if splits:
        found = ", ".join(sorted(set(splits.values())))
        notes.insert(0, f"sub-folders interpreted as splits: {found}; use --adapter folder to ignore folders")
    return FolderLayout(splits, classes, used, tuple(notes))


def _hint_at_splits(parents: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return a note if some folders look like splits and others beside them do not."""
    first = {parts[0] for parts in parents.values() if parts}
    known = sorted(name for name in first if split_of(name))
    others = sorted(first - set(known))
    if not known or not others or len(first) > _MAX_SPLITS:
        return []
    return [
        f"the folder {known[0]!r} looks like a split, but {others[0]!r} does not: splits and classes are not read from "
        "folders; call them train, val and test, or name splits and labels in a table"
    ]


def _hint_at_classes(parents: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return a note if folders look like classes of which none is called normal."""
    counts = Counter(parts[0] for parts in parents.values() if len(parts) == 1)
    named = [name for name in counts if not is_patient_folder(name) and not normal_eye(name) and not name.isdigit()]
    if sum(counts.values()) < len(parents) or not 2 <= len(counts) <= _MAX_CLASSES or len(named) < len(counts):
        return []
    if min(counts.values()) < _MIN_PHOTOS_OF_A_CLASS:
        return []
    shown = ", ".join(sorted(counts)[:4])
    return [f"the folders {shown} may be classes: --adapter classes reads them as such"]


def _find_splits(parents: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, str], int | None]:
    for position in (0, 1):
        found = {
            key: side
            for key, parts in parents.items()
            if len(parts) > position and (side := split_of(parts[position])) is not None
        }
        if len(set(found.values())) > 1 and len(found) >= _MIN_SHARE * len(parents):
            return found, position
    return {}, None


def split_of(folder: str) -> str | None:
    """Return the split that a folder such as `train`, `a. Training Set` or `test_images` names."""
    match = _SPLIT_FOLDER.fullmatch(folder.strip().lower())
    return SPLITS.get(match[1]) if match else None


def _find_classes(
    parents: Mapping[str, tuple[str, ...]], *, with_splits: bool, require_classes: bool
) -> tuple[dict[str, str], list[str]]:
    if not with_splits and _have_folders_of_people(parents):
        parents = {key: parts[:1] for key, parts in parents.items()}
    fitting = sum(len(parts) == 1 for parts in parents.values())
    if not parents or (fitting < _MIN_SHARE * len(parents) and not require_classes):
        return {}, []
    if not require_classes:
        parents = {key: parts for key, parts in parents.items() if len(parts) == 1}
    spellings: dict[str, dict[str, None]] = defaultdict(dict)
    for parts in parents.values():
        if parts:
            spellings[parts[0].strip().lower()].setdefault(parts[0])
    has_normal = any(is_normal_class(name) for name in spellings)
    if not (require_classes or has_normal or (with_splits and len(spellings) > 1)):
        return {}, []
    first = {plain: next(iter(names)) for plain, names in spellings.items()}
    classes = {key: first[parts[0].strip().lower()] for key, parts in parents.items() if parts}
    return classes, _describe(sorted(first.values()), spellings.values(), has_normal=has_normal)


def _have_folders_of_people(parents: Mapping[str, tuple[str, ...]]) -> bool:
    """Return whether the folders are `class / patient`: one class is normal, and the folders below are many."""
    if not parents or not all(len(parts) == 2 for parts in parents.values()):
        return False
    classes = {parts[0] for parts in parents.values()}
    people = {parts[1] for parts in parents.values()}
    return (
        any(map(is_normal_class, classes)) and not any(map(split_of, classes)) and all(map(is_patient_folder, people))
    )


def _describe(classes: list[str], spellings: Iterable[Mapping[str, None]], *, has_normal: bool) -> list[str]:
    notes = [f"sub-folders interpreted as classes: {', '.join(classes)}; use --adapter folder to ignore folders"]
    same = [" and ".join(names) for names in spellings if len(names) > 1]
    if same:
        notes.append(f"classes that differ only by case are one class: {'; '.join(same)}")
    if not has_normal:
        notes.append(
            "no class is called normal or the like, so that there is no label 'abnormal'; 'class' has the names"
        )
        return notes
    doubtful = [name for name in classes if _DOUBTFUL.search(name)]
    if doubtful:
        notes.append(
            f"{', '.join(doubtful)} count as abnormal, as all classes but {_normal_names(classes)}: move these photos "
            "elsewhere, or give --labels, if that is wrong"
        )
    return notes


def _normal_names(classes: list[str]) -> str:
    return " and ".join(name for name in classes if is_normal_class(name))
