"""Metrics by subgroup: camera, site, sex, age, eye, quality, or any other column of the manifest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from fastfundus.errors import ConfigError, close_matches
from fastfundus.evaluation.metrics import binary_metrics
from fastfundus.evaluation.segmentation import vessel_means

__all__ = ["MIN_PATIENTS", "subgroup_metrics"]

MIN_PATIENTS = 20
"""Minimum number of patients with, and without, the finding (for vessels: in total); below it a group is `small`."""
_MAX_VALUES = 12
_UNKNOWN = "unknown"


def subgroup_metrics(
    predictions: pl.DataFrame,
    manifest: pl.DataFrame,
    columns: Sequence[str],
    thresholds: Mapping[str, float],
    *,
    resamples: int = 2000,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Measure each output in each subgroup; for vessels, the means over photos.

    Numeric columns with many values are split at their quartiles, ages into bands of ten years. Photos without a value
    form the group "unknown".

    Args:
        predictions: predictions of `Measured`.
        manifest: manifest of the cache of these predictions.
        columns: columns of the manifest.
        thresholds: locked thresholds by output.
        resamples: number of bootstrap resamples.

    Returns:
        By column and output, a list of groups with `group`, the metrics as plain data, and `small`.

    Raises:
        ConfigError: the manifest has no such column.
    """
    unknown = [name for name in columns if name not in manifest.columns]
    if unknown:
        raise ConfigError(f"the manifest has no column {unknown[0]!r}{close_matches(unknown[0], manifest.columns)}")
    measures: dict[str, Callable[[pl.DataFrame], dict[str, Any]]] = {
        name: partial(_measured, name=name, threshold=threshold, resamples=resamples)
        if f"p_{name}" in predictions.columns else _vessels
        for name, threshold in thresholds.items()
    }  # fmt: skip
    keys = ["path", "sha256"]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for column in columns:
        groups = pl.DataFrame(
            {"path": manifest["path"], "sha256": manifest["sha256"], "_group": _groups(manifest[column])}
        ).unique(keys)
        table = predictions.join(groups, on=keys, how="left")
        parts = sorted(table.partition_by("_group", as_dict=True).items())
        found[column] = {
            name: [{"group": str(group), **measured(part)} for (group,), part in parts]
            for name, measured in measures.items()
        }
    return found


def _groups(values: pl.Series) -> pl.Series:
    """Return the group name of each value: the value itself, the decade of an age, or the quartile of a number."""
    if values.dtype.is_numeric() and values.name == "age":
        decade = (values.cast(pl.Float64) / 10).floor().cast(pl.Int64) * 10
        return decade.map_elements(lambda low: f"{low} to {low + 9}", return_dtype=pl.String).fill_null(_UNKNOWN)
    if values.dtype.is_numeric() and values.n_unique() > _MAX_VALUES:
        known = values.drop_nulls().cast(pl.Float64).drop_nans().to_numpy()
        edges = np.unique(np.quantile(known, (0.25, 0.5, 0.75)))
        limits = [float(known.min()), *edges.tolist(), float(known.max())]
        names = [f"{n}: {low:.3g} to below {high:.3g}" for n, (low, high) in enumerate(itertools.pairwise(limits), 1)]
        names[-1] = (
            names[-1].replace("below ", "") if limits[-2] < limits[-1] else f"{len(edges) + 1}: {limits[-1]:.3g}"
        )
        numbers = values.cast(pl.Float64).fill_nan(None)
        places = np.searchsorted(edges, numbers.fill_null(0.0).to_numpy(), side="right")
        return pl.Series(
            [_UNKNOWN if value is None else names[place] for value, place in zip(numbers, places, strict=True)]
        )
    return values.cast(pl.String).fill_null(_UNKNOWN)


def _measured(part: pl.DataFrame, *, name: str, threshold: float, resamples: int) -> dict[str, Any]:
    known = part.filter(pl.col(f"label_{name}").is_not_null())
    truth, patients = known[f"label_{name}"].to_numpy().astype(np.float64), known["patient"]
    if not len(known):
        return {"photos": 0, "patients": 0, "positives": 0, "small": True}
    metrics = binary_metrics(known[f"p_{name}"].to_numpy(), truth, patients.to_list(), threshold, resamples=resamples)
    of_class = [patients.filter(pl.Series(truth == value)).n_unique() for value in (0, 1)]
    return metrics.to_dict() | {"small": min(of_class) < MIN_PATIENTS}


def _vessels(part: pl.DataFrame) -> dict[str, Any]:
    patients = part["patient"].n_unique()
    return {"photos": len(part), "patients": patients, **vessel_means(part), "small": patients < MIN_PATIENTS}
