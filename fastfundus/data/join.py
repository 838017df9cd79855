"""Joining of a label table to the photos it describes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from fastfundus.data.cache import MANIFEST_COLUMNS
from fastfundus.data.classes import split_of
from fastfundus.data.labels import LabelRow, LabelTable, read_labels
from fastfundus.data.match import Match, fold_name, match_listed, match_names
from fastfundus.data.people import people_from_names
from fastfundus.errors import DataError
from fastfundus.identifiers import is_patient_folder
from fastfundus.photo.file import is_unmounted
from fastfundus.records import SourcePhoto, utf8_name

__all__ = ["join_labels"]

_MAX_SHOWN = 3


def join_labels(
    path: Path,
    photos: dict[str, SourcePhoto],
    root: Path,
    notes: list[str],
    origins: dict[str, str],
    *,
    eye_codes: Mapping[str, str] | None = None,
) -> None:
    """Join a label table to photos; rows without a photo become inputs with an issue.

    Args:
        path: the table.
        photos: photos by normalised absolute path; updated.
        root: folder to which names of photos are relative.
        notes: receives handled faults.
        origins: receives the columns from which patients, eyes, splits and labels come.
        eye_codes: see `read_labels`.

    Raises:
        DataError: the table is invalid, a name denotes several photos, or two rows describe one photo differently.
    """
    table = _without_clashes(read_labels(path, eye_codes=eye_codes))
    names = [row.file for row in table.rows]
    matches = match_names(names, photos, (root, path.parent), str(root)) if photos else match_listed(names, path.parent)
    _settle_by_folders(table, matches, root)
    _require_unique(table, matches)
    _require_own_folders(table, matches, root)
    notes += table.notes
    if not photos:
        _add_listed(table, matches, photos, root, notes)
    named: dict[str, LabelRow] = {}
    contradicted: list[str] = []
    absolute, has_patients = os.path.abspath(root), "patient" in table.roles
    unmounted = lru_cache(maxsize=1024)(is_unmounted)
    for row, match in zip(table.rows, matches, strict=True):
        key = match.key or os.path.normpath(os.path.join(absolute, row.file.replace("\0", "\\0")))
        issue = None
        # What lies on a share that is not mounted is not missing: reading it fails, and is tried again.
        if match.key is None and not unmounted(Path(key).parent):
            issue = f"named in {path.name}, line {row.line}, but missing; correct the name or delete the row"
        other = named.setdefault(key, row)
        if other is not row:
            raise DataError(
                f"lines {other.line} ({other.file}) and {row.line} ({row.file}) name the same photo, "
                f"{os.path.relpath(key, root)}; delete or correct one of them",
                path=path,
            )
        if (photo := photos.get(key)) is None:
            photo = photos[key] = _bare_photo(key, root)
        if photo.eye and row.eye and photo.eye != row.eye:
            contradicted.append(photo.name)
        _add_row(photo, row, issue, has_patients=has_patients)
    if contradicted:
        notes.append(
            f"{path}: contradicts the eye in the names of {len(contradicted)} photos, such as {contradicted[0]}; the "
            "table is believed"
        )
    notes += _notes_on_matches(table, matches, photos, named)
    for role, header in table.roles.items():
        origins[role] = f"column {header!r} of {path.name}"
    origins["labels"] = path.name


@lru_cache(maxsize=4096)
def _folders(parent: str, root: str) -> tuple[str, ...]:
    """Return the folders of photos in a folder below the source, without differences of case."""
    inner = os.path.relpath(parent, root)
    return () if inner == "." else tuple(map(fold_name, inner.split("/")))


def _folders_of(key: str, root: Path) -> tuple[str, ...]:
    return _folders(_parent(key), str(root))


def _parent(key: str) -> str:
    return key[: key.rfind("/")]


def _settle_by_folders(table: LabelTable, matches: list[Match], root: Path) -> None:
    """Of several photos of one name, choose the one in the folder of the row's patient and split."""
    for position, match in enumerate(matches):
        row = table.rows[position]
        if not match.candidates or "/" in row.file:
            continue
        fitting = list(match.candidates)
        if row.patient is not None:
            fitting = [key for key in fitting if fold_name(row.patient) in _folders_of(key, root)] or fitting
        if row.split is not None:
            fitting = [key for key in fitting if row.split in map(split_of, _folders_of(key, root))] or fitting
        if len(fitting) == 1:
            matches[position] = Match(fitting[0], (), match.by_stem, match.foreign_path)


def _require_own_folders(table: LabelTable, matches: list[Match], root: Path) -> None:
    """Raise if a name without a folder fits a photo in the folder of another patient only; note other splits."""
    folders_of = {parent: _folders(parent, str(root)) for parent in {_parent(m.key) for m in matches if m.key}}
    names = {folder for folders in folders_of.values() for folder in folders}
    people = any(map(is_patient_folder, names)) or not names.isdisjoint(
        fold_name(patient) for patient in {row.patient for row in table.rows} if patient
    )
    if not people and not any(map(split_of, names)):
        return
    agreeing, strange, torn = 0, [], []
    for row, match in zip(table.rows, matches, strict=True):
        if match.key is None or "/" in row.file or not (folders := folders_of[_parent(match.key)]):
            continue
        if row.split is not None and {row.split} != {split_of(folder) or row.split for folder in folders}:
            torn.append((row, match.key))
        patient = fold_name(row.patient) if row.patient and people else None
        if patient in folders:
            agreeing += 1
        elif patient is not None:
            alike = is_patient_folder(patient) and any(map(is_patient_folder, folders))
            strange.append((row, match.key, alike))
    if torn:
        row, key = torn[0]
        table.notes.append(
            f"{table.path}: {len(torn)} rows have another split than the folder of their photo, such as line "
            f"{row.line} ({row.split}, {os.path.relpath(key, root)}); the table is believed"
        )
    for row, key, alike in strange:
        # Grades are folders with numbers, too, which some patients have by chance.
        chance = 3 if (row.patient or "").isdigit() else 1
        if alike or agreeing >= chance * len(strange):
            raise DataError(
                f"{row.file} of patient {row.patient} fits only {os.path.relpath(key, root)}, in the folder of another "
                "patient; write the folder before the name, or delete the row",
                path=table.path,
                row=row.line,
            )


def _require_unique(table: LabelTable, matches: list[Match]) -> None:
    """Raise if a row denotes several photos."""
    ambiguous = [(row, match) for row, match in zip(table.rows, matches, strict=True) if match.candidates]
    if ambiguous:
        row, match = ambiguous[0]
        shown = " and ".join(match.candidates[:_MAX_SHOWN])
        more = f"; so do {len(ambiguous) - 1} other rows" if len(ambiguous) > 1 else ""
        raise DataError(
            f"{row.file} fits {len(match.candidates)} photos ({shown}){more}; write the folder before the name",
            path=table.path,
            row=row.line,
        )


def _add_listed(
    table: LabelTable, matches: list[Match], photos: dict[str, SourcePhoto], root: Path, notes: list[str]
) -> None:
    """Add the photos of a table that is the source itself, with what their names say."""
    names = {match.key: utf8_name(os.path.relpath(match.key, root)) for match in matches if match.key is not None}
    people, remarks = people_from_names(names)
    if "patient" not in table.roles:
        notes += remarks
    for key, person in people.items():
        photos[key] = SourcePhoto(
            path=Path(key),
            name=names[key],
            patient=person.patient or names[key],
            patient_known=person.patient is not None,
            eye=person.eye,
            patient_by_name=person.patient is not None,
            eye_by_name=person.eye is not None,
        )


def _bare_photo(key: str, root: Path) -> SourcePhoto:
    name = utf8_name(os.path.relpath(key, root).replace(os.sep, "/"))
    return SourcePhoto(path=Path(key), name=name, patient=name)


def _notes_on_matches(
    table: LabelTable, matches: list[Match], photos: Mapping[str, SourcePhoto], named: Mapping[str, LabelRow]
) -> list[str]:
    notes = []
    for what, chosen in (
        ("without regard to extensions", [at for at, match in enumerate(matches) if match.by_stem]),
        (
            "by the end of their paths, which are those of another machine",
            [at for at, match in enumerate(matches) if match.foreign_path],
        ),
    ):
        if chosen:
            row, match = table.rows[chosen[0]], matches[chosen[0]]
            notes.append(
                f"{table.path}: {len(chosen)} names were matched {what}, such as {row.file} "
                f"to {photos[str(match.key)].name}"
            )
    unnamed = [] if len(named) == len(photos) else [photo.name for key, photo in photos.items() if key not in named]
    if unnamed:
        notes.append(
            f"{table.path}: has no row for {len(unnamed)} of the photos found, such as {unnamed[0]}; labels unknown"
        )
    return notes


def _without_clashes(table: LabelTable) -> LabelTable:
    """Rename label columns that clash with manifest columns, such as `path`."""
    clashes = [name for name in (table.rows[0].columns if table.rows else {}) if name in MANIFEST_COLUMNS]
    if not clashes:
        return table
    for name in clashes:
        table.notes.append(f"{table.path}: column {name!r} is stored as 'label_{name}': the manifest uses its name")
    renamed = {name: f"label_{name}" for name in clashes}
    for row in table.rows:
        columns = {renamed.get(name, name): value for name, value in row.columns.items()}
        row.columns.clear()
        row.columns.update(columns)
    return table


def _add_row(photo: SourcePhoto, row: LabelRow, issue: str | None, *, has_patients: bool) -> None:
    """Add what a row says to its photo; in place, because a million new ones would take a second."""
    if row.patient is not None:
        photo.patient, photo.patient_known, photo.patient_by_name = row.patient, True, False
    elif has_patients and photo.patient_by_name:
        # A table with patients is not completed by names: the two would call one person by two identifiers.
        photo.patient, photo.patient_known, photo.patient_by_name = photo.name, False, False
    if row.eye is not None:
        photo.eye, photo.eye_by_name = row.eye, False
    if row.split is not None:
        photo.split = row.split
    photo.camera, photo.issue = row.camera, issue
    photo.columns = {**photo.columns, **row.columns} if photo.columns else row.columns
