"""Listing of the photos in a folder, a folder of classes, a table or single files, each exactly once."""

from __future__ import annotations

import gc
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastfundus.data.adapters import ADAPTERS, adapter_named, detect_adapter, list_with_adapter
from fastfundus.data.classes import FolderLayout, is_normal_class, read_folders
from fastfundus.data.files import find_files, is_photo, read_list
from fastfundus.data.join import join_labels
from fastfundus.data.people import note_crowded_patients, people_from_names
from fastfundus.data.roles import is_header
from fastfundus.data.tables import TABLE_SUFFIXES, has_header
from fastfundus.errors import DataError
from fastfundus.identifiers import EyeName
from fastfundus.photo.file import missing_reason
from fastfundus.records import PHOTO_SUFFIXES, SourcePhoto, utf8_name

__all__ = ["LAYOUTS", "SourceList", "list_photos"]

LAYOUTS = ("auto", "folder", "classes", "csv")
"""Layouts of a source: any folder of photos ("folder"), folders that name classes and splits ("classes"), a label table
("csv"), or detected automatically ("auto"). The name of a public data set (`data.adapters.ADAPTERS`) may be given
instead."""


@dataclass(slots=True)
class SourceList:
    """The inputs, sorted by name, and remarks collected while listing them."""

    root: Path
    photos: list[SourcePhoto]
    notes: list[str] = field(default_factory=list)
    """Handled faults to show to the user, one line each."""
    lost: list[str] = field(default_factory=list)
    """Folders that could not be searched: inputs may be missing, so commands exit with status 1."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where patients, eyes, splits and labels come from, such as "column 'laterality' of labels.csv", by role."""


def list_photos(
    sources: Path | Iterable[Path],
    *,
    labels: Path | None = None,
    adapter: str = "auto",
    eye_codes: Mapping[str, str] | None = None,
) -> SourceList:
    """List every input once.

    Args:
        sources: folders (searched recursively), photos, tables that list photos, or .txt files with a table or with one
            path per line, relative to the file. Other files named here are inputs regardless of their extension; in
            folders, only files with an extension in `PHOTO_SUFFIXES` and files whose first bytes are those of a picture
            are.
        labels: a label table; see `data.match` for how its names denote photos.
        adapter: one of `LAYOUTS`, or the name of a public data set, which requires a single folder.
        eye_codes: "L" or "R" by cell text, for label tables that code eyes by numbers.

    Raises:
        DataError: a source does not exist, nothing was found, a label file is invalid, or a name in it denotes several
            photos.
        ConfigError: the adapter is unknown.
    """
    with _without_collection():
        return _list(sources, labels, adapter, eye_codes)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Pause the search for circular garbage, which would visit millions of new objects again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _list(
    sources: Path | Iterable[Path], labels: Path | None, adapter: str, eye_codes: Mapping[str, str] | None
) -> SourceList:
    if adapter not in LAYOUTS:
        adapter_named(adapter)
    paths = [sources] if isinstance(sources, Path) else list(sources)
    for path in paths:
        try:
            path.stat()
        except FileNotFoundError:
            raise DataError("does not exist; give a folder, a photo or a table", path=path) from None
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be opened ({error}); give a folder, a photo or a table", path=path) from None
    paths, tables, notes = _expand_lists(paths)
    listing = SourceList(_common_root(paths), [], notes)
    one_folder = len(paths) == 1 and paths[0].is_dir() and labels is None
    if adapter not in LAYOUTS and not one_folder:
        raise DataError(f"the adapter {adapter!r} reads a single folder with its own label files", path=paths[0])
    given = set(tables)
    tables += [] if labels is None else [labels]
    found: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    own = {_key(table) for table in tables}
    for path in paths:
        if path.is_dir():
            files = list(find_files(path, listing.notes, listing.lost))
            base = os.path.abspath(path)
            if one_folder and adapter not in ("folder", "classes", "csv") and _list_data_set(listing, files, adapter):
                return listing
            _take_photos(files, (str(path), base), listing, found, ignored, own)
        elif path not in given:
            _add(_key(path), str(path), listing, found)
    if ignored:
        kinds = ", ".join(f"{count} {suffix or '(no extension)'}" for suffix, count in sorted(ignored.items()))
        listing.notes.append(f"skipped files that are not photos: {kinds}")
    if adapter == "csv" and not tables:
        raise DataError("the adapter 'csv' needs a label file; give --labels FILE.csv")
    photos = _photos(found, listing, adapter, has_tables=bool(tables))
    for table in tables:
        join_labels(table, photos, listing.root, listing.notes, listing.origins, eye_codes=eye_codes)
    if tables and not found and not any(os.path.lexists(photo.path) for photo in photos.values()):
        first = next(iter(photos.values()), None)
        raise DataError(
            f"none of its {len(photos)} names is a photo here, such as {first.name[:200] if first else ''}; they "
            "count from the folder of the table: move it to the photos, or give their folder and, to prepare, this "
            "table as --labels",
            path=tables[0],
        )
    if not photos:
        raise DataError(f"contains no photos; known extensions: {', '.join(sorted(PHOTO_SUFFIXES))}", path=paths[0])
    return _finished(listing, photos.values())


def _finished(listing: SourceList, photos: Iterable[SourcePhoto]) -> SourceList:
    listing.photos = sorted(_mark_split_patients(photos, listing), key=lambda photo: photo.name)
    listing.notes += note_crowded_patients(listing.photos)
    return listing


def _expand_lists(paths: list[Path]) -> tuple[list[Path], list[Path], list[str]]:
    """Replace list files by the paths in them; return all paths, those of them that are tables, and notes.

    A text file that begins with a header is a table.
    """
    expanded: list[Path] = []
    tables: list[Path] = []
    notes: list[str] = []
    for path in paths:
        text = path.suffix.lower() == ".txt" and not path.is_dir()
        if path.suffix.lower() in TABLE_SUFFIXES or (text and has_header(path, is_header)):
            tables.append(path)
        if text and path not in tables:
            named, remarks = read_list(path)
            expanded += named
            notes += remarks
        else:
            expanded.append(path)
    return expanded, tables, notes


def _list_data_set(listing: SourceList, files: list[str], adapter: str) -> bool:
    """List a folder as the given or detected public data set; return False if none is detected."""
    names = [os.path.relpath(path, listing.root) for path in files]
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
    listing.origins |= dict.fromkeys(("patient", "eye", "split", "labels"), f"the layout of {chosen[0].title}")
    _finished(listing, photos)
    return True


def _common_root(paths: list[Path]) -> Path:
    folders = [str((path if path.is_dir() else path.parent).absolute()) for path in paths]
    return Path(os.path.commonpath(folders)) if folders else Path.cwd()


def mark_missing(photos: Iterable[SourcePhoto]) -> list[SourcePhoto]:
    """Return photos with an issue where there is no file: what vanishes later has none."""
    return [
        replace(photo, issue=reason) if photo.issue is None and (reason := missing_reason(photo.path)) else photo
        for photo in photos
    ]


def _key(path: Path) -> str:
    return os.path.normpath(path.absolute())


def _add(key: str, path: str, listing: SourceList, found: dict[str, str]) -> None:
    if key in found:
        listing.notes.append(f"{path}: given twice; it is kept as one row")
    found[key] = path


def _take_photos(
    files: Iterable[str],
    folder: tuple[str, str],
    listing: SourceList,
    found: dict[str, str],
    ignored: Counter[str],
    own: set[str],
) -> None:
    given, absolute = folder
    start = 0 if given == "." else len(given.rstrip("/")) + 1
    for path in files:
        key = f"{absolute.rstrip('/')}/{path[start:]}"
        name = path[path.rfind("/") + 1 :]
        if name.startswith("."):
            # Such as .DS_Store and ._photo.jpg of macOS.
            continue
        if is_photo(path):
            _add(key, path, listing, found)
        elif key not in own:
            ignored[os.path.splitext(name)[1].lower()] += 1


def _photos(found: Mapping[str, str], listing: SourceList, adapter: str, *, has_tables: bool) -> dict[str, SourcePhoto]:
    """Read everything that names and folders say about the photos found."""
    if not found:
        return {}
    base = os.path.commonpath([os.path.dirname(key) for key in found])
    names = _relative(found, str(listing.root))
    inner = names if base == str(listing.root) else _relative(found, base)
    layout = FolderLayout()
    if adapter == "classes" or (adapter == "auto" and not has_tables):
        layout = read_folders(inner, require_classes=adapter == "classes")
    listing.notes += layout.notes
    # Even where a table has the labels, folders of classes are no part of a patient.
    people, notes = people_from_names(_without_layout(inner, layout if layout.used else read_folders(inner)))
    listing.notes += notes
    if any(person.patient or person.eye for person in people.values()):
        listing.origins |= {"patient": "names of files and folders", "eye": "names of files and folders"}
    listing.origins |= {"split": "folders"} if layout.splits else {}
    listing.origins |= {"labels": "folders"} if layout.classes else {}
    abnormal = any(is_normal_class(name) for name in set(layout.classes.values()))
    return {
        key: _photo(Path(path), names[key], people[key], layout, key, abnormal=abnormal) for key, path in found.items()
    }


def _relative(keys: Iterable[str], base: str) -> dict[str, str]:
    """Return the paths relative to a folder that contains all of them, by key."""
    start = len(base.rstrip("/")) + 1
    return {key: utf8_name(key[start:]) for key in keys}


def _without_layout(inner: Mapping[str, str], layout: FolderLayout) -> Mapping[str, str]:
    """Remove the folders of splits and classes from paths: a patient may have one eye in each class folder.

    Splits remain if the same file name occurs in several: then numbering restarts in each of them.
    """
    if not any(layout.used.values()):
        return inner
    plain = {key: name.split("/", layout.used[key])[-1] for key, name in inner.items()}
    if layout.splits:
        splits_of: dict[str, set[str]] = defaultdict(set)
        for key, split in layout.splits.items():
            splits_of[plain[key]].add(split)
        if any(len(splits) > 1 for splits in splits_of.values()):
            return {key: f"{layout.splits.get(key, '')}/{name}".lstrip("/") for key, name in plain.items()}
    return plain


def _photo(path: Path, name: str, person: EyeName, layout: FolderLayout, key: str, *, abnormal: bool) -> SourcePhoto:
    columns: dict[str, Any] = {}
    if layout.classes:
        label = layout.classes.get(key)
        columns["class"] = label
        if abnormal and label is not None:
            columns["abnormal"] = 0.0 if is_normal_class(label) else 1.0
    return SourcePhoto(
        path=path,
        name=name,
        patient=person.patient or name,
        patient_known=person.patient is not None,
        eye=person.eye,
        split=layout.splits.get(key),
        columns=columns,
        patient_by_name=person.patient is not None,
        eye_by_name=person.eye is not None,
    )


def _mark_split_patients(photos: Iterable[SourcePhoto], listing: SourceList) -> list[SourcePhoto]:
    """Exclude patients that are in more than one given split, and note them."""
    photos = list(photos)
    splits: dict[str, set[str]] = defaultdict(set)
    for photo in photos:
        if photo.split is not None:
            splits[photo.patient].add(photo.split)
    torn = {patient for patient, names in splits.items() if len(names) > 1}
    if not torn:
        return photos
    files: dict[str, list[str]] = defaultdict(list)
    for photo in photos:
        if photo.patient in torn:
            files[photo.patient].append(photo.name)
    for patient in sorted(torn):
        listing.notes.append(
            f"patient {patient} is in {' and '.join(sorted(splits[patient]))} ({', '.join(files[patient][:4])}): "
            "excluded from all splits; assign all photos of a patient to one split"
        )
    return [replace(photo, split="excluded") if photo.patient in torn else photo for photo in photos]
