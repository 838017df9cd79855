"""Evaluation of vessel maps against expert masks at the camera's native resolution, within the field of view.

The map of each photo is mapped back from the cache to the camera's pixels before it is evaluated. The threshold is the
one with the best mean Dice on validation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from skimage.morphology import skeletonize

from fastfundus.data.cache import PhotoCache
from fastfundus.data.masks import native_map, native_masks, photos_with_masks
from fastfundus.evaluation.bootstrap import Floats, PatientBootstrap
from fastfundus.evaluation.locked_run import (
    Measured,
    read_operating_point,
    rows_by_split,
    rows_to_measure,
    write_operating_point,
)
from fastfundus.evaluation.metrics import mean_with_interval
from fastfundus.evaluation.thresholds import threshold_entry
from fastfundus.training.predict import inference_device
from fastfundus.training.run import Run
from fastfundus.training.tasks.segmentation import binned, binned_auroc, mask_column, vessel_maps

__all__ = ["VESSEL_FIGURES", "centreline_dice", "fit_vessels", "measure_vessels", "vessel_means"]

VESSEL_FIGURES = ("dice", "cldice", "auroc")
"""Columns of the predictions with one value per photo."""
_THRESHOLDS = np.linspace(0.05, 0.95, 91)


def centreline_dice(called: NDArray[np.bool_], vessels: NDArray[np.bool_]) -> float:
    """Return how well two maps [H, W] agree on the course of vessels (clDice): gaps cost, differences in width do not.

    It is the harmonic mean of the share of predicted centrelines inside true vessels and the share of true centrelines
    inside predicted vessels; NaN if both are empty. Source: Shit et al., CVPR 2021; centrelines by Zhang's thinning
    (scikit-image).
    """
    of_called, of_vessels = (skeletonize(which) for which in (called, vessels))  # type: ignore[no-untyped-call]
    lengths = of_called.sum() + of_vessels.sum()
    if not lengths:
        return float("nan")
    precision = (of_called & vessels).sum() / max(1, of_called.sum())
    sensitivity = (of_vessels & called).sum() / max(1, of_vessels.sum())
    return float(2 * precision * sensitivity / max(1e-12, precision + sensitivity))


def fit_vessels(run: Run, cache: PhotoCache) -> dict[str, Any]:
    """Fit the threshold with the best mean Dice on validation; see `fit_operating_point`."""
    sides = rows_by_split(run, cache)
    val = _predicted(run, cache, sides["val"])
    dices = np.stack([photo.dices for photo in val])

    def statistics(weights: Floats) -> dict[str, Floats]:
        return {"threshold": _THRESHOLDS[(weights @ dices).argmax(axis=1)]}

    patients = cache.manifest["patient"].gather(sides["val"]).to_list()
    found = PatientBootstrap(patients).intervals(statistics)["threshold"]
    point = {
        "temperature": 1.0,
        "finding": False,
        **threshold_entry(found),
        "target": "mean Dice on validation",
    }
    threshold = found.value
    measured = {
        "val": _measured(cache, val, threshold, "val"),
        "test": _measured(cache, _predicted(run, cache, sides["test"], threshold), threshold, "test"),
    }
    return write_operating_point(run, {"vessel": point}, measured)


def measure_vessels(run: Run, cache: PhotoCache) -> Measured:
    """Measure a vessel run; see `measure`."""
    threshold = float(read_operating_point(run)["labels"]["vessel"]["threshold"])
    rows, which = rows_to_measure(run, cache, photos_with_masks(cache.manifest, mask_column(run.config)))
    return _measured(cache, _predicted(run, cache, rows, threshold), threshold, which)


def _place(threshold: float) -> int:
    return int(np.abs(_THRESHOLDS - threshold).argmin())


class _Photo:
    """Results of one photo at every threshold; keeps its maps, one byte per pixel, until clDice is computed."""

    def __init__(
        self, row: int, probabilities: NDArray[np.float32], vessels: NDArray[np.bool_], inside: NDArray[np.bool_]
    ):
        self.row = row
        yes = vessels[inside]
        self.counts = binned(probabilities[inside], yes)
        # Number of background and of vessel pixels at or above each threshold.
        above = np.cumsum(self.counts[:, ::-1], axis=1)[:, ::-1]
        place = np.ceil(_THRESHOLDS * self.counts.shape[1]).astype(int)
        no, right = above[:, place]
        self.dices = 2 * right / np.maximum(1, right + no + yes.sum())
        self.right, self.called, self.vessels, self.pixels = right, right + no, int(yes.sum()), len(yes)
        reached = np.searchsorted(place, (probabilities * self.counts.shape[1]).astype(np.int32), side="right")
        self._maps: tuple[NDArray[np.uint8], NDArray[np.bool_]] | None = (
            np.where(inside, reached, 0).astype(np.uint8), vessels & inside,
        )  # fmt: skip

    def settle(self, threshold: float) -> None:
        """Compute clDice at a threshold and release the maps."""
        if self._maps is not None:
            reached, vessels = self._maps
            self.centrelines, self._maps = centreline_dice(reached > _place(threshold), vessels), None


def _predicted(run: Run, cache: PhotoCache, rows: NDArray[np.int64], threshold: float | None = None) -> list[_Photo]:
    maps = vessel_maps(run.load_model().to(inference_device()), cache.photos, rows, run.spec)
    photos = []
    for row, probabilities in zip(rows.tolist(), maps, strict=True):
        vessels, inside = native_masks(cache, row, mask_column(run.config))
        photos.append(_Photo(row, native_map(probabilities, cache.manifest.row(row, named=True)), vessels, inside))
        if threshold is not None:
            photos[-1].settle(threshold)
    return photos


def _measured(cache: PhotoCache, photos: list[_Photo], threshold: float, which: str) -> Measured:
    part = cache.manifest[[photo.row for photo in photos]].select("path", "sha256", "patient")
    patients = part["patient"].to_list()
    at = _place(threshold)
    for photo in photos:
        photo.settle(threshold)
    table = part.with_columns(
        dice=pl.Series([photo.dices[at] for photo in photos], dtype=pl.Float64),
        cldice=pl.Series([photo.centrelines for photo in photos], dtype=pl.Float64),
        auroc=pl.Series([binned_auroc(photo.counts) for photo in photos], dtype=pl.Float64),
    )
    right, called, vessels, pixels = (
        sum(values) for values in zip(*((p.right[at], p.called[at], p.vessels, p.pixels) for p in photos), strict=True)
    )
    label = {
        "photos": len(photos),
        "patients": len(set(patients)),
        "threshold": threshold,
        **vessel_means(table),
        "sensitivity": float(right / vessels) if vessels else None,
        "specificity": float(1 - (called - right) / (pixels - vessels)),
    }
    pooled = binned_auroc(np.sum([photo.counts for photo in photos], axis=0))
    overall = {"pixels_auroc": {"value": pooled if np.isfinite(pooled) else None, "low": None, "high": None}}
    return Measured({"vessel": label}, overall, table, which)


def vessel_means(table: pl.DataFrame) -> dict[str, dict[str, float | None]]:
    """Return the mean of each metric over photos with its interval, skipping photos for which it is undefined."""
    means = {}
    for name in VESSEL_FIGURES:
        known = table.filter(pl.col(name).is_finite())
        means[name] = mean_with_interval(known[name].to_numpy(), known["patient"].to_list()).to_dict()
    return means
