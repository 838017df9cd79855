"""Reading of label CSV files, one row per photo. Faults are reported by file and line; no value is guessed."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastfundus.errors import DataError

__all__ = ["FILE_COLUMNS", "UNKNOWN", "LabelRow", "LabelTable", "normal_eye", "read_labels", "value_of"]

FILE_COLUMNS = ("file", "path", "image", "filename", "file_name", "image_path", "image_id", "id")
"""Names of the column that identifies the photo, case-insensitive; the first one present is used."""
UNKNOWN = frozenset({"", "nan", "na", "n/a", "none", "null", "?"})
"""Lower-case texts that denote an unknown value."""
_EYES = {"l": "L", "left": "L", "os": "L", "oi": "L", "og": "L", "r": "R", "right": "R", "od": "R"}
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class LabelRow:
    """The row of one photo."""

    line: int
    """Line number in the file; the header is line 1."""
    file: str
    patient: str | None
    eye: str | None
    split: str | None
    camera: str | None
    columns: dict[str, Any]
    """All other columns: numbers as float, text as str, unknown values as None."""


@dataclass(slots=True)
class LabelTable:
    """The contents of a label file."""

    path: Path
    rows: list[LabelRow]
    notes: list[str] = field(default_factory=list)
    """Handled faults to show to the user, one line each."""


def normal_eye(text: str | None) -> str | None:
    """Convert "left", "OS", "R", ... to "L" or "R", and anything else to None."""
    return _EYES.get((text or "").strip().lower())


def read_labels(path: Path) -> LabelTable:
    """Read a label CSV.

    The file column is one of `FILE_COLUMNS`. The columns `patient`, `eye`, `split` and `camera` are interpreted; all
    others are kept as they are. If a file is listed more than once, its first row is kept and values on which the rows
    disagree become unknown; both cases are noted.

    Raises:
        DataError: the file cannot be read, has no header or no file column, or a row has the wrong number of cells.
    """
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which would otherwise become part of the first column name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); check the path", path=path) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"is not a UTF-8 CSV file ({error}); save it as CSV UTF-8", path=path) from None
    if not lines or not any(cell.strip() for cell in lines[0]):
        raise DataError(
            f"has no header; the first line must name the columns, including {FILE_COLUMNS[0]!r}", path=path
        )
    header = [cell.strip() for cell in lines[0]]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"has the column {repeated[0]!r} twice; rename one of them", path=path, row=1)
    lower = [name.lower() for name in header]
    file_column = next((lower.index(name) for name in FILE_COLUMNS if name in lower), None)
    if file_column is None:
        raise DataError(
            f"has no column that identifies the photos; columns: {', '.join(header)}; "
            f"rename the right one to {FILE_COLUMNS[0]!r}",
            path=path,
            row=1,
        )
    table = LabelTable(path, [])
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise DataError(
                f"has {len(cells)} cells but the header has {len(header)}; quote commas", path=path, row=number
            )
        if not cells[file_column].strip():
            table.notes.append(f"{path}, line {number}: no file name; row skipped")
            continue
        table.rows.append(_read_row(number, header, cells, file_column, table))
    _merge_repeats(table)
    _note_unknown(table)
    return table


def _read_row(number: int, header: list[str], cells: list[str], file_column: int, table: LabelTable) -> LabelRow:
    columns = {name: value_of(cell) for name, cell in zip(header, cells, strict=True)}
    file = cells[file_column].strip()
    del columns[header[file_column]]
    special: dict[str, str | None] = {"patient": None, "eye": None, "split": None, "camera": None}
    for name in list(columns):
        if name.lower() in special:
            text = cells[header.index(name)].strip()
            special[name.lower()] = None if columns.pop(name) is None else text
    split = special["split"]
    if split is not None and split.lower() not in _SPLITS:
        table.notes.append(f"{table.path}, line {number}: split {split!r} is not train, val or test; set to unknown")
    return LabelRow(
        line=number,
        file=file.replace("\\", "/"),
        patient=special["patient"],
        eye=normal_eye(special["eye"]),
        split=_SPLITS.get((split or "").lower()),
        camera=special["camera"],
        columns=columns,
    )


def value_of(cell: str) -> float | str | None:
    """Convert a cell to a finite number, text, or None if unknown; "true" and "false" become 1 and 0."""
    text = cell.strip()
    if text.lower() in UNKNOWN:
        return None
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        number = float(text)
        return number if math.isfinite(number) else None
    return {"true": 1.0, "false": 0.0}.get(text.lower(), text)


def _merge_repeats(table: LabelTable) -> None:
    first: dict[str, int] = {}
    merged: list[LabelRow] = []
    for row in table.rows:
        if row.file not in first:
            first[row.file] = len(merged)
            merged.append(row)
            continue
        kept = merged[first[row.file]]
        place = f"{table.path}, line {row.line}: {row.file} is already listed in line {kept.line}"
        differing = [name for name, value in row.columns.items() if kept.columns[name] != value]
        if differing:
            columns = {name: None if name in differing else value for name, value in kept.columns.items()}
            merged[first[row.file]] = replace(kept, columns=columns)
            table.notes.append(f"{place} with different {', '.join(differing)}; set to unknown: delete the wrong row")
        else:
            table.notes.append(f"{place}; duplicate row ignored")
    table.rows = merged


def _note_unknown(table: LabelTable) -> None:
    """Note missing values in columns of 0 and 1, which are labels: a photo without a value does not train the label."""
    names = table.rows[0].columns if table.rows else {}
    for name in names:
        values = [row.columns[name] for row in table.rows]
        gaps = [row for row, value in zip(table.rows, values, strict=True) if value is None]
        known = {value for value in values if value is not None}
        if gaps and known and known <= {0.0, 1.0}:
            where = ", ".join(f"{row.file} (line {row.line})" for row in gaps[:3])
            more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
            table.notes.append(
                f"{table.path}: label {name!r} is unknown for {where}{more}; these photos are not used to train it"
            )
