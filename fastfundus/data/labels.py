"""Reading of label tables, one row per photo. Faults are reported by file and line; no value is guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastfundus.data.roles import SPLITS, Roles, find_roles, is_header
from fastfundus.data.tables import UNKNOWN, RawTable, read_cells
from fastfundus.errors import DataError
from fastfundus.identifiers import is_placeholder, normal_eye

__all__ = ["LabelRow", "LabelTable", "read_labels", "value_of"]

_MAX_PHOTOS_OF_ONE = 6
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_ROUNDED = re.compile(r"\d([.,]\d+)?[eE]\+?\d+")
"""A number as spreadsheets show one that is too long, such as 1.10105E+17."""
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


# Not frozen: tables have millions of rows, and frozen ones take three times as long to make.
@dataclass(slots=True)
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
    roles: dict[str, str] = field(default_factory=dict)
    """Header of the column that was read as "file", "patient", "eye", "split", "is_valid" and "camera", where there is
    one."""


def read_labels(path: Path, *, eye_codes: Mapping[str, str] | None = None) -> LabelTable:
    """Read a label table: CSV with any common separator and encoding, or an Excel workbook.

    Columns that name the file, patient, eye, split and camera are recognised by the names that people use
    (`data.roles`); all others are kept as labels. Identical rows of one file are merged.

    Args:
        path: the table.
        eye_codes: "L" or "R" by cell text, for tables that code eyes by numbers.

    Raises:
        DataError: the file cannot be read, has no header or no file column, a row has too many cells, or two rows of
            one file disagree.
    """
    raw = read_cells(path, is_header=is_header)
    table = LabelTable(path, [], raw.notes)
    header = _header(raw, path)
    lines, cells = _body(raw, header, table)
    roles = find_roles(header, cells, eye_codes=eye_codes, path=path)
    table.notes += roles.notes
    table.roles = {role: header[column] for role, column in roles.columns.items()}
    files = [file.replace("\\", "/") for file in cells[roles.columns["file"]]]
    patient, eye, split, camera = _special(cells, roles, table, eye_codes, lines)
    taken = set(roles.columns.values())
    labels = {
        name: _values(cells[column], decimal_comma=raw.decimal_comma)
        for column, name in enumerate(header)
        if name and column not in taken
    }
    names = list(labels)
    for index, values in enumerate(zip(*labels.values(), strict=True) if labels else [()] * len(files)):
        if not files[index]:
            table.notes.append(f"{path}, line {lines[index]}: no file name; row skipped")
            continue
        table.rows.append(
            LabelRow(
                lines[index], files[index], patient[index], eye[index], split[index], camera[index],
                dict(zip(names, values, strict=True)),
            )
        )  # fmt: skip
    _merge_repeats(table)
    _note_unknown(table)
    return table


def _header(raw: RawTable, path: Path) -> list[str]:
    if not raw.lines:
        raise DataError("has no header; the first line must name the columns, including 'file'", path=path)
    header = [cell.strip() for cell in raw.lines[0][1]]
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise DataError(f"has the column {repeated[0]!r} twice; rename one of them", path=path, row=raw.lines[0][0])
    return header


def _body(raw: RawTable, header: list[str], table: LabelTable) -> tuple[list[int], list[list[str]]]:
    """Return the line numbers and the cells of each column, stripped; missing cells at the end of a row are empty."""
    width, short, lines, rows = len(header), [], [], []
    for number, cells in raw.lines[1:]:
        if len(cells) > width:
            if any(cell.strip() for cell in cells[width:]):
                raise DataError(
                    f"has {len(cells)} cells but the header has {width}; quote cells that contain the separator",
                    path=table.path,
                    row=number,
                )
            cells = cells[:width]
        elif len(cells) < width:
            short.append(number)
            cells = [*cells, *[""] * (width - len(cells))]
        lines.append(number)
        rows.append(cells)
    if short:
        table.notes.append(
            f"{table.path}: {len(short)} rows have fewer cells than the header, such as line {short[0]}; the missing "
            "values are unknown"
        )
    columns = [list(map(str.strip, column)) for column in zip(*rows, strict=True)] if rows else [[] for _ in header]
    unnamed = [column for column, name in enumerate(header) if not name and any(columns[column])]
    if unnamed:
        places = ", ".join(str(column + 1) for column in unnamed)
        table.notes.append(f"{table.path}: columns without a name are not used: {places}")
    return lines, columns


def _special(
    cells: list[list[str]], roles: Roles, table: LabelTable, eye_codes: Mapping[str, str] | None, lines: list[int]
) -> tuple[list[str | None], ...]:
    count = len(lines)

    def texts(role: str) -> list[str | None]:
        if role not in roles.columns:
            return [None] * count
        return [None if cell.lower() in UNKNOWN else cell for cell in cells[roles.columns[role]]]

    patients = texts("patient")
    rounded = {patient for patient in set(patients) if patient is not None and _ROUNDED.fullmatch(patient)}
    if rounded:
        rows = [(line, patient) for line, patient in zip(lines, patients, strict=True) if patient in rounded]
        table.notes.append(
            f"{table.path}: {len(rows)} patients are rounded numbers, such as {rows[0][1]} in line {rows[0][0]}: "
            "unknown; export the column as text"
        )
        patients = [None if patient in rounded else patient for patient in patients]
    nobody = {patient for patient in set(patients) if patient is not None and is_placeholder(patient)}
    if nobody:
        found = [patient for patient in patients if patient in nobody]
        table.notes.append(
            f"{table.path}: {found[0]!r} in {len(found)} rows is a placeholder: these patients are unknown"
        )
        patients = [None if patient in nobody else patient for patient in patients]
    gaps = [line for line, patient in zip(lines, patients, strict=True) if patient is None]
    if gaps and len(gaps) < count and not nobody:
        table.notes.append(
            f"{table.path}: no patient in {len(gaps)} rows, such as line {gaps[0]}: unknown there (of merged cells, "
            "only the first has the text)"
        )
    patients = _people(patients, table)
    nothing: list[str | None] = [None] * count
    eyes = [normal_eye(eye, eye_codes) for eye in texts("eye")] if "eye" in roles.columns else nothing
    camera = texts("camera") if "camera" in roles.columns else nothing
    return patients, eyes, _splits(texts, roles, table, lines), camera


def _splits(
    texts: Callable[[str], list[str | None]], roles: Roles, table: LabelTable, lines: list[int]
) -> list[str | None]:
    if "is_valid" in roles.columns:
        # As fast.ai writes it: what is not for validation is for training.
        sides = [value_of(text) if text is not None else None for text in texts("is_valid")]
        return ["val" if side == 1.0 else "train" if side == 0.0 else None for side in sides]
    if "split" not in roles.columns:
        return [None] * len(lines)
    splits = [None if split is None else SPLITS.get(split.lower()) for split in texts("split")]
    for line, text, split in zip(lines, texts("split"), splits, strict=True):
        if text is not None and split is None:
            table.notes.append(f"{table.path}, line {line}: split {text!r} is not train, val or test; set to unknown")
    return splits


def _people(patients: list[str | None], table: LabelTable) -> list[str | None]:
    """Give each patient one spelling: `p001` is `P001`, and pandas writes 7 as 7.0 beside empty cells."""
    first: dict[str, str] = {}
    one: dict[str | None, str | None] = {None: None}
    for patient in patients:
        if patient not in one and patient is not None:
            plain = patient[:-2] if patient.endswith(".0") and patient[:-2].isdigit() else patient
            one[patient] = first.setdefault(plain.casefold(), plain)
    if len(first) == 1 and sum(patient is not None for patient in patients) > _MAX_PHOTOS_OF_ONE:
        table.notes.append(
            f"{table.path}: the patient is {next(iter(first.values()))!r} in all rows, which may be many people: "
            "patients are unknown"
        )
        return [None] * len(patients)
    return [one[patient] for patient in patients]


def _values(cells: list[str], *, decimal_comma: bool) -> list[float | str | None]:
    """Convert the cells of one column; columns of labels have few distinct cells."""
    known: dict[str, float | str | None] = {}
    for cell in set(cells):
        number = cell.replace(",", ".") if decimal_comma and _DECIMAL_COMMA.fullmatch(cell) else cell
        known[cell] = value_of(number)
    return [known[cell] for cell in cells]


def value_of(cell: str) -> float | str | None:
    """Convert a cell to a finite number, text, or None if unknown; "true", "yes", "false" and "no" become 1 and 0."""
    text = cell.strip()
    if text.lower() in UNKNOWN:
        return None
    if _NUMBER.fullmatch(text):
        number = float(text)
        return number if math.isfinite(number) else None
    return {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}.get(text.lower(), text)


def _merge_repeats(table: LabelTable) -> None:
    if len({row.file for row in table.rows}) == len(table.rows):
        return
    first: dict[tuple[str, str | None, str | None], LabelRow] = {}
    for row in table.rows:
        # Numbering may restart for each patient and split: their folders tell such photos apart.
        bare = "/" not in row.file
        kept = first.setdefault((row.file, row.patient if bare else None, row.split if bare else None), row)
        if kept is row:
            continue
        _require_agreement(kept, row, table.path)
        table.notes.append(
            f"{table.path}, line {row.line}: {row.file} is already listed in line {kept.line}; duplicate row ignored"
        )
    table.rows = list(first.values())


def _require_agreement(kept: LabelRow, row: LabelRow, path: Path) -> None:
    """Raise if two rows of one photo say different things: nothing tells which of them is right."""
    pairs = {name: (kept.columns[name], row.columns[name]) for name in row.columns}
    pairs |= {name: (getattr(kept, name), getattr(row, name)) for name in ("patient", "eye", "split", "camera")}
    differing = [name for name, (one, other) in pairs.items() if one != other]
    if differing:
        name = differing[0]
        raise DataError(
            f"lines {kept.line} ({kept.file}) and {row.line} ({row.file}) describe the same photo with different "
            f"{', '.join(differing[:5])} ({pairs[name][0]} and {pairs[name][1]}); delete or correct one of them",
            path=path,
        )


def _note_unknown(table: LabelTable) -> None:
    """Note missing values in columns of 0 and 1, which are labels: a photo without a value does not train the label."""
    names = table.rows[0].columns if table.rows else {}
    for name in names:
        values = [row.columns[name] for row in table.rows]
        if None not in values or not {value for value in values if value is not None} <= {0.0, 1.0}:
            continue
        gaps = [row for row, value in zip(table.rows, values, strict=True) if value is None]
        if len(gaps) == len(values):
            continue
        where = ", ".join(f"{row.file} (line {row.line})" for row in gaps[:3])
        more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
        table.notes.append(
            f"{table.path}: label {name!r} is unknown for {where}{more}; these photos are not used to train it"
        )
