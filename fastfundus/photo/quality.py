"""Quality of a photo: exposure, sharpness, contrast, colour, and completeness of the field.

Quality is measured on the square crop resized to 256 pixels, so that the score does not depend on the camera's
resolution. The rule is deliberately lenient: it rejects photos that no reader could grade, and leaves doubtful ones to
the reader. The limits were set by inspecting the photographs closest to them; `make photos` publishes the photos that
they reject.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.photo.fundus_check import retinal_share
from fastfundus.photo.resample import halve_to, resize_square

__all__ = ["MARKS", "MIN_QUALITY", "QUALITY_PX", "Quality", "measure_quality"]

QUALITY_PX = 256
"""Side in pixels of the crop in which quality is measured."""
MIN_QUALITY = 0.25
"""Photos with a lower score are `ungradable`."""
MARKS = ("exposure", "sharpness", "contrast", "completeness", "colour")
_ROWS, _COLUMNS = np.ogrid[:QUALITY_PX, :QUALITY_PX]
_FROM_CENTRE = np.hypot(_COLUMNS + 0.5 - QUALITY_PX / 2, _ROWS + 0.5 - QUALITY_PX / 2) / (QUALITY_PX / 2)
_FIELD = np.ascontiguousarray((_FROM_CENTRE < 0.95).astype(np.uint8)[::2, ::2] * 255)
# Measure detail in the middle, so that the edge of the field does not count. The bounding box is 208 pixels wide.
_BOX = slice(24, QUALITY_PX - 24)
_INNER = np.ascontiguousarray((_FROM_CENTRE < 0.80).astype(np.uint8)[_BOX, _BOX] * 255)
_EROSION = np.ones((7, 7), np.uint8)
_LIT = 10
_MIN_PIXELS = 125


@dataclass(frozen=True, slots=True)
class Quality:
    """Five component scores, each 0 (cannot be graded) to 1, and their description in words."""

    exposure: float
    """Score of the median brightness of the lit part, and of its saturated share."""
    sharpness: float
    """Score of fine detail (2 to 6 pixels of 256) relative to brightness."""
    contrast: float
    """Score of coarse detail (vessels, disc: 6 to 16 pixels of 256) relative to brightness; low in haze or cataract."""
    completeness: float
    """Score of the lit share of the field."""
    colour: float
    """Score of the share of the lit part that has plausible retinal colours."""
    too_bright: bool = False
    """True if `exposure` is low because of too much light rather than too little."""
    missing: tuple[str, ...] = ()
    """Sides with most of the missing part: "top", "bottom", "left", "right"; empty if parts are missing all around."""

    @property
    def score(self) -> float:
        """The smallest component score: a single fault is enough to spoil a photo."""
        return min(getattr(self, mark) for mark in MARKS)

    @property
    def reason(self) -> str:
        """The faults of the photo, in words; empty if there are none."""
        missing = f"field cut at {' and '.join(self.missing)}" if self.missing else ""
        words = {
            "exposure": "too bright" if self.too_bright else "too dark",
            "sharpness": "out of focus",
            "contrast": "no contrast: haze or a clouded lens",
            "completeness": missing or "most of the field is dark or missing",
            "colour": "unnatural colours",
        }
        return ", ".join(text for mark, text in words.items() if getattr(self, mark) < MIN_QUALITY)


def _mark(value: float, nothing: float, full: float) -> float:
    return float(np.clip((value - nothing) / (full - nothing), 0, 1))


def measure_quality(crop: NDArray[np.uint8], completeness: float = 1.0, missing: tuple[str, ...] = ()) -> Quality:
    """Measure the quality of a square crop around the retinal field.

    Args:
        crop: uint8 [S, S, 3] RGB, with the field inside the inscribed circle; S of 256 or more for a fair score.
        completeness: The share from `Field.completeness`; 1 if the crop has no field.
        missing: The sides from `Field.completeness`.
    """
    small = resize_square(crop, QUALITY_PX, exact=False)
    # Measure light and colour at half the resolution.
    half = halve_to(small, QUALITY_PX // 2)
    red, green, blue = planes = cv2.split(half)
    value = cv2.max(cv2.max(red, green), blue)
    # Use only lit pixels: missing parts lower completeness and must not count as darkness too.
    lit = cv2.bitwise_and(cv2.inRange(value, _LIT + 1, 255), _FIELD)
    shown = cv2.countNonZero(lit)
    if shown < _MIN_PIXELS:
        return Quality(0.0, 0.0, 0.0, 0.0, 0.0, missing=missing)
    counts = cv2.calcHist([value], [0], lit, [256], [0, 256]).ravel().cumsum()
    dark = _mark(float(np.searchsorted(counts, shown / 2)), 14, 54)
    saturated = cv2.countNonZero(cv2.bitwise_and(cv2.inRange(green, 245, 255), lit)) / shown
    bright = _mark(saturated, 0.30, 0.05)
    inner = cv2.resize(cv2.erode(lit, _EROSION), (QUALITY_PX, QUALITY_PX), interpolation=cv2.INTER_NEAREST)
    inner = cv2.bitwise_and(inner[_BOX, _BOX], _INNER)
    # Blur by one pixel first, so that sensor noise does not count as detail. The kernels cover at least two and a half
    # standard deviations.
    fine = cv2.GaussianBlur(small[_BOX, _BOX, 1].astype(np.float32), (7, 7), 1.0)
    middle = cv2.GaussianBlur(fine, (15, 15), 2.8)
    level = cv2.mean(fine, inner)[0] + 4
    sharp = cv2.norm(fine, middle, cv2.NORM_L1, inner) / (max(1, cv2.countNonZero(inner)) * level)
    # Coarse detail is smooth, so a quarter of the resolution suffices.
    size = (len(middle) // 4, len(middle) // 4)
    quarter = cv2.resize(middle, size, interpolation=cv2.INTER_AREA)
    inner = cv2.resize(inner, size, interpolation=cv2.INTER_NEAREST)
    smooth = cv2.GaussianBlur(quarter, (11, 11), 2.0)
    contrast = cv2.norm(quarter, smooth, cv2.NORM_L1, inner) / (max(1, cv2.countNonZero(inner)) * level)
    return Quality(
        exposure=min(dark, bright),
        sharpness=_mark(sharp, 0.003, 0.013),
        contrast=_mark(contrast, 0.002, 0.010),
        completeness=_mark(completeness, 0.50, 0.85),
        colour=_mark(retinal_share(planes, lit), 0.30, 0.80),
        too_bright=bright < dark,
        missing=missing,
    )
