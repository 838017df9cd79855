"""Detection of the retinal field: a bright disc on a dark frame, often cut at the top and bottom, notched or squeezed.

Detection works on a copy of the photo at most 192 pixels wide. A white or grey margin is painted black, the part
brighter than the frame is outlined, and a circle is fitted to the outline. If no circle fits, an axis-aligned ellipse
is tried, because some exports squeeze photos. If that fails too, the lit region is used as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.photo.ellipse import Oval, agreement, explained, fit_circle, fit_oval, outline
from fastfundus.records import FieldCircle

__all__ = ["Field", "brightest", "count_fields", "find_field", "lit_parts", "without_margin"]

_ROUND = 0.80
"""Share of the visible edge that must agree with a circle for it to be accepted as the field."""
_OVAL = 0.55
_FRAME_SHARE = 0.08
"""Smallest share of dark frame; with less, the image was cropped inside the field."""
# Points spread evenly over the unit disc. They stay slightly inside the edge, so that its soft transition does not
# count as missing.
_ANGLE, _RADIUS = np.meshgrid(np.linspace(0, 2 * np.pi, 48, endpoint=False), 0.96 * np.sqrt((np.arange(12) + 0.5) / 12))
_SPREAD = np.stack([(_RADIUS * np.cos(_ANGLE)).ravel(), (_RADIUS * np.sin(_ANGLE)).ravel()])
_SIDES = {
    "top": np.flatnonzero(_SPREAD[1] < -np.abs(_SPREAD[0])),
    "bottom": np.flatnonzero(_SPREAD[1] > np.abs(_SPREAD[0])),
    "left": np.flatnonzero(_SPREAD[0] < -np.abs(_SPREAD[1])),
    "right": np.flatnonzero(_SPREAD[0] > np.abs(_SPREAD[1])),
}
_MIN_FIELD_SHARE = 0.05
"""Smallest share of the picture that a field fills, if fields are counted."""
_MIN_SHARE_OF_SECOND = 0.15
"""Smallest second field, as a share of the area of the first: a field of half its size has a quarter."""
_WIDE, _TALL, _TOO_LONG = 1.65, 1.2, 1.75
"""Aspect ratios from which a wide and a tall picture is divided into tiles, and from which it must show one field.
Frames of cameras are at most 1.6 times as wide as high, and never much higher than wide."""
_MAX_TILES = 6
_SURE = 0.7
"""Confidence of the field of a tile."""
_MIN_FILLED = 0.55
"""Share of its enclosing circle that a field fills at least; fields that are cut at the top and bottom fill 0.6."""
_OPENING = np.ones((5, 5), np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Field:
    """The retinal field in a downscaled image."""

    circle: FieldCircle
    """Circle to crop to, in pixels of the downscaled image: the edge of a round field, otherwise a circle around the
    lit region. Its confidence is the share of the visible edge that agrees with the fitted shape, times the share of
    the lit region that the shape contains."""
    mask: NDArray[np.uint8]
    """uint8 [h, w], 255 where the image is lit."""
    shape: str
    """"round", "oval" (squeezed), or "irregular" (no circle or ellipse fits the edge)."""
    oval: Oval
    """The fitted shape; equal to the circle unless the shape is "oval"."""

    def completeness(self) -> tuple[float, tuple[str, ...]]:
        """Measure how much of the field is visible.

        Returns:
            The lit share of the fitted shape, 0 to 1, where points outside the image count as dark; and the one or two
            sides ("top", "bottom", "left", "right") with most of the missing part. No sides are named if nothing is
            missing, or if parts are missing all around.
        """
        height, width = self.mask.shape
        columns = np.floor(self.oval.x + self.oval.half_width * _SPREAD[0]).astype(np.intp)
        rows = np.floor(self.oval.y + self.oval.half_height * _SPREAD[1]).astype(np.intp)
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        lit = np.zeros(len(rows), np.bool_)
        lit[inside] = self.mask[rows[inside], columns[inside]] > 0
        shares = {side: float(lit[where].mean()) for side, where in _SIDES.items()}
        minimum = min(shares.values())
        # An obstruction on one side extends into its neighbours, so name only the worst sides.
        sides = tuple(side for side, share in shares.items() if share < 0.6 and share < minimum + 0.25)
        return float(lit.mean()), sides if len(sides) <= 2 else ()


def brightest(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the maximum of R, G and B at each pixel, [h, w].

    Ten times as fast as NumPy's max over the last axis.
    """
    red, green, blue = cv2.split(rgb)
    return cv2.max(cv2.max(red, green), blue)


def find_field(small: NDArray[np.uint8], parts: list[NDArray[np.int32]] | None = None) -> Field | None:
    """Find the retinal field.

    Args:
        small: uint8 [h, w, 3] RGB from `shrink`, without a margin.
        parts: its `lit_parts`; None finds them.

    Returns:
        The field, or None if there is no dark frame, as in an image cropped inside the field.
    """
    parts = lit_parts(small) if parts is None else parts
    if not parts:
        return None
    part = max(parts, key=cv2.contourArea)
    mask = np.zeros(small.shape[:2], np.uint8)
    # Fill the contour: a dark fovea or lesion is not a hole in the field.
    cv2.drawContours(mask, [part], -1, 255, cv2.FILLED)
    if cv2.countNonZero(mask) > (1 - _FRAME_SHARE) * mask.size:
        return None
    points = outline(part, mask.shape)
    if len(points) < 24:
        return None
    circle = fit_circle(points, mask.shape)
    confidence = 0.0 if circle is None else agreement(mask, circle)
    followed = 0.0 if circle is None else explained(points, circle)
    # An arc of an ellipse can lie on a large circle whose other arcs are outside the image, so the whole outline must
    # match.
    if circle is None or min(confidence, followed) < _ROUND:
        oval = fit_oval(points, mask.shape)
        fitted = 0.0 if oval is None else agreement(mask, oval)
        if oval is not None and fitted >= max(_OVAL, confidence - 0.05) and explained(points, oval) > followed + 0.1:
            return Field(_around(mask, oval, fitted), mask, "oval", oval)
        if circle is None or confidence < _OVAL:
            around = _around(mask, None, max(fitted, confidence))
            return Field(around, mask, "irregular", Oval(around.x_px, around.y_px, around.radius_px, around.radius_px))
    return Field(FieldCircle(circle.x, circle.y, circle.half_width, confidence), mask, "round", circle)


def count_fields(small: NDArray[np.uint8], parts: list[NDArray[np.int32]] | None = None) -> int:
    """Count the retinal fields in a picture, which may show both eyes or one eye twice.

    Fields are round lit regions of similar size. A lit region that is about twice as long as wide is two fields that
    touch, if each half is round.

    Args:
        small: uint8 [h, w, 3] RGB from `shrink`, without a margin.
        parts: its `lit_parts`; None finds them.

    Returns:
        The number of fields: 0 or 1 unless several are seen.
    """
    parts = lit_parts(small) if parts is None else parts
    tiles = _count_tiles(small, parts)
    if tiles > 1:
        return tiles
    if not parts:
        return 0
    areas = [cv2.contourArea(part) for part in parts]
    first = max(areas)
    if first < _MIN_FIELD_SHARE * small.shape[0] * small.shape[1]:
        return 1
    large = [part for part, area in zip(parts, areas, strict=True) if area >= _MIN_SHARE_OF_SECOND * first]
    if len(large) > 1:
        return max(1, sum(_is_filled(part) for part in large))
    return 2 if _is_two_that_touch(large[0], small.shape) else 1


def _count_tiles(small: NDArray[np.uint8], parts: list[NDArray[np.int32]]) -> int:
    """Return the number of equal tiles of a long picture that each show a field in their middle, or 1."""
    height, width = small.shape[:2]
    across, aspect = width > height, max(width, height) / min(width, height)
    if aspect < (_WIDE if across else _TALL):
        return 1
    # The most likely number first: fields are about as wide as high.
    for count in sorted(range(2, _MAX_TILES + 1), key=lambda count: abs(np.log(aspect / count))):
        side = max(width, height) // count
        if not 0.6 <= side / min(width, height) <= 1.7:
            continue
        starts = range(0, count * side, side)
        tiles = [small[:, at : at + side] if across else small[at : at + side] for at in starts]
        if all(_shows_field(np.ascontiguousarray(tile)) for tile in tiles):
            return count
    found = find_field(small, parts)
    # No camera has so long a frame: several photos without their frames.
    alone = found is not None and found.shape == "round" and found.circle.confidence >= _ROUND
    return 1 if aspect < _TOO_LONG or alone else max(2, round(aspect))


def _shows_field(tile: NDArray[np.uint8]) -> bool:
    """Return whether a tile shows a round field around its middle; a part of a larger field lies at an edge."""
    # A narrow frame makes a field that touches the edges of its tile visible as one.
    found = find_field(cv2.copyMakeBorder(tile, 6, 6, 6, 6, cv2.BORDER_CONSTANT, value=(0, 0, 0)))
    if found is None or found.shape == "irregular" or found.circle.confidence < _SURE:
        return False
    height, width = tile.shape[:2]
    x, y = (found.circle.x_px - 6) / width, (found.circle.y_px - 6) / height
    return 0.3 < x < 0.7 and 0.3 < y < 0.7 and found.circle.radius_px > 0.3 * min(height, width)


def _is_filled(part: NDArray[np.int32]) -> bool:
    (_, radius) = cv2.minEnclosingCircle(part)
    return cv2.contourArea(part) >= _MIN_FILLED * np.pi * radius**2


def _is_two_that_touch(part: NDArray[np.int32], shape: tuple[int, ...]) -> bool:
    left, top, width, height = cv2.boundingRect(part)
    if not 1.7 <= max(width, height) / max(1, min(width, height)) <= 2.3:
        return False
    mask = np.zeros(shape[:2], np.uint8)
    cv2.drawContours(mask, [part], -1, 255, cv2.FILLED)
    box = mask[top : top + height, left : left + width]
    box = box if width > height else np.ascontiguousarray(box.T)
    # Two discs have a waist where they touch; a strip or one squeezed field has none.
    extent = np.count_nonzero(box, axis=0)
    middle = extent[int(0.45 * len(extent)) : int(0.55 * len(extent)) + 1].min()
    quarters = min(extent[len(extent) // 4], extent[3 * len(extent) // 4])
    return bool(middle < 0.6 * quarters)


def without_margin(small: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Paint a white or grey margin black, such as the border of a slide, scan or export.

    A margin is detected if at least three corners share one bright, colourless tone; no retina reaches that many
    corners. An image without a margin is returned unchanged.
    """
    height, width = small.shape[:2]
    tones = {}
    for corner in ((1, 1), (width - 2, 1), (1, height - 2), (width - 2, height - 2)):
        tone = small[corner[1], corner[0]].tolist()
        if min(tone) > 60 and max(tone) - min(tone) <= 16:
            tones[corner] = sum(tone)
    if len(tones) < 3 or max(tones.values()) - min(tones.values()) > 3 * 24:
        return small
    filled = small.copy()
    for corner in tones:
        if filled[corner[1], corner[0]].any():
            # Compare with the tone of the corner, not of the neighbouring pixel, so that the fill does not leak into
            # the photo across a soft edge.
            flags = 4 | cv2.FLOODFILL_FIXED_RANGE
            cv2.floodFill(filled, None, corner, (0, 0, 0), (24,) * 3, (24,) * 3, flags)
    return filled


def lit_parts(small: NDArray[np.uint8]) -> list[NDArray[np.int32]]:
    """Return the contours, as OpenCV gives them, of the connected regions of a picture brighter than its frame.

    The threshold is about a tenth of the way from the darkest parts to the bright ones.

    Args:
        small: uint8 [h, w, 3] RGB from `shrink`, without a margin.
    """
    value = cv2.medianBlur(brightest(small), 3)
    counts = cv2.calcHist([value], [0], None, [256], [0, 256]).ravel().cumsum()
    low, high = np.searchsorted(counts, (0.02 * value.size, 0.90 * value.size)).tolist()
    _, lit = cv2.threshold(value, low + max(5.0, 0.11 * (high - low)), 255, cv2.THRESH_BINARY)
    # Opening removes burned-in text and specks that touch the field.
    opened = cv2.morphologyEx(lit, cv2.MORPH_OPEN, _OPENING)
    parts, _ = cv2.findContours(opened, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return list(parts)


def _around(mask: NDArray[np.uint8], oval: Oval | None, confidence: float) -> FieldCircle:
    """Return a circle around the lit region, centred on the ellipse or, without one, on the region's middle.

    One pixel in 200 may be outside the circle, so that specks touching the field do not widen the crop.
    """
    rows, columns = np.nonzero(mask)
    if oval is not None:
        x, y = oval.x, oval.y
    else:
        (left, right), (top, bottom) = np.percentile(columns, (0.5, 99.5)), np.percentile(rows, (0.5, 99.5))
        x, y = (left + right + 1) / 2, (top + bottom + 1) / 2
    distance = np.hypot(columns + 0.5 - x, rows + 0.5 - y)
    return FieldCircle(float(x), float(y), float(np.percentile(distance, 99.5)) + 0.5, confidence)
