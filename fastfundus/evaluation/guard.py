"""The guard of a run: fitted to the features of its training photos, with a limit locked on validation photos."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import CheckpointError
from fastfundus.files import hash_file
from fastfundus.models.guard import Guard, GuardModel, Penultimate, fit_guard_model
from fastfundus.training.predict import forward_batches
from fastfundus.training.run import Run, read_table, run_file

__all__ = ["MIN_GUARD_PHOTOS", "REFUSED_SHARE", "fit_guard", "load_guard"]

REFUSED_SHARE = 0.005
"""Share of gradable validation photos beyond the limit."""
MIN_GUARD_PHOTOS = 100
"""Smallest number of training and of validation photos that a guard is fitted to."""
_MOST_PHOTOS = 5000
_FILE = "guard.safetensors"


def fit_guard(run: Run, cache: PhotoCache, model: nn.Module, validation: NDArray[np.int64]) -> dict[str, Any]:
    """Fit the guard of a run and write `guard.safetensors`.

    Args:
        run: a finished run.
        cache: the run's own cache.
        model: the run's network.
        validation: [N] rows of its validation photos.

    Returns:
        The entry of operating_point.json: `limit` with the SHA-256 of the file, or a `note` on why there is no guard.
    """
    training = _training_rows(run, cache)
    if min(len(training), len(validation)) < MIN_GUARD_PHOTOS:
        note = (
            f"no guard against unfamiliar photos: {len(training)} training and {len(validation)} validation photos, "
            f"it takes {MIN_GUARD_PHOTOS} of each"
        )
        return {"limit": None, "note": note}
    if not Penultimate.available(model, run.spec.size):
        return {"limit": None, "note": f"no guard: {run.config.model.backbone} has no features before its last layer"}
    fitted = fit_guard_model(_features(run, cache, model, _some(training)))
    distances = np.sort(fitted.distances(_features(run, cache, model, _some(validation))))
    limit = _limit(distances)
    tensors = {"mean": fitted.mean, "components": fitted.components, "deviations": fitted.deviations}
    with run_file(run.path / _FILE) as partial:
        save_file(tensors, partial)
    return {
        "limit": limit,
        "refused_share": REFUSED_SHARE,
        "photos": {"train": len(_some(training)), "val": len(distances)},
        "sha256": hash_file(run.path / _FILE),
        "note": None,
    }


def _limit(distances: NDArray[np.float32]) -> float:
    """Return a limit that `REFUSED_SHARE` of the sorted distances exceed, rather too wide for few photos.

    It lies between two photos, because rounding would decide about a photo on the limit differently in every engine.
    """
    accepted = len(distances) - int(REFUSED_SHARE * len(distances))
    last = float(distances[accepted - 1])
    return (last + float(distances[accepted])) / 2 if accepted < len(distances) else 1.05 * last


def load_guard(run: Run, entry: dict[str, Any] | None) -> Guard | None:
    """Return the guard of a run, or None if it has none.

    Args:
        run: a locked run.
        entry: "guard" of its operating_point.json.

    Raises:
        CheckpointError: the guard's file is missing, or changed after it was locked.
    """
    if entry is None or entry["limit"] is None:
        return None
    file = run.path / _FILE
    if not file.is_file() or hash_file(file) != entry["sha256"]:
        raise CheckpointError(
            f"{file}: missing, or changed after it was locked; remove operating_point.json and finish the run again: "
            "fastfundus train ... --resume"
        )
    return Guard(GuardModel(**load_file(file)), float(entry["limit"]))


def _training_rows(run: Run, cache: PhotoCache) -> NDArray[np.int64]:
    splits = read_table(run.path, "splits.parquet").filter(pl.col("split") == "train")
    rows = cache.manifest.select("path", "sha256").with_row_index("row")
    # A photo that has left the cache is one of many here.
    return splits.join(rows, on=["path", "sha256"], how="inner")["row"].unique().sort().to_numpy().astype(np.int64)


def _some(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    if len(rows) <= _MOST_PHOTOS:
        return rows
    return np.sort(np.random.default_rng(0).choice(rows, _MOST_PHOTOS, replace=False))


def _features(run: Run, cache: PhotoCache, model: nn.Module, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    batches = forward_batches(
        Penultimate(model), cache.photos, rows, run.spec, size=run.spec.size, batch_size=64, dtype=None
    )
    return np.concatenate([batch.cpu().numpy() for batch in batches])
