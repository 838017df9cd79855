"""Writing of the manifest in row groups, so that a million rows need no more memory than one group."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from fastfundus.data.cache import MANIFEST_COLUMNS
from fastfundus.records import SourcePhoto

__all__ = ["write_manifest"]

_GROUP_ROWS = 65_536


def write_manifest(path: Path, photos: Sequence[SourcePhoto], rows: Iterable[dict[str, Any]]) -> None:
    """Write one row per photo.

    Args:
        path: the file to write.
        photos: N inputs, with their split and label columns.
        rows: N rows with the remaining manifest columns, in the same order.
    """
    schema = {**MANIFEST_COLUMNS, **_label_schema(photos)}
    with pq.ParquetWriter(path, pl.DataFrame(schema=schema).to_arrow().schema, compression="zstd") as writer:
        for group in _groups(photos, iter(rows), schema):
            writer.write_table(group.to_arrow())
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _groups(
    photos: Sequence[SourcePhoto], rows: Iterator[dict[str, Any]], schema: dict[str, Any]
) -> Iterator[pl.DataFrame]:
    for start in range(0, len(photos), _GROUP_ROWS):
        group = photos[start : start + _GROUP_ROWS]
        lines = []
        for photo, row in zip(group, islice(rows, len(group)), strict=True):
            labels = {
                name: _text(value) if schema[name] == pl.String else value for name, value in photo.columns.items()
            }
            lines.append({"path": photo.name, "split": photo.split, **row, **labels})
        yield pl.DataFrame(lines, schema=schema, orient="row")


def _label_schema(photos: Sequence[SourcePhoto]) -> dict[str, Any]:
    """Return the types of the label columns: text if any value of a column is text, numbers otherwise."""
    schema: dict[str, Any] = {}
    for photo in photos:
        for name, value in photo.columns.items():
            if isinstance(value, str):
                schema[name] = pl.String
            else:
                schema.setdefault(name, pl.Float64)
    return schema


def _text(value: float | str | None) -> str | None:
    return f"{value:g}" if isinstance(value, float) else value
