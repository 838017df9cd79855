"""Check that an image is a colour fundus photograph, by its colours and the shape of its lit region."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import PhotoError
from fastfundus.photo.field import Field
from fastfundus.records import Status

__all__ = ["judge_kind", "retinal_share"]

_BLACK = 12
"""An image whose brightest parts stay below this grey level is black."""


def judge_kind(small: NDArray[np.uint8], field: Field | None) -> None:
    """Reject images that are not colour fundus photographs.

    A round field on a dark frame is evidence of a fundus camera, so its colours only need to be plausible. An image
    without a field edge (a retina cropped inside its field, a montage, a landscape) must be reddish nearly everywhere.

    Args:
        small: uint8 [h, w, 3] RGB from `shrink`.
        field: The field that `find_field` found in it, if any.

    Raises:
        PhotoError: The image is black (`ungradable`), greyscale (`unsupported`), or not a retina (`not_fundus`).
    """
    red, green, blue = planes = cv2.split(small)
    value = cv2.max(cv2.max(red, green), blue)
    if np.count_nonzero(value >= _BLACK) < 0.01 * value.size:
        raise PhotoError(Status.UNGRADABLE, "the image is black: no retina is visible")
    spread = cv2.subtract(value, cv2.min(cv2.min(red, green), blue))
    if np.count_nonzero(spread <= 4) >= 0.98 * spread.size:
        # Red-free and angiography frames are often stored as three equal channels.
        raise PhotoError(Status.UNSUPPORTED, "greyscale image; a colour fundus photograph is required")
    if field is not None and _looks_wide(small, field):
        raise PhotoError(Status.NOT_FUNDUS, "looks like a wide-field image; a standard fundus photograph is required")
    # Exclude dark pixels, whose colour is not meaningful.
    lit = cv2.inRange(value, 16, 255)
    share = retinal_share(planes, lit if field is None else cv2.bitwise_and(lit, field.mask))
    edge = field is not None and field.shape != "irregular" and field.circle.confidence >= 0.7
    if share < (0.3 if edge else 0.6):
        raise PhotoError(Status.NOT_FUNDUS, "the colours are not those of a retina")
    if not edge:
        _check_without_edge(small)


def retinal_share(planes: Sequence[NDArray[np.uint8]], lit: NDArray[np.uint8]) -> float:
    """Return the share of lit pixels with a plausible retinal colour: not bluer than red, and not mostly green.

    Haemoglobin and melanin absorb blue light most and red light least, whatever the camera or the pigmentation.

    Args:
        planes: Red, green and blue, uint8 [h, w] each.
        lit: uint8 [h, w], 255 at the pixels to count.

    Returns:
        The share, 0 to 1; 0 if less than 2 % of the pixels are lit.
    """
    count = cv2.countNonZero(lit)
    if count < 0.02 * lit.size:
        return 0.0
    red, green, blue = planes
    # 0.95 x blue and 0.87 x green, in integer grey levels.
    bluish = cv2.compare(cv2.convertScaleAbs(blue, alpha=0.95), red, cv2.CMP_GE)
    greenish = cv2.compare(cv2.convertScaleAbs(green, alpha=0.87), red, cv2.CMP_GE)
    return 1 - cv2.countNonZero(cv2.bitwise_and(lit, cv2.bitwise_or(bluish, greenish))) / count


def _check_without_edge(small: NDArray[np.uint8]) -> None:
    """Check an image without a round field: a retina cropped inside its field, a montage, or a half-hidden field.

    How much of the retina is hidden is left to the quality check.

    Raises:
        PhotoError: The image is not a retina (`not_fundus`).
    """
    red, _, blue = small.reshape(-1, 3).astype(np.float32).T
    lit = red > 20
    if not lit.any() or np.mean(red[lit] > 1.15 * blue[lit]) <= 0.9:
        raise PhotoError(Status.NOT_FUNDUS, "no round retinal field was found")


def _looks_wide(small: NDArray[np.uint8], field: Field) -> bool:
    """Return whether the image looks like one from a scanning wide-field camera.

    Such images show a horizontal ellipse in red and green without blue, because the cameras scan with a red and a green
    laser; the eyelids cut the field above and below.
    """
    if field.shape == "round":
        return False
    rows, columns = np.flatnonzero(field.mask.any(axis=1)), np.flatnonzero(field.mask.any(axis=0))
    if (columns[-1] - columns[0]) <= 1.15 * (rows[-1] - rows[0]):
        return False
    red, green, blue = (float(value) for value in cv2.mean(small, field.mask)[:3])
    return blue < 0.25 * red and green > 0.8 * red
