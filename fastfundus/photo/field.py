"""Finds the retinal field: a bright disc on a dark frame, often cut at top and bottom, sometimes notched.

The photo is looked at 256 pixels wide. What is brighter than the frame is outlined row by row and column by column;
circles through three outline points compete, and the one that most of the outline agrees with is refined by least
squares. Outline points on the edge of the picture say where it was cut, not where the field ends, and are left out.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.records import FieldCircle

__all__ = ["LEAST_CONFIDENCE", "brightest", "find_field", "looks_grey", "looks_like_retina", "shrink"]

_WORK_PX = 256
LEAST_CONFIDENCE = 0.4
"""Circles less certain than this are not used to crop."""
_TRIALS = 300
_MOST_VOTERS = 400
_LEAST_SEEN = 0.65
_LEAST_LIT = 0.4
_RIM_ANGLES = np.linspace(0, 2 * np.pi, 360, endpoint=False)


def shrink(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Area-average a photo to at most 256 pixels on its long side: what the functions below look at."""
    height, width = rgb.shape[:2]
    scale = min(1.0, _WORK_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def brightest(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Largest of R, G and B at each pixel, [h, w]; ten times as fast as NumPy's max over the last axis."""
    red, green, blue = cv2.split(rgb)
    return cv2.max(cv2.max(red, green), blue)


def find_field(small: NDArray[np.uint8]) -> FieldCircle | None:
    """Find the circle of the retinal field.

    Args:
        small: uint8 [h, w, 3] RGB from `shrink`.

    Returns:
        The circle in pixels of `small`, with the share of the visible rim that agrees with it; None when no outline
        was found, as on a picture without a dark frame.
    """
    value = cv2.medianBlur(brightest(small), 3).astype(np.float32)
    threshold = _threshold(value)
    mask = _largest_part(value > threshold)
    points = _outline(mask)
    if len(points) < 24:
        return None
    circle = _best_circle(points, mask.shape)
    if circle is None:
        return None
    x, y, radius = circle
    return FieldCircle(x, y, radius, _confidence(mask, x, y, radius))


def _threshold(value: NDArray[np.float32]) -> float:
    """Brightness that separates frame from field: a share of the way from the darkest parts to the bright ones."""
    low, high = np.percentile(value, (2, 90))
    return float(low + max(5.0, 0.11 * (high - low)))


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    # Opening cuts off burned-in text and specks that touch the field.
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    if count < 2:
        return np.zeros(mask.shape, np.bool_)
    return np.asarray(labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])), np.bool_)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """First and last lit pixel of each row and column, [P, 2] as x, y; those on the edge of the picture left out."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, right = mask[rows].argmax(axis=1), width - mask[rows, ::-1].argmax(axis=1)
    top, bottom = mask[:, columns].argmax(axis=0), height - mask[::-1][:, columns].argmax(axis=0)
    # Positions are pixel corners: a lit pixel i covers i to i + 1.
    points = np.concatenate(
        [
            np.stack([left, rows + 0.5], 1),
            np.stack([right, rows + 0.5], 1),
            np.stack([columns + 0.5, top], 1),
            np.stack([columns + 0.5, bottom], 1),
        ]
    ).astype(np.float64)
    x, y = points.T
    return points[(x > 2) & (x < width - 2) & (y > 2) & (y < height - 2)]


def _best_circle(points: NDArray[np.float64], shape: tuple[int, ...]) -> tuple[float, float, float] | None:
    # Seeded: the same photo must always give the same crop.
    chosen = np.random.default_rng(0).integers(0, len(points), (_TRIALS, 3))
    circles = _through_three(points[chosen])
    voters = points[:: max(1, len(points) // _MOST_VOTERS)]
    for tolerance in (2.0, 1.5, 1.5):
        circles = circles[_plausible(circles, shape)]
        if not len(circles):
            return None
        best = circles[int(np.argmax(_agree(circles, voters, tolerance).sum(axis=1)))]
        inliers = _agree(best[None], points, tolerance)[0]
        if inliers.sum() < 12:
            return None
        circles = _least_squares(points[inliers])[None]
    if not _plausible(circles, shape)[0]:
        return None
    x0, y0, r0 = (float(value) for value in circles[0])
    return x0, y0, r0


def _agree(circles: NDArray[np.float64], points: NDArray[np.float64], tolerance: float) -> NDArray[np.bool_]:
    """Which points lie within `tolerance` pixels of each circle, [C, 3] and [P, 2] -> [C, P]."""
    squared = (points[:, 0] - circles[:, :1]) ** 2 + (points[:, 1] - circles[:, 1:2]) ** 2
    radius = circles[:, 2:]
    return (squared > (radius - tolerance) ** 2) & (squared < (radius + tolerance) ** 2)


def _plausible(circles: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Whether each circle is large enough and most of its diameter lies in the picture both ways.

    One side of a squeezed field fits a far larger circle, which hangs out of the frame.
    """
    height, width = shape
    x, y, radius = circles.T
    with np.errstate(invalid="ignore"):
        seen_x = np.minimum(x + radius, width) - np.maximum(x - radius, 0)
        seen_y = np.minimum(y + radius, height) - np.maximum(y - radius, 0)
        sound = (radius > 0.2 * min(height, width)) & (np.minimum(seen_x, seen_y) > _LEAST_SEEN * 2 * radius)
    return sound & np.isfinite(circles).all(axis=1)


def _through_three(triples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Circles through three points each, [T, 3, 2] -> [T, 3] as x, y, radius; not finite where they lie on a line."""
    a, b, c = triples[:, 0], triples[:, 1], triples[:, 2]
    ab, ac = b - a, c - a
    twice_area = 2 * (ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0])
    ab2, ac2 = (ab**2).sum(axis=1), (ac**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = (ac[:, 1] * ab2 - ab[:, 1] * ac2) / twice_area
        y = (ab[:, 0] * ac2 - ac[:, 0] * ab2) / twice_area
    return np.stack([a[:, 0] + x, a[:, 1] + y, np.hypot(x, y)], axis=1)


def _least_squares(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Algebraic circle fit: x, y, radius. Source: Kåsa, IEEE Trans. Instrum. Meas. 25 (1976)."""
    system = np.column_stack([2 * points, np.ones(len(points))])
    (x, y, rest), *_ = np.linalg.lstsq(system, (points**2).sum(axis=1), rcond=None)
    return np.array([x, y, np.sqrt(max(rest + x * x + y * y, 0.0))])


def _confidence(mask: NDArray[np.bool_], x: float, y: float, radius: float) -> float:
    """Share of the visible rim that agrees with a circle: lit on its inner side, dark on its outer side.

    Times the share of the lit part that the circle holds: an arc of an ellipse agrees with a circle that leaves half
    the retina out.
    """
    height, width = mask.shape
    direction = np.stack([np.cos(_RIM_ANGLES), np.sin(_RIM_ANGLES)], axis=1)
    inner, outer = (np.floor(np.array([x, y]) + radius * share * direction).astype(int) for share in (0.96, 1.04))
    visible = (outer >= 0).all(axis=1) & (outer[:, 0] < width) & (outer[:, 1] < height)
    if visible.sum() < 36:
        return 0.0
    inner, outer = inner[visible], outer[visible]
    agree = mask[inner[:, 1], inner[:, 0]] & ~mask[outer[:, 1], outer[:, 0]]
    rows, columns = np.nonzero(mask)
    held = np.hypot(columns + 0.5 - x, rows + 0.5 - y) < 1.04 * radius
    if held.sum() < _LEAST_LIT * np.pi * radius**2:
        return 0.0
    return float(agree.mean() * held.mean())


def looks_grey(small: NDArray[np.uint8]) -> bool:
    """Whether a picture stored in colour has none: red-free and angiography frames are often saved so."""
    red, green, blue = cv2.split(small)
    spread = cv2.subtract(brightest(small), cv2.min(cv2.min(red, green), blue))
    return bool(np.mean(spread <= 4) >= 0.98)


def looks_like_retina(small: NDArray[np.uint8], circle: FieldCircle | None) -> bool:
    """Whether the colours could be a retina's: more red than blue in most places, and not mostly green.

    Haemoglobin and melanin absorb blue light most and red least, whatever the camera or the pigmentation.
    """
    height, width = small.shape[:2]
    if circle is None:
        inside = np.ones((height, width), np.bool_)
    else:
        rows, columns = np.ogrid[:height, :width]
        inside = np.hypot(columns + 0.5 - circle.x_px, rows + 0.5 - circle.y_px) < 0.9 * circle.radius_px
    red, green, blue = small[inside].astype(np.float32).T
    # Dark pixels have no colour to speak of.
    lit = red + green + blue > 30
    if lit.mean() < 0.02:
        return False
    return bool(np.mean(red[lit] > 0.95 * blue[lit]) > 0.7 and np.mean(green[lit] < 1.15 * red[lit]) > 0.6)
