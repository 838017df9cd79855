"""What a task learns from a manifest's columns."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import MANIFEST_COLUMNS
from fastfundus.errors import DataError, close_matches
from fastfundus.records import Status

__all__ = ["OUTPUT_LABELS", "abnormality_targets", "usable_rows"]

OUTPUT_LABELS = {"abnormality": ("abnormal",)}
"""Names of a model's outputs, by task, as results show them."""


def abnormality_targets(manifest: pl.DataFrame, label: str) -> tuple[NDArray[np.float64], str]:
    """Read abnormality from a column.

    Args:
        manifest: a cache's manifest, N rows.
        label: a column of 0 and 1 in which 1 means abnormal, except that in a column named `normal` 1 means normal;
            "auto" takes `abnormal` or else `normal`.

    Returns:
        [N] 1.0 abnormal, 0.0 normal, NaN unknown; and in words where it came from.

    Raises:
        DataError: the column is absent, or holds other values.
    """
    choices = [name for name in manifest.columns if name not in MANIFEST_COLUMNS]
    if label == "auto":
        label = next((name for name in ("abnormal", "normal") if name in choices), "")
        if not label:
            have = f"its columns are {', '.join(choices)}" if choices else "it was prepared without labels"
            raise DataError(f"the cache has no column 'abnormal' or 'normal' ({have}); name one with --label")
    if label not in choices:
        raise DataError(f"the cache has no label column {label!r}{close_matches(label, choices)}")
    values = manifest[label]
    wrong = values.drop_nulls().unique().to_list()
    wrong = [value for value in wrong if value not in (0.0, 1.0)]
    if wrong:
        row = values.to_list().index(wrong[0])
        raise DataError(
            f"label {label!r} must be 0 or 1, got {wrong[0]!r} for {manifest['path'][row]}; correct the label file and "
            "prepare again"
        )
    targets = values.cast(pl.Float64).to_numpy().astype(np.float64)
    if label == "normal":
        return 1 - targets, "1 - normal"
    return targets, label


def usable_rows(manifest: pl.DataFrame, targets: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows that can teach or test: the photo is `ok` and its label known."""
    usable = (manifest["status"] == Status.OK.value).to_numpy() & np.isfinite(targets)
    return np.flatnonzero(usable)
