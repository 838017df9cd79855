"""Reading of tables as people save them: CSV with any common separator and encoding, and Excel workbooks.

Every reader of a table or a list (`--labels`, a source, the adapters) uses this module, so that all of them accept the
same files.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

from fastfundus.errors import DataError, require
from fastfundus.files import read_small
from fastfundus.photo.file import expansion_limit

__all__ = ["TABLE_SUFFIXES", "UNKNOWN", "RawTable", "has_header", "read_cells", "read_text"]

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".tab", ".xlsx", ".xlsm"})
"""Lower-case file name suffixes of tables."""
UNKNOWN = frozenset({"", "nan", "na", "n/a", "#n/a", "none", "null", "?", "<na>"})
"""Lower-case texts of cells that denote an unknown value."""
_DELIMITERS = ",;\t|"
_MAX_COLUMNS = 5_000
_MAX_EXACT = 10**15
"""Spreadsheets keep 15 digits of a number."""
_MAX_TITLE, _MAX_TITLE_LINES = 100_000, 10
_MAX_BYTES = 1 << 30
"""A million photos with a hundred columns need a third of it."""
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class _LostDigitsError(ValueError):
    """A number of a workbook is not the one that was entered."""


@dataclass(slots=True)
class RawTable:
    """The cells of a table as text."""

    lines: list[tuple[int, list[str]]]
    """Line number, counted from 1, and cells of every line that is not empty."""
    decimal_comma: bool = False
    """True if numbers may be written as 0,5: the cells are separated by something other than a comma."""
    notes: list[str] = field(default_factory=list)
    """How the file was read where that is not obvious, one line each."""


def read_cells(
    path: Path, *, delimiter: str | None = None, is_header: Callable[[list[str]], bool] | None = None
) -> RawTable:
    """Read a CSV file or an Excel workbook.

    Args:
        path: the table. Files that end in .xlsx or .xlsm are workbooks; all others are text.
        delimiter: character between cells, or " " for any white space; None detects a comma, semicolon, tab or bar
            from the first line, or uses that of a line `sep=;`, as Excel writes it.
        is_header: whether cells are a header. Lines above the first header among the first ten, such as a title, are
            left out, with a note. If none is a header, the first line counts.

    Raises:
        DataError: the file cannot be read, is in a format of spreadsheets that is not supported, or has too many
            columns.
    """
    suffix = path.suffix.lower()
    if suffix in (".xls", ".ods", ".numbers"):
        raise DataError(f"tables in the format {suffix} cannot be read; save it as .xlsx or as CSV UTF-8", path=path)
    if suffix in (".xlsx", ".xlsm"):
        return _without_title(_read_workbook(path), path, is_header)
    text, notes = read_text(path)
    if delimiter == " ":
        lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        return RawTable(lines, notes=notes)
    skipped = 0
    declared = re.match(r'"?sep=(.)"?[^\r\n]*(\r\n|\r|\n)', text, re.IGNORECASE)
    if declared:
        text, skipped, delimiter = text[declared.end() :], 1, declared[1]
    delimiter = delimiter or _detect_delimiter(_header_line(text, is_header))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    lines, before = [], 0
    try:
        for cells in reader:
            # A quoted line break makes a row span several lines; report the first.
            number, before = before + 1 + skipped, reader.line_num
            if len(cells) > _MAX_COLUMNS:
                raise DataError(f"has {len(cells):,} columns; at most {_MAX_COLUMNS:,} are read", path=path, row=number)
            if any(map(str.strip, cells)):
                lines.append((number, cells))
    except csv.Error as error:
        raise DataError(f"is not a valid CSV file ({error}); close the quotes", path=path, row=before + 1) from None
    _require_closed_quotes(text, lines, delimiter, path, skipped)
    return _without_title(RawTable(lines, delimiter != ",", notes), path, is_header)


def _require_closed_quotes(
    text: str, lines: list[tuple[int, list[str]]], delimiter: str, path: Path, skipped: int
) -> None:
    """Raise if the last row ends within quotes: every row below the quote would be part of one cell."""
    number, cells = lines[-1] if lines else (0, [])
    if not any("\n" in cell or "\r" in cell for cell in cells):
        return
    rest = io.StringIO("".join(text.splitlines(keepends=True)[number - 1 - skipped :]), newline="")
    try:
        list(csv.reader(rest, delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise DataError("has a quote that is never closed; close or delete it", path=path, row=number) from None


def has_header(path: Path, is_header: Callable[[list[str]], bool]) -> bool:
    """Return whether a text file is a table with a header, among its first ten lines.

    Raises:
        DataError: see `read_text`.
    """
    text = read_text(path)[0]
    text = text[text.find("\n") + 1 :] if re.match(r'"?sep=.', text, re.IGNORECASE) else text
    return is_header(_cells(_header_line(text, is_header)))


def _cells(line: str) -> list[str]:
    return next(csv.reader([line], delimiter=_detect_delimiter(line), skipinitialspace=True), [])


def _header_line(text: str, is_header: Callable[[list[str]], bool] | None) -> str:
    """Return the first line that is a header when it is split by its own separator, or else the first line."""
    lines = [line for line in text[:_MAX_TITLE].splitlines() if line.strip()][: _MAX_TITLE_LINES + 1]
    rows = list(map(_cells, lines))
    return lines[_header_place(rows, is_header)] if lines else ""


def _header_place(rows: list[list[str]], is_header: Callable[[list[str]], bool] | None) -> int:
    """Return which of the first rows is the header: the first one that looks like it, or else the first of all."""
    for at, cells in enumerate(rows[:_MAX_TITLE_LINES] if is_header is not None else ()):
        following = rows[at + 1] if at + 1 < len(rows) else []
        # A value such as "fundus", which is also the name of a column, is repeated in the next row.
        repeated = any(name and name == value for name, value in zip(cells, following, strict=False))
        if is_header is not None and is_header(cells) and (at == 0 or (following and not repeated)):
            return at
    return 0


def _without_title(table: RawTable, path: Path, is_header: Callable[[list[str]], bool] | None) -> RawTable:
    """Leave out the lines above the header."""
    if is_header is None:
        return table
    above = _header_place([cells for _, cells in table.lines[: _MAX_TITLE_LINES + 1]], is_header)
    if above:
        title = " ".join(cell.strip() for cell in table.lines[0][1] if cell.strip())[:60]
        number = table.lines[above][0]
        table.notes.append(f"{path}: the header is line {number}; what stands above it is not read, such as {title!r}")
        table.lines = table.lines[above:]
    return table


def read_text(path: Path) -> tuple[str, list[str]]:
    """Read a text file in UTF-8 or UTF-16, or in Windows-1252 if it is neither.

    Returns:
        The text, without a byte order mark, and notes for the user.

    Raises:
        DataError: the file cannot be read, or contains binary data.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # Reading a pipe would wait for its writer.
            raise DataError("is not a regular file; give a table or a list", path=path)
        data = read_small(path, _MAX_BYTES)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); check the path", path=path) from None
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), None)
    if encoding is None and b"\0" in data[:4096]:
        # Every second byte of Western text in UTF-16 is zero; which one depends on the byte order.
        even, odd = data[:4096:2].count(0), data[1:4096:2].count(0)
        encoding = "utf-16-le" if odd > even else "utf-16-be"
    notes: list[str] = []
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise DataError(f"is not a text file ({error.reason}); save it as CSV UTF-8", path=path) from None
        text = data.decode("cp1252", "replace")
        notes.append(f"{path}: is not UTF-8, read as Windows-1252; save it as CSV UTF-8 if names look wrong")
    if "\0" in text:
        raise DataError("is not a text file (it contains zero bytes); save it as CSV UTF-8", path=path)
    return text, notes


def _detect_delimiter(line: str) -> str:
    """Return the separator that is most frequent in a line outside quotes."""
    counts = Counter(char for char in re.sub(r'"[^"]*"', "", line) if char in _DELIMITERS)
    return max(_DELIMITERS, key=lambda char: counts[char])


def _read_workbook(path: Path) -> RawTable:
    openpyxl = require("openpyxl", extra="train")
    notes: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
        if expanded > expansion_limit(path.stat().st_size):
            raise ValueError(f"it expands to {expanded >> 20} MiB")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = book.worksheets
        rows = [[_cell_text(cell) for cell in row[:_MAX_COLUMNS]] for row in sheets[0].iter_rows()]
        if len(sheets) > 1:
            names = ", ".join(sheet.title for sheet in sheets[1:])
            notes.append(f"{path}: only the first sheet, {sheets[0].title!r}, is read; not read: {names}")
        book.close()
    except _LostDigitsError as error:
        raise DataError(str(error), path=path) from None
    except Exception as error:
        # openpyxl lets exceptions of its zip and XML readers through.
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot be read as an Excel workbook ({reason}); save it as CSV UTF-8", path=path) from None
    lines = [(number, cells) for number, cells in enumerate(rows, start=1) if any(map(str.strip, cells))]
    return RawTable(lines, notes=notes)


def _cell_text(place: Any) -> str:
    """Return the text of a workbook's cell; whole numbers, such as identifiers, have no decimal point."""
    cell = place.value
    if cell is None:
        return ""
    if isinstance(cell, int | float) and re.fullmatch("0{2,}", place.number_format or ""):
        # Shown as 007: the name that people see, and that the file has.
        return f"{int(cell):0{len(place.number_format)}d}"
    if isinstance(cell, bool):
        return str(int(cell))
    if isinstance(cell, int | float) and abs(cell) >= _MAX_EXACT:
        raise _LostDigitsError(
            f"cell {place.coordinate} is a number of more than 15 digits, of which Excel lost the last ones; format "
            "the column as text and enter it again"
        )
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, datetime):
        return cell.date().isoformat() if cell.time().isoformat() == "00:00:00" else cell.isoformat(" ")
    return cell.isoformat() if isinstance(cell, date) else str(cell)
