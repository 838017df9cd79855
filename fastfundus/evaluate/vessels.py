"""Vessel maps against the masks of graders, in the frame and at the resolution of the camera, within the field of view.

A photo's map is brought back from the cache to the camera's pixels before it is judged. The threshold is the one of the
best mean Dice on validation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import PhotoCache
from fastfundus.data.masks import native_map, native_masks, photos_with_masks
from fastfundus.evaluate.metrics import mean_with_interval
from fastfundus.evaluate.operating_point import (
    Measured,
    read_operating_point,
    rows_by_split,
    rows_to_measure,
    write_operating_point,
)  # fmt: skip
from fastfundus.train.run import Run
from fastfundus.train.vessels import binned, binned_auroc, mask_column, vessel_maps

__all__ = ["fit_vessels", "measure_vessels"]

_THRESHOLDS = np.linspace(0.05, 0.95, 91)


def fit_vessels(run: Run, cache: PhotoCache) -> dict[str, Any]:
    """Choose the threshold on validation, measure on test, write both files; as `fit_operating_point`."""
    sides = {name: _judged(run, cache, rows) for name, rows in rows_by_split(run, cache).items()}
    best = int(np.mean([photo.dices for photo in sides["val"]], axis=0).argmax())
    threshold = float(_THRESHOLDS[best])
    measured = {name: _measured(cache, photos, threshold, name) for name, photos in sides.items()}
    point = {"temperature": 1.0, "threshold": threshold, "target": "mean Dice on validation", "finding": False}
    return write_operating_point(run, {"vessel": point}, measured)


def measure_vessels(run: Run, cache: PhotoCache) -> Measured:
    """Apply a run, as locked, to photos it has not learned from; as `measure`."""
    threshold = read_operating_point(run)["labels"]["vessel"]["threshold"]
    rows, which = rows_to_measure(run, cache, photos_with_masks(cache.manifest, mask_column(run.config)))
    return _measured(cache, _judged(run, cache, rows), threshold, which)


class _Photo:
    """What one photo's map is worth; the map itself is not kept."""

    def __init__(self, row: int, chances: NDArray[np.float32], vessels: NDArray[np.bool_], inside: NDArray[np.bool_]):
        self.row = row
        yes = vessels[inside]
        self.counts = binned(chances[inside], yes)
        # How many pixels, and how many of vessel, lie at or above each threshold.
        above = np.cumsum(self.counts[:, ::-1], axis=1)[:, ::-1]
        place = np.ceil(_THRESHOLDS * self.counts.shape[1]).astype(int)
        no, right = above[:, place]
        self.dices = 2 * right / np.maximum(1, right + no + yes.sum())
        self.right, self.called, self.vessels, self.pixels = right, right + no, int(yes.sum()), len(yes)


def _judged(run: Run, cache: PhotoCache, rows: NDArray[np.int64]) -> list[_Photo]:
    maps = vessel_maps(run.load_model(), cache.photos, rows, cache.spec)
    photos = []
    for row, chances in zip(rows.tolist(), maps, strict=True):
        vessels, inside = native_masks(cache, row, mask_column(run.config))
        photos.append(_Photo(row, native_map(chances, cache.manifest.row(row, named=True)), vessels, inside))
    return photos


def _measured(cache: PhotoCache, photos: list[_Photo], threshold: float, which: str) -> Measured:
    part = cache.manifest[[photo.row for photo in photos]].select("path", "sha256", "patient")
    patients = part["patient"].to_list()
    at = int(np.abs(_THRESHOLDS - threshold).argmin())
    table = part.with_columns(
        dice=pl.Series([photo.dices[at] for photo in photos], dtype=pl.Float64),
        auroc=pl.Series([binned_auroc(photo.counts) for photo in photos], dtype=pl.Float64),
    )
    right, called, vessels, pixels = (
        sum(values) for values in zip(*((p.right[at], p.called[at], p.vessels, p.pixels) for p in photos), strict=True)
    )
    label = {
        "photos": len(photos),
        "patients": len(set(patients)),
        "threshold": threshold,
        "dice": mean_with_interval(table["dice"].to_numpy(), patients).to_dict(),
        "auroc": mean_with_interval(table["auroc"].to_numpy(), patients).to_dict(),
        "sensitivity": float(right / vessels),
        "specificity": float(1 - (called - right) / (pixels - vessels)),
    }
    pooled = binned_auroc(np.sum([photo.counts for photo in photos], axis=0))
    return Measured({"vessel": label}, {"pixels_auroc": {"value": pooled, "low": None, "high": None}}, table, which)
