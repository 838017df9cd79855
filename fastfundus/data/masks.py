"""Vessel masks of cached photos, and transforms from cache coordinates to those of the original photo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import DataError, close_matches

__all__ = ["MASK_COLUMN", "crop_transform", "native_map", "native_masks", "photos_with_masks"]

MASK_COLUMN = "mask_vessels"
"""Manifest column with the mask path, as written by the adapters of DRIVE, STARE, HRF, ..."""
_FIELD_COLUMN = "mask_field"


def photos_with_masks(manifest: pl.DataFrame, column: str) -> NDArray[np.int64]:
    """Return the rows that are `ok` and have a mask.

    Raises:
        DataError: the column does not exist, or there is no such row.
    """
    if column not in manifest.columns or manifest.schema[column] != pl.String:
        masks = [name for name in manifest.columns if name.startswith("mask_")]
        raise DataError(
            f"the cache has no column {column!r} with mask paths{close_matches(column, masks) if masks else ''}; "
            "prepare a data set with masks (see prepare --list-adapters) or list them in a label file"
        )
    rows = np.flatnonzero(manifest.select((pl.col("status") == "ok") & pl.col(column).is_not_null()).to_series())
    if not len(rows):
        raise DataError("no photo has both status ok and a mask; see the status and mask columns of the manifest")
    return rows


def crop_transform(known: dict[str, Any], size: int) -> NDArray[np.float64]:
    """Return the [2, 3] transform from pixel positions in the cached photo to those in the original photo."""
    scale = known["window_side_px"] / size
    return np.array([[scale, 0, known["window_x_px"]], [0, scale, known["window_y_px"]]])


def native_masks(cache: PhotoCache, row: int, column: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Read the vessel mask and the field-of-view mask of a photo, [H, W] each, at the original size.

    If the data set has no field-of-view mask, the field circle found during preparation is used.

    Raises:
        DataError: a mask cannot be read, or its size differs from that of its photo.
    """
    known = cache.manifest.row(row, named=True)
    shape = known["height_px"], known["width_px"]
    vessels = _read(cache.source / known[column], shape)
    if known.get(_FIELD_COLUMN):
        return vessels, _read(cache.source / known[_FIELD_COLUMN], shape)
    if known["field_radius_px"] is None:
        return vessels, np.ones(shape, bool)
    y, x = np.ogrid[: shape[0], : shape[1]]
    distance = np.hypot(x + 0.5 - known["field_x_px"], y + 0.5 - known["field_y_px"])
    return vessels, distance <= known["field_radius_px"]


def native_map(values: NDArray[np.float32], known: dict[str, Any]) -> NDArray[np.float32]:
    """Warp a map of a cached photo, [S, S], to the original photo, [H, W]; 0 outside the window.

    Interpolation is bilinear, suited to an original that is finer than the cache and to full-resolution caches.
    """
    forward = crop_transform(known, len(values))
    # OpenCV places the origin at a pixel centre, this library at a pixel corner.
    forward[:, 2] += forward[:, :2] @ [0.5, 0.5] - 0.5
    return cv2.warpAffine(values, forward, (known["width_px"], known["height_px"]), flags=cv2.INTER_LINEAR)


def _read(path: Path, shape: tuple[int, int]) -> NDArray[np.bool_]:
    try:
        with Image.open(path) as image:
            grey = np.array(image.convert("L") if image.mode not in ("1", "P") else image.convert("RGB").convert("L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be read as a mask ({error}); obtain the file again", path=path) from None
    if grey.shape != shape:
        raise DataError(
            f"is {grey.shape[1]}x{grey.shape[0]} pixels, but its photo is {shape[1]}x{shape[0]}; sizes must match",
            path=path,
        )
    # Half the maximum as threshold: masks come as 0 and 1, as 0 and 255, and as JPEGs with grey edges.
    return grey > grey.max() / 2
