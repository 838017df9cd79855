"""Whether a photo can be graded at all: light, sharpness, and how much of the field is there.

Measured on the square crop brought to 256 pixels, so that a score does not depend on the camera's resolution. A first,
deliberately lenient rule: it refuses what no reader could grade, and leaves the doubtful to the reader.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.photo.field import brightest

__all__ = ["LEAST_QUALITY", "Quality", "measure_quality"]

LEAST_QUALITY = 0.25
"""Photos that score lower are `ungradable`."""
_WORK_PX = 256
_ROWS, _COLUMNS = np.ogrid[:_WORK_PX, :_WORK_PX]
_FROM_CENTRE = np.hypot(_COLUMNS + 0.5 - _WORK_PX / 2, _ROWS + 0.5 - _WORK_PX / 2) / (_WORK_PX / 2)
_FIELD = _FROM_CENTRE < 0.95
# The rim's own edge must not count as sharp detail.
_INNER = _FROM_CENTRE < 0.80


@dataclass(frozen=True, slots=True)
class Quality:
    """A gradability score and what lowered it."""

    score: float
    """0 (cannot be graded) to 1: the smallest of the three marks below."""
    light: float
    """0 to 1, from the median brightness of the lit part of the field."""
    sharpness: float
    """0 to 1, from fine contrast relative to brightness."""
    completeness: float
    """0 to 1, from the lit share of the field."""

    @property
    def reason(self) -> str:
        """What makes the photo poor, in words; empty when nothing does."""
        words = {"light": "too dark", "sharpness": "out of focus", "completeness": "part of the field is missing"}
        return ", ".join(text for mark, text in words.items() if getattr(self, mark) < LEAST_QUALITY)


def _mark(value: float, nothing: float, full: float) -> float:
    return float(np.clip((value - nothing) / (full - nothing), 0, 1))


def measure_quality(crop: NDArray[np.uint8]) -> Quality:
    """Measure a square crop whose inscribed circle is the retinal field.

    Args:
        crop: uint8 [S, S, 3] RGB.
    """
    small = cv2.resize(crop, (_WORK_PX, _WORK_PX), interpolation=cv2.INTER_AREA)
    value = brightest(small)
    # Of what is lit at all: a missing part is marked by completeness, not as darkness too.
    shown = value[_FIELD & (value > 10)]
    brightness = float(np.median(shown)) if len(shown) > 500 else 0.0
    lit = float(np.mean(value[_FIELD] > max(10.0, 0.16 * float(np.percentile(value[_FIELD], 90)))))
    # Vessels and lesions live at two to six pixels here; what remains after subtracting a wider blur is theirs. Blur
    # of half a pixel first: sensor noise is no detail.
    green = cv2.GaussianBlur(small[..., 1].astype(np.float32), (0, 0), 1.0)
    detail = np.abs(green - cv2.GaussianBlur(green, (0, 0), 3.0))
    seen = _INNER & (value > 10)
    contrast = float(np.mean(detail[seen]) / (np.mean(green[seen]) + 4)) if seen.sum() > 500 else 0.0
    light = _mark(brightness, 14, 54)
    sharpness = _mark(contrast, 0.004, 0.014)
    completeness = _mark(lit, 0.50, 0.85)
    return Quality(min(light, sharpness, completeness), light, sharpness, completeness)
