"""Whether a picture is a colour fundus photograph at all, judged by its colours and the shape of what is lit."""

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
"""A picture whose brightest parts stay below this grey level shows nothing."""


def judge_kind(small: NDArray[np.uint8], field: Field | None) -> None:
    """Refuse what is no colour fundus photograph.

    A round rim on a dark frame speaks for a fundus camera: colours must then only be possible ones. A picture without a
    rim (a retina cropped inside its field, a montage, a landscape) must be reddish nearly everywhere.

    Args:
        small: uint8 [h, w, 3] RGB from `shrink`.
        field: what `find_field` found in it.

    Raises:
        PhotoError: it is black (`ungradable`), grey (`unsupported`), or no retina (`not_fundus`).
    """
    red, green, blue = planes = cv2.split(small)
    value = cv2.max(cv2.max(red, green), blue)
    if np.count_nonzero(value >= _BLACK) < 0.01 * value.size:
        raise PhotoError(Status.UNGRADABLE, "the picture is black: no retina can be seen")
    spread = cv2.subtract(value, cv2.min(cv2.min(red, green), blue))
    if np.count_nonzero(spread <= 4) >= 0.98 * spread.size:
        # Red-free and angiography frames are often stored in three equal channels.
        raise PhotoError(Status.UNSUPPORTED, "a grey picture; a colour fundus photograph is needed")
    if field is not None and _looks_wide(small, field):
        raise PhotoError(Status.NOT_FUNDUS, "looks like a wide-field picture; a standard fundus photograph is needed")
    # Dark pixels have no colour to speak of.
    lit = cv2.inRange(value, 16, 255)
    share = retinal_share(planes, lit if field is None else cv2.bitwise_and(lit, field.mask))
    rim = field is not None and field.shape != "irregular" and field.circle.confidence >= 0.7
    if share < (0.3 if rim else 0.6):
        raise PhotoError(Status.NOT_FUNDUS, "the colours are not those of a retina")
    if not rim:
        _judge_without_rim(small)


def retinal_share(planes: Sequence[NDArray[np.uint8]], lit: NDArray[np.uint8]) -> float:
    """Share of the lit part whose colours a retina can have: not bluer than red, and not mostly green.

    Haemoglobin and melanin absorb blue light most and red least, whatever the camera or the pigmentation.

    Args:
        planes: red, green and blue, uint8 [h, w] each.
        lit: uint8 [h, w], 255 where to look; little to look at gives 0.
    """
    count = cv2.countNonZero(lit)
    if count < 0.02 * lit.size:
        return 0.0
    red, green, blue = planes
    # 0.95 x blue and 0.87 x green, in whole grey levels.
    bluish = cv2.compare(cv2.convertScaleAbs(blue, alpha=0.95), red, cv2.CMP_GE)
    greenish = cv2.compare(cv2.convertScaleAbs(green, alpha=0.87), red, cv2.CMP_GE)
    return 1 - cv2.countNonZero(cv2.bitwise_and(lit, cv2.bitwise_or(bluish, greenish))) / count


def _judge_without_rim(small: NDArray[np.uint8]) -> None:
    """Judge a picture without a round rim: a retina cropped inside its field, a montage, or half hidden.

    How much of it is hidden is for its quality to say.

    Raises:
        PhotoError: it is no retina.
    """
    red, _, blue = small.reshape(-1, 3).astype(np.float32).T
    lit = red > 20
    if not lit.any() or np.mean(red[lit] > 1.15 * blue[lit]) <= 0.9:
        raise PhotoError(Status.NOT_FUNDUS, "no round retinal field was found")


def _looks_wide(small: NDArray[np.uint8], field: Field) -> bool:
    """Whether it looks like a picture of a scanning wide-field camera: a lying oval in red and green without blue.

    Source: two lasers, red and green, make such pictures; the eyelids cut the field above and below.
    """
    if field.shape == "round":
        return False
    rows, columns = np.flatnonzero(field.mask.any(axis=1)), np.flatnonzero(field.mask.any(axis=0))
    if (columns[-1] - columns[0]) <= 1.15 * (rows[-1] - rows[0]):
        return False
    red, green, blue = (float(value) for value in cv2.mean(small, field.mask)[:3])
    return blue < 0.25 * red and green > 0.8 * red
