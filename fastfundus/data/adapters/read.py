"""Reading of a folder according to an adapter."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fastfundus.data.adapters.entry import Adapter, Column, Groups, Table
from fastfundus.data.labels import value_of
from fastfundus.data.tables import UNKNOWN, read_cells
from fastfundus.errors import DataError
from fastfundus.identifiers import normal_eye
from fastfundus.records import PHOTO_SUFFIXES, SourcePhoto, utf8_name

__all__ = ["detect_adapter", "list_with_adapter"]


def detect_adapter(paths: Sequence[str], adapters: Iterable[Adapter]) -> list[Adapter]:
    """Return the adapters that match a set of paths.

    Args:
        paths: all files of the source, relative, with forward slashes.
        adapters: the adapters to try.
    """
    plain = [unquote(path) for path in paths]
    return [
        adapter
        for adapter in adapters
        if all(any(_match(mark, path) for path in plain) for mark in adapter.marks)
        and any(_first_match(adapter.photos, path) for path in plain)
    ]


def list_with_adapter(root: Path, paths: Sequence[str], adapter: Adapter) -> tuple[list[SourcePhoto], list[str]]:
    """List the photos of a data set with its labels.

    Args:
        root: the folder of the data set.
        paths: all files in it, relative, with forward slashes.
        adapter: the adapter of the data set.

    Returns:
        The photos, and notes for the user, one line each.

    Raises:
        DataError: no photo matches the adapter, or a table cannot be read.
    """
    found = {path: match for path in paths if (match := _first_match(adapter.photos, unquote(path))) is not None}
    found = {path: match for path, match in found.items() if Path(path).suffix.lower() in (*PHOTO_SUFFIXES, ".gz")}
    if not found:
        raise DataError(
            f"no photo lies where {adapter.title} keeps its photos; give the folder as it was unpacked, or use "
            "--adapter folder to read it as an ordinary folder",
            path=root,
        )
    notes = [f"{adapter.title}: {len(found)} photos"]
    rows = _read_tables(root, paths, adapter, notes)
    present = {unquote(path).lower() for path in paths}
    photos, used = [], set()
    for path, (groups, prefix) in found.items():
        key = adapter.key(groups).lower()
        used.add(key)
        columns: dict[str, Any] = {}
        if adapter.classes is not None:
            columns |= _class_columns(adapter, groups, path, notes)
        columns |= rows.get(key, {})
        columns |= _masks(adapter, groups, prefix, present)
        side = (adapter.sides or {}).get(groups.get("side", "").lower())
        if side is not None:
            columns.setdefault("official_split", side)
        photos.append(_photo(root, path, groups, adapter.finish(columns)))
    _note_leftovers(adapter, rows, used, paths, found, notes)
    notes += [f"{adapter.title}: {trap}" for trap in adapter.traps]
    return _with_official_split(_with_all_columns(photos)), notes


def _photo(root: Path, path: str, groups: Groups, columns: dict[str, Any]) -> SourcePhoto:
    patient = columns.pop("patient", None)
    if isinstance(patient, float) and patient.is_integer():
        patient = int(patient)
    patient = groups.get("patient") if patient is None else str(patient)
    eye = normal_eye(columns.pop("eye", None) or groups.get("eye"))
    camera = columns.pop("camera", None)
    name = utf8_name(path)
    return SourcePhoto(
        path=root / path,
        name=name,
        patient=patient or name,
        patient_known=patient is not None,
        eye=eye,
        camera=camera,
        columns=columns,
    )


def _match(pattern: str, path: str) -> re.Match[str] | None:
    # Match as few leading folders as possible, so that an optional side is not taken for one of them.
    return re.fullmatch(rf"(?P<_prefix>(?:.*?/)??)(?:{pattern})", path, re.IGNORECASE)


def _first_match(patterns: Iterable[str], path: str) -> tuple[dict[str, str], str] | None:
    for pattern in patterns:
        match = _match(pattern, path)
        if match is not None:
            groups = {name: text for name, text in match.groupdict().items() if text is not None}
            return groups, groups.pop("_prefix")
    return None


def _class_columns(adapter: Adapter, groups: Groups, path: str, notes: list[str]) -> dict[str, Any]:
    assert adapter.classes is not None
    name = groups.get("class", "").lower()
    if not name:
        return {}
    if name not in adapter.classes:
        notes.append(f"{path}: class {name!r} is unknown in {adapter.title}; labels set to unknown")
        return {}
    return dict(adapter.classes[name])


def _masks(adapter: Adapter, groups: Groups, prefix: str, present: set[str]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name, template in (adapter.masks or {}).items():
        # Folders and extensions differ between archives: use the first path that exists.
        choices = [
            prefix + choice.format(**groups)
            for choice in template.split("|")
            if all(field in groups for field in re.findall(r"\{(\w+)\}", choice))
        ]
        if not choices:
            continue
        place = next((choice for choice in choices if choice.lower() in present), None)
        columns[f"mask_{name}"] = place
        if adapter.absent_masks:
            columns[f"has_{name}"] = float(place is not None)
    return columns


def _read_tables(root: Path, paths: Sequence[str], adapter: Adapter, notes: list[str]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for table in adapter.tables:
        files = [(path, match) for path in paths if (match := _first_match((table.file,), unquote(path)))]
        for path, (groups, _) in files:
            for line, cells in _read_cells(root / path, table):
                for key, columns in _rows_of(table, cells, groups, f"{path}, line {line}", notes):
                    known = rows.setdefault(key.lower(), {})
                    for name, value in columns.items():
                        if value is not None and known.get(name) not in (None, value):
                            notes.append(f"{path}, line {line}: conflicting {name} values for {key}; set to unknown")
                            known[name] = None
                        elif known.get(name) is None:
                            known[name] = value
    return rows


def _rows_of(
    table: Table, cells: Mapping[str, str], groups: Groups, place: str, notes: list[str]
) -> Iterable[tuple[str, dict[str, Any]]]:
    if table.rows_of is not None:
        yield from table.rows_of(cells, groups)
        return
    plain = {_plain(header): text.strip() for header, text in cells.items()}
    cell = next((plain[_plain(header)] for header in table.key if _plain(header) in plain), None)
    if cell is None:
        raise DataError(f"{place}: has no column {' or '.join(table.key)}; columns: {', '.join(cells)}")
    key = table.key_of(cell, groups) if cell else ""
    if not key:
        return
    columns = {}
    taken = {_plain(header) for header in table.key}
    for column in table.columns:
        header = next((_plain(header) for header in column.headers if _plain(header) in plain), None)
        if header is not None:
            taken.add(header)
            columns[column.name] = _value(column, plain[header], place, notes)
    if table.rest:
        columns |= {name.strip(): value_of(text) for name, text in cells.items() if name and _plain(name) not in taken}
    yield key, columns


def _value(column: Column, text: str, place: str, notes: list[str]) -> float | str | None:
    if column.values is None:
        return value_of(text)
    plain = text.lower().removesuffix(".0")
    if plain in UNKNOWN:
        return None
    if plain not in column.values:
        allowed = ", ".join(column.values)
        notes.append(f"{place}: {column.name} {text!r} is not one of {allowed}; set to unknown")
        return None
    return column.values[plain]


def _plain(header: str | None) -> str:
    return re.sub(r"[\s_\-]+", "", header or "").lower()


def _read_cells(path: Path, table: Table) -> Iterable[tuple[int, dict[str, str]]]:
    """Yield the rows of a CSV, text or Excel file as dictionaries of text, with their line numbers."""
    # A table in text keeps the separator of its release; some are edited in a spreadsheet, which writes another.
    lines = read_cells(path, delimiter=table.delimiter if table.header or table.delimiter == " " else None).lines
    header, start = list(table.header), 0
    if not header:
        # Excel files may have titles above the header, which is the first line that contains the key or a column.
        wanted = {_plain(name) for name in (*table.key, *(h for c in table.columns for h in c.headers))} - {""}
        start = next((n for n, (_, line) in enumerate(lines[:6]) if wanted & {_plain(cell) for cell in line}), 0)
        header, start = (lines[start][1], start + 1) if lines else ([], 0)
    for number, line in lines[start:]:
        yield number, dict(zip(header, [*line, *[""] * (len(header) - len(line))], strict=False))


def _note_leftovers(
    adapter: Adapter,
    rows: Mapping[str, Any],
    used: set[str],
    paths: Sequence[str],
    found: Mapping[str, Any],
    notes: list[str],
) -> None:
    missing = sorted(rows.keys() - used)
    if missing:
        notes.append(f"{adapter.title}: the tables list {len(missing)} photos that are missing, such as {missing[0]}")
    unlabelled = sorted(used - rows.keys()) if rows else []
    if unlabelled:
        notes.append(f"{adapter.title}: {len(unlabelled)} photos are in no table, such as {unlabelled[0]}: no labels")
    folders = [unquote(text.format_map(_Anything())) for text in (adapter.masks or {}).values()]
    others = Counter(
        os.path.dirname(path)
        for path in paths
        if path not in found and Path(path).suffix.lower() in PHOTO_SUFFIXES and not _is_mask(path, folders)
    )
    for folder, count in others.most_common(5):
        notes.append(f"{adapter.title}: {count} images in {folder or '.'} are not photos of the data set; skipped")


class _Anything(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "*"


def _is_mask(path: str, templates: Iterable[str]) -> bool:
    parts = [re.escape(choice).replace(r"\*", "[^/]*") for text in templates for choice in text.split("|")]
    return any(_match(part, unquote(path)) for part in parts)


def _with_all_columns(photos: list[SourcePhoto]) -> list[SourcePhoto]:
    """Give every photo all columns; missing values are unknown, never negative."""
    names = list(dict.fromkeys(name for photo in photos for name in photo.columns))
    for photo in photos:
        columns = {name: photo.columns.get(name) for name in names}
        photo.columns.clear()
        photo.columns.update(columns)
    return photos


def _with_official_split(photos: list[SourcePhoto]) -> list[SourcePhoto]:
    """Use the official split if it has all three sides; with two, keep the column and leave folds to be assigned."""
    sides = {photo.columns.get("official_split") for photo in photos} - {None}
    if sides != {"train", "val", "test"}:
        return photos
    return [replace(photo, split=photo.columns["official_split"]) for photo in photos]
