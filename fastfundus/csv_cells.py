"""CSV files that spreadsheets open without running anything in them."""

from __future__ import annotations

import polars as pl

__all__ = ["csv_text"]

_FORMULA = "^[=+\\-@\\t\\r\\n]"
"""Spreadsheets take a cell that begins like this for a formula, and names of files and patients come from outside."""


def csv_text(table: pl.DataFrame, *, header: bool = True) -> str:
    """Return a table as CSV; text that a spreadsheet would run as a formula gets an apostrophe in front.

    Source: OWASP, CSV Injection.
    """
    text = [pl.col(name) for name, kind in table.schema.items() if kind == pl.String]
    safe = [
        pl.when(cell.str.contains(_FORMULA)).then(pl.concat_str(pl.lit("'"), cell)).otherwise(cell).name.keep()
        for cell in text
    ]
    return table.with_columns(safe).write_csv(include_header=header)
