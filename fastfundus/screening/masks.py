"""Masks from bundles that produce maps, such as vessels: one PNG per photo and label, in original photo coordinates."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from fastfundus.data.masks import native_map
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import DataError
from fastfundus.files import atomic_write
from fastfundus.screening.pipeline import ScreenedPhoto

__all__ = ["mask_name", "write_masks"]


def mask_name(photo: str, label: str) -> str:
    """Return the path of a photo's mask, relative to the output folder.

    Names are untrusted: one that is unsafe, such as one that leads out of the folder, is replaced by its hash.
    """
    parts = PurePosixPath(photo).parts
    if photo.startswith("/") or ".." in parts or "\\" in photo or "\0" in photo or len(photo.encode()) > 200:
        photo = hashlib.sha256(photo.encode()).hexdigest()
    return f"masks/{label}/{photo}.png"


def write_masks(photo: ScreenedPhoto, bundle: Bundle, output: Path) -> dict[str, Any]:
    """Write the masks of one photo: 255 where the probability reaches the bundle's threshold, 0 elsewhere.

    Args:
        photo: a scored photo with maps [L, S, S].
        bundle: provides the thresholds.
        output: results folder.

    Returns:
        Columns of the photo's row: `mask_<label>`, the file, and `share_<label>`, the share of the window's pixels
        that reach the threshold, 0 to 1.

    Raises:
        OSError: a mask cannot be written.
    """
    if photo.answer is None:
        return {}
    prepared = photo.prepared
    if prepared.window is None:
        raise DataError("was scored but has no window; please report this file", path=photo.source.path)
    left, top, side = prepared.window
    known = {
        "window_x_px": left, "window_y_px": top, "window_side_px": side,
        "width_px": prepared.width_px, "height_px": prepared.height_px,
    }  # fmt: skip
    columns: dict[str, Any] = {}
    for label, probabilities, threshold in zip(bundle.labels, photo.answer, bundle.thresholds, strict=True):
        reached = native_map(probabilities, known) >= threshold
        path = output / mask_name(photo.source.name, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        _, encoded = cv2.imencode(".png", reached.astype(np.uint8) * 255, [cv2.IMWRITE_PNG_BILEVEL, 1])
        with atomic_write(path) as partial:
            partial.write_bytes(encoded.tobytes())
        columns[f"mask_{label}"] = mask_name(photo.source.name, label)
        columns[f"share_{label}"] = float((probabilities >= threshold).mean())
    return columns
