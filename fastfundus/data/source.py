"""Listing of the photos in a folder, a folder of classes, a CSV or single files, each exactly once."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastfundus.data.adapters import ADAPTERS, adapter_named, detect_adapter, list_with_adapter
from fastfundus.data.cache import MANIFEST_COLUMNS
from fastfundus.data.labels import LabelRow, LabelTable, normal_eye, read_labels
from fastfundus.errors import DataError
from fastfundus.records import NORMAL_NAMES, PHOTO_SUFFIXES, SourcePhoto, utf8_name

__all__ = ["LAYOUTS", "SourceList", "list_photos"]

LAYOUTS = ("auto", "folder", "classes", "csv")
"""Layouts of a source: any folder of photos ("folder"), one sub-folder per class ("classes"), a label CSV ("csv"), or
detected automatically ("auto"). The name of a public data set (`data.adapters.ADAPTERS`) may be given instead."""
_NORMAL_CLASSES = NORMAL_NAMES | {"no_disease", "no disease", "0"}
_EYE_IN_NAME = re.compile(r"^(?P<patient>.+?)[_\-. ](?P<eye>left|right|od|os|oi|og|l|r)(?:[_\-. ].*)?$", re.IGNORECASE)


@dataclass(slots=True)
class SourceList:
    """The inputs, sorted by name, and remarks collected while listing them."""

    root: Path
    photos: list[SourcePhoto]
    notes: list[str] = field(default_factory=list)
    """Handled faults to show to the user, one line each."""
    lost: list[str] = field(default_factory=list)
    """Folders that could not be searched: inputs may be missing, so commands exit with status 1."""


def list_photos(sources: Path | Iterable[Path], *, labels: Path | None = None, adapter: str = "auto") -> SourceList:
    """List every input once.

    Args:
        sources: folders (searched recursively), photos, CSV files that list photos, or .txt files with one path per
            line, relative to the file. Other files named here are inputs regardless of their extension; in folders,
            only files with an extension in `PHOTO_SUFFIXES` and DICOM files without one are.
        labels: a label CSV whose file column is relative to the source or to the CSV, or is a unique file name.
        adapter: one of `LAYOUTS`, or the name of a public data set, which requires a single folder.

    Raises:
        DataError: a source does not exist, nothing was found, or a label file is invalid.
        ConfigError: the adapter is unknown.
    """
    if adapter not in LAYOUTS:
        adapter_named(adapter)
    paths = [sources] if isinstance(sources, Path) else list(sources)
    for path in paths:
        if not path.exists():
            raise DataError("does not exist; give a folder, a photo or a CSV file", path=path)
    paths = [named for path in paths for named in (_lines(path) if path.suffix.lower() == ".txt" else [path])]
    listing = SourceList(_common_root(paths), [])
    tables = [] if labels is None else [labels]
    found: dict[str, Path] = {}
    ignored: Counter[str] = Counter()
    one_folder = len(paths) == 1 and paths[0].is_dir() and labels is None
    if adapter not in LAYOUTS and not one_folder:
        raise DataError(f"the adapter {adapter!r} reads a single folder with its own label files", path=paths[0])
    for path in paths:
        if path.is_dir():
            files = list(_files(path, listing))
            if one_folder and adapter not in ("folder", "classes", "csv") and _list_data_set(listing, files, adapter):
                return listing
            _take_photos(files, listing, found, ignored, own={_key(table) for table in tables})
        elif path.suffix.lower() == ".csv":
            tables.append(path)
        else:
            _add(path, listing, found)
    if ignored:
        kinds = ", ".join(f"{count} {suffix or '(no extension)'}" for suffix, count in sorted(ignored.items()))
        listing.notes.append(f"skipped files without the extension of a photo: {kinds}")
    base = _common_root(list(found.values())) if found else listing.root
    photos = {key: _from_name(path, listing.root, base) for key, path in found.items()}
    if adapter == "csv" and not tables:
        raise DataError("the adapter 'csv' needs a label file; give --labels FILE.csv")
    for table in tables:
        _apply_labels(table, listing, photos)
    if adapter == "classes" or (adapter == "auto" and not tables and _looks_like_classes(photos.values())):
        photos = {key: _with_class(photo) for key, photo in photos.items()}
        classes = sorted({str(photo.columns["class"]) for photo in photos.values()})
        listing.notes.append(f"sub-folders interpreted as classes: {', '.join(classes)}")
    if not photos:
        raise DataError(f"contains no photos; known extensions: {', '.join(sorted(PHOTO_SUFFIXES))}", path=paths[0])
    return _finished(listing, photos.values())


def _finished(listing: SourceList, photos: Iterable[SourcePhoto]) -> SourceList:
    listing.photos = sorted(_mark_split_patients(photos, listing), key=lambda photo: photo.name)
    return listing


def _list_data_set(listing: SourceList, files: list[Path], adapter: str) -> bool:
    """List a folder as the given or detected public data set; return False if none is detected."""
    names = [os.path.relpath(path.absolute(), listing.root) for path in files]
    chosen = [adapter_named(adapter)] if adapter != "auto" else detect_adapter(names, ADAPTERS.values())
    if len(chosen) > 1:
        sets = " and ".join(f"{entry.title} (--adapter {entry.name})" for entry in chosen)
        listing.notes.append(f"looks like {sets}; read as plain files: choose one of them to get its labels")
    if len(chosen) != 1:
        return False
    if adapter == "auto":
        listing.notes.append(f"looks like {chosen[0].title}, read as such; use --adapter folder to read plain files")
    photos, notes = list_with_adapter(listing.root, names, chosen[0])
    listing.notes += notes
    _finished(listing, photos)
    return True


def _common_root(paths: list[Path]) -> Path:
    folders = [str((path if path.is_dir() else path.parent).absolute()) for path in paths]
    return Path(os.path.commonpath(folders)) if folders else Path.cwd()


def _name(path: Path, root: Path) -> str:
    return utf8_name(Path(os.path.relpath(path, root)).as_posix())


def _lines(path: Path) -> list[Path]:
    """Read the paths in a list file, ignoring empty lines and lines that begin with #."""
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", path=path) from None
    named = [path.parent / line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not named:
        raise DataError("names no photo; give one path per line", path=path)
    return named


def _key(path: Path) -> str:
    return os.path.normpath(path.absolute())


def _add(path: Path, listing: SourceList, found: dict[str, Path]) -> None:
    if _key(path) in found:
        listing.notes.append(f"{path}: given twice; it is kept as one row")
    found[_key(path)] = path


def _take_photos(
    files: Iterable[Path], listing: SourceList, found: dict[str, Path], ignored: Counter[str], own: set[str]
) -> None:
    for path in files:
        if not path.name.startswith(".") and _is_photo_by_name(path):
            _add(path, listing, found)
        elif _key(path) not in own:
            ignored[path.suffix.lower()] += 1


def _is_photo_by_name(path: Path) -> bool:
    """Return whether a file is a photo: by its extension, or as DICOM without one, as on exported study disks."""
    # Photos may be gzipped, as in STARE.
    ending = Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix
    # File names that are DICOM identifiers end in a number.
    if (ending and not ending[1:].isdigit()) or path.name == "DICOMDIR":
        return ending.lower() in PHOTO_SUFFIXES
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _files(folder: Path, listing: SourceList) -> Iterator[Path]:
    """Yield every file below a folder, sorted; folders that cannot be searched are recorded as lost."""

    def complain(error: OSError) -> None:
        listing.lost.append(f"{error.filename}: cannot be searched ({error.strerror}); run chmod +rx on it")

    for parent, folders, files in os.walk(folder, onerror=complain):
        # Hidden folders contain thumbnails and trash; sorting makes runs reproducible.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # os.walk does not follow links to folders, which could form a cycle.
        listing.notes += [
            f"{Path(parent) / name}: links to folders are not followed; give the target to include its photos"
            for name in folders
            if os.path.islink(os.path.join(parent, name))
        ]
        yield from (Path(parent) / name for name in sorted(files))


def _from_name(path: Path, root: Path, base: Path) -> SourcePhoto:
    """Read patient and eye from names such as `123_left.jpg` or `Patient007_R.jpg`; `base` contains all photos."""
    name = _name(path, root)
    match = _EYE_IN_NAME.match(path.stem)
    if match is None:
        return SourcePhoto(path=path, name=name, patient=name)
    # The folder is part of the patient identifier: numbering often restarts in every folder.
    folder = _name(path.parent, base)
    patient = match["patient"] if folder == "." else f"{folder}/{match['patient']}"
    return SourcePhoto(path=path, name=name, patient=patient, patient_known=True, eye=normal_eye(match["eye"]))


def _apply_labels(table_path: Path, listing: SourceList, photos: dict[str, SourcePhoto]) -> None:
    """Join a label file to the photos; rows without a photo become inputs with an issue."""
    table = _without_clashes(read_labels(table_path))
    listing.notes += table.notes
    by_name: dict[str, list[str]] = defaultdict(list)
    for place in photos:
        by_name[Path(place).name].append(place)
    named: set[str] = set()
    for row in table.rows:
        candidates = [listing.root / row.file, table_path.parent / row.file]
        key: str | None = next((_key(path) for path in candidates if _key(path) in photos or path.is_file()), None)
        same_name = by_name.get(Path(row.file).name, [])
        if key is None and len(same_name) == 1:
            key = same_name[0]
        issue = None
        if key is None:
            key = _key(candidates[0])
            issue = f"named in {table_path.name}, line {row.line}, but missing; correct the name or delete the row"
            if len(same_name) > 1:
                issue = f"{table_path.name}, line {row.line}: {len(same_name)} files have this name; add the folder"
        path = Path(key)
        photo = photos.get(key) or _from_name(path, listing.root, listing.root)
        photos[key] = replace(_with_row(photo, row), issue=issue)
        named.add(key)
    unnamed = [photo.name for key, photo in photos.items() if key not in named]
    if unnamed:
        listing.notes.append(
            f"{table_path}: has no row for {len(unnamed)} of the photos found, such as {unnamed[0]}; labels unknown"
        )


def _without_clashes(table: LabelTable) -> LabelTable:
    """Rename label columns that clash with manifest columns, such as `path`."""
    clashes = [name for name in (table.rows[0].columns if table.rows else {}) if name in MANIFEST_COLUMNS]
    for name in clashes:
        table.notes.append(f"{table.path}: column {name!r} is stored as 'label_{name}': the manifest uses its name")
    renamed = {name: f"label_{name}" for name in clashes}
    for row in table.rows:
        columns = {renamed.get(name, name): value for name, value in row.columns.items()}
        row.columns.clear()
        row.columns.update(columns)
    return table


def _with_row(photo: SourcePhoto, row: LabelRow) -> SourcePhoto:
    return replace(
        photo,
        patient=row.patient or photo.patient,
        patient_known=photo.patient_known or row.patient is not None,
        eye=row.eye or photo.eye,
        split=row.split,
        camera=row.camera,
        columns={**photo.columns, **row.columns},
    )


def _looks_like_classes(photos: Iterable[SourcePhoto]) -> bool:
    """Return whether all photos are in direct sub-folders, one of which has a name such as "normal"."""
    parents = [Path(photo.name).parent.parts for photo in photos]
    return bool(parents) and all(len(parts) == 1 for parts in parents) and any(_is_normal(p[0]) for p in parents)


def _is_normal(name: str) -> bool:
    return name.strip().lower() in _NORMAL_CLASSES


def _with_class(photo: SourcePhoto) -> SourcePhoto:
    name = Path(photo.name).parts[0] if len(Path(photo.name).parts) > 1 else ""
    columns: dict[str, Any] = {**photo.columns, "class": name or None}
    if name:
        columns["abnormal"] = 0.0 if _is_normal(name) else 1.0
    # A patient may have one eye in each class folder, so class folders are not part of the patient identifier.
    patient = photo.patient.removeprefix(f"{name}/") if photo.patient_known else photo.patient
    return replace(photo, columns=columns, patient=patient)


def _mark_split_patients(photos: Iterable[SourcePhoto], listing: SourceList) -> list[SourcePhoto]:
    """Exclude patients that the label file assigns to more than one split, and note them."""
    photos = list(photos)
    splits: dict[str, set[str]] = defaultdict(set)
    for photo in photos:
        if photo.split is not None:
            splits[photo.patient].add(photo.split)
    torn = {patient for patient, names in splits.items() if len(names) > 1}
    for patient in sorted(torn):
        files = [photo.name for photo in photos if photo.patient == patient]
        listing.notes.append(
            f"patient {patient} is in {' and '.join(sorted(splits[patient]))} ({', '.join(files[:4])}): "
            "excluded from all splits; assign all photos of a patient to one split"
        )
    return [replace(photo, split="excluded") if photo.patient in torn else photo for photo in photos]
