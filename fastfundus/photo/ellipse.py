"""Fitting of circles and ellipses to outline points for `find_field`. Coordinates refer to pixel corners."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["Oval", "agreement", "explained", "fit_circle", "fit_oval", "outline"]

_Circle = tuple[float, ...]
"""x, y, radius."""
_MAX_POINTS = 200
_TRIALS = 120
_VOTERS = 240
_MIN_SEEN = 0.65
_ANGLES = np.linspace(0, 2 * np.pi, 240, endpoint=False)
_SIDES = np.array([0.96, 1.04]).reshape(2, 1, 1)
_DIRECTIONS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


@dataclass(frozen=True, slots=True)
class Oval:
    """An axis-aligned ellipse; a circle if both semi-axes are equal."""

    x: float
    y: float
    half_width: float
    half_height: float


def outline(contour: NDArray[np.int32], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return points on the outline of a lit region, float64 [P, 2] as x, y.

    Points on the edge of the image show where the photo was cut, not where the field ends, and are excluded.

    Args:
        contour: int32 [N, 1, 2], the outermost lit pixels in order, from `cv2.findContours`.
        shape: Height and width of the image.
    """
    height, width = shape
    # Every second or third point is enough, because neighbours are nearly identical.
    chosen = contour[:: max(1, len(contour) // _MAX_POINTS), 0]
    x, y = chosen.T
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    chosen = chosen[inside] + 0.5
    if not len(chosen):
        return chosen
    # Move half a pixel outwards, from the centre of the outermost lit pixels to their outer edge.
    away = chosen - chosen.mean(axis=0)
    return chosen + away * (0.5 / np.maximum(np.hypot(away[:, 0], away[:, 1]), 1e-9))[:, None]


def fit_circle(points: NDArray[np.float64], shape: tuple[int, ...]) -> Oval | None:
    """Return the circle with which most outline points agree, or None.

    First, fit a least-squares circle, discarding points far from it. Unless nearly all points agree with it, generate
    circles through three points each, choose the one with the most agreeing points, and refine it on these by least
    squares.
    """
    tolerance = 0.01 * max(shape)
    circle = _refine(_least_squares(points), points, 0.03 * max(shape))
    if circle is None or np.mean(_close(circle, points, tolerance)) < 0.9 or not _plausible([circle], shape)[0]:
        # Use a fixed seed: the same photo must always give the same crop.
        rng = np.random.default_rng(0)
        voters = points if len(points) <= _VOTERS else points[rng.choice(len(points), _VOTERS, replace=False)]
        circles = _through_three(voters[rng.integers(0, len(voters), (_TRIALS, 3))])
        circles = circles[_plausible(circles.tolist(), shape)]
        if not len(circles):
            return None
        votes = _agree(circles, voters, tolerance).sum(axis=1)
        circle = _refine(tuple(circles[np.argmax(votes)].tolist()), points, tolerance, tolerance)
        if circle is None or not _plausible([circle], shape)[0]:
            return None
    x, y, radius = circle
    return Oval(x, y, radius, radius)


def _refine(circle: _Circle | None, points: NDArray[np.float64], *tolerances: float) -> _Circle | None:
    """Refit a circle to the points that agree with it, once for each tolerance in pixels."""
    for tolerance in tolerances:
        if circle is None:
            return None
        inliers = points[_close(circle, points, tolerance)]
        if len(inliers) < 12:
            return None
        circle = _least_squares(inliers)
    return circle


def _close(circle: _Circle, points: NDArray[np.float64], tolerance: float) -> NDArray[np.bool_]:
    """Return a mask of the points within `tolerance` pixels of a circle.

    Like `_agree` for a single circle, with a third of the calls.
    """
    x, y, radius = circle
    return np.abs(np.hypot(points[:, 0] - x, points[:, 1] - y) - radius) < tolerance


def fit_oval(points: NDArray[np.float64], shape: tuple[int, ...]) -> Oval | None:
    """Return the axis-aligned ellipse fitted to the outline points, or None.

    The fit uses least squares and is refined twice without outliers.
    """
    chosen = points
    for _ in range(3):
        if len(chosen) < 12:
            return None
        centre, spread = chosen.mean(axis=0), max(float(chosen.std()), 1e-9)
        x, y = ((chosen - centre) / spread).T
        system = np.column_stack([x * x, x, y, np.ones(len(x))])
        a, b, c, d = np.linalg.lstsq(system, -y * y, rcond=None)[0]
        if a <= 0.05:
            return None
        middle = np.array([-b / (2 * a), -c / 2])
        level = a * middle[0] ** 2 + middle[1] ** 2 - d
        if level <= 0:
            return None
        half = np.sqrt([level / a, level])
        relative = np.hypot(*(((points - centre) / spread - middle) / half).T)
        chosen = points[np.abs(relative - 1) < 0.04]
    (x0, y0), (half_width, half_height) = middle * spread + centre, half * spread
    if min(half_width, half_height) < 0.2 * min(shape) or max(half_width, half_height) > 1.5 * max(shape):
        return None
    return Oval(float(x0), float(y0), float(half_width), float(half_height))


def agreement(mask: NDArray[np.uint8], oval: Oval) -> float:
    """Return the share of the visible edge that agrees with an ellipse: lit on its inner side, dark on its outer side.

    The share is multiplied by the share of the lit region inside the ellipse, because an arc of an ellipse also agrees
    with a circle that omits half of the retina. Returns 0 if too little of the edge is in the image, or if the ellipse
    is mostly dark.
    """
    height, width = mask.shape
    half = np.array([oval.half_width, oval.half_height])
    # [2, A, 2]: inner and outer side of the edge at each angle, as x, y.
    edge = np.floor([oval.x, oval.y] + _SIDES * (half * _DIRECTIONS)).astype(np.intp)
    # Both sides must be visible: the inner one may not be if the centre is outside the image.
    visible = ((edge >= 0) & (edge < (width, height))).all(axis=(0, 2))
    if visible.sum() < 24:
        return 0.0
    lit_inside, lit_outside = mask[edge[:, visible, 1], edge[:, visible, 0]] > 0
    agree = float(np.mean(lit_inside & ~lit_outside))
    disc = np.zeros_like(mask)
    axes = tuple(round(1.04 * value * 16) for value in half)
    cv2.ellipse(disc, (round((oval.x - 0.5) * 16), round((oval.y - 0.5) * 16)), axes, 0, 0, 360, 255, -1, cv2.LINE_8, 4)
    lit, held = cv2.countNonZero(mask), cv2.countNonZero(cv2.bitwise_and(mask, disc))
    if held < 0.4 * np.pi * half.prod():
        return 0.0
    return agree * held / lit


def explained(points: NDArray[np.float64], oval: Oval) -> float:
    """Return the share of the outline points, [P, 2], within 3 % of the semi-axes of the edge of an ellipse."""
    half = np.array([oval.half_width, oval.half_height])
    relative = np.hypot(*((points - [oval.x, oval.y]) / half).T)
    return float(np.mean(np.abs(relative - 1) < 0.03))


def _agree(circles: NDArray[np.float64], points: NDArray[np.float64], tolerance: float) -> NDArray[np.bool_]:
    """Return which points are within `tolerance` pixels of each circle, [C, 3] and [P, 2] -> [C, P]."""
    squared = (points[:, 0] - circles[:, :1]) ** 2 + (points[:, 1] - circles[:, 1:2]) ** 2
    radius = circles[:, 2:]
    return (squared > (radius - tolerance) ** 2) & (squared < (radius + tolerance) ** 2)


def _plausible(circles: Sequence[Sequence[float]], shape: tuple[int, ...]) -> list[bool]:
    """Return whether each circle is large enough and most of its diameter is in the image along both axes.

    One side of a squeezed field also fits a far larger circle that extends beyond the frame.
    """
    height, width = shape
    found = []
    for x, y, radius in circles:
        sound = math.isfinite(x + y + radius) and radius > 0.2 * min(height, width)
        if sound:
            seen_x = min(x + radius, width) - max(x - radius, 0)
            seen_y = min(y + radius, height) - max(y - radius, 0)
            sound = min(seen_x, seen_y) > _MIN_SEEN * 2 * radius
        found.append(sound)
    return found


def _through_three(triples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return circles through three points each, [T, 3, 2] -> [T, 3] as x, y, radius.

    Collinear points give non-finite values.
    """
    a, b, c = triples[:, 0], triples[:, 1], triples[:, 2]
    ab, ac = b - a, c - a
    twice_area = 2 * (ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0])
    ab2, ac2 = (ab**2).sum(axis=1), (ac**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = (ac[:, 1] * ab2 - ab[:, 1] * ac2) / twice_area
        y = (ab[:, 0] * ac2 - ac[:, 0] * ab2) / twice_area
    return np.stack([a[:, 0] + x, a[:, 1] + y, np.hypot(x, y)], axis=1)


def _least_squares(points: NDArray[np.float64]) -> _Circle | None:
    """Fit a circle algebraically: return x, y, radius, or None for collinear points.

    Source: Kåsa, IEEE Trans. Instrum. Meas. 25 (1976).
    """
    # Relative to the centroid of the points, the normal equations reduce to two unknowns. Solving them directly takes a
    # tenth of the time of a general solver.
    x, y = points.mean(axis=0).tolist()
    near = points - (x, y)
    squares = np.einsum("ij,ij->i", near, near)
    (xx, xy), (_, yy) = (near.T @ near).tolist()
    right_x, right_y = (squares @ near).tolist()
    determinant = xx * yy - xy * xy
    if determinant <= 1e-9 * (xx + yy) ** 2:
        return None
    x0 = (right_x * yy - right_y * xy) / (2 * determinant)
    y0 = (right_y * xx - right_x * xy) / (2 * determinant)
    return x + x0, y + y0, math.sqrt((xx + yy) / len(points) + x0 * x0 + y0 * y0)
