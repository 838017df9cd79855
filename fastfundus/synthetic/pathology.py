"""Lesions, each drawn as a coverage map that is blended over the retina."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.synthetic.anatomy import Eye

__all__ = ["DISEASED_CUP_RATIO", "LESIONS", "Canvas", "draw_lesions"]

LESIONS = ("exudates", "haemorrhages", "drusen", "cupping")
"""Lesions that make an eye abnormal. Cupping enlarges the cup of the disc; the others are spots on the retina."""

DISEASED_CUP_RATIO = (0.72, 0.88)
"""Range of the vertical cup-to-disc ratio of an eye with cupping; healthy eyes stay below 0.53."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """A mapping from field units to the pixels of a [height, width] frame."""

    height: int
    width: int
    x_px: float
    y_px: float
    radius_px: float

    def points(self, positions: NDArray[np.float64]) -> NDArray[np.int32]:
        """Return pixel coordinates in sixteenths, as OpenCV's drawing functions expect with ``shift=4``.

        OpenCV counts from pixel centres and field circles from pixel corners, hence the half-pixel offset.
        """
        pixels = positions * self.radius_px + np.array([self.x_px - 0.5, self.y_px - 0.5])
        return np.round(pixels * 16).astype(np.int32)

    def blank(self) -> NDArray[np.uint8]:
        """Return an empty coverage map."""
        return np.zeros((self.height, self.width), np.uint8)


def _blob(centre: NDArray[np.float64], size: float, rng: np.random.Generator, roughness: float) -> NDArray[np.float64]:
    """Return the outline of an irregular spot, [14, 2] in field units."""
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    stretch = rng.uniform(0.6, 1.0)
    turn = rng.uniform(0, np.pi)
    radii = size * (1 + roughness * rng.uniform(-1, 1, 14))
    local = np.stack([radii * np.cos(angles), stretch * radii * np.sin(angles)], axis=1)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return centre + local @ rotation.T


def _fill(
    canvas: Canvas,
    centres: NDArray[np.float64],
    sizes: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    roughness: float,
    softness: float,
) -> NDArray[np.uint8]:
    """Draw filled spots; `softness` is the blur of their edges, in field units."""
    coverage = canvas.blank()
    for centre, size in zip(centres, sizes, strict=True):
        # At least one and a half pixels across: an invisible lesion would falsify the label.
        size = max(size, 0.75 / canvas.radius_px)
        outline = canvas.points(_blob(centre, size, rng, roughness))
        cv2.fillPoly(coverage, [outline], 255, cv2.LINE_AA, shift=4)
    sigma = softness * canvas.radius_px
    return cv2.GaussianBlur(coverage, (0, 0), sigma) if sigma > 0.4 else coverage


def _around(centre: NDArray[np.float64], spread: float, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    return centre + rng.normal(0, spread, (count, 2))


def _exudates(canvas: Canvas, eye: Eye, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw sharp yellow deposits: clusters and broken rings in the posterior pole."""
    centres = []
    for _ in range(rng.integers(2, 5)):
        middle = eye.fovea + rng.normal(0, 0.22, 2)
        if rng.uniform() < 0.5:
            angle = rng.uniform(0, 2 * np.pi) + rng.uniform(0, 4.0, rng.integers(14, 34))
            ring = rng.uniform(0.08, 0.16) * (1 + rng.normal(0, 0.12, len(angle)))
            centres.append(middle + ring[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))
        else:
            centres.append(_around(middle, 0.06, int(rng.integers(12, 34)), rng))
    spots = np.concatenate(centres)
    sizes = 0.007 + rng.gamma(2.0, 0.0045, len(spots))
    return _fill(canvas, spots, sizes, rng, roughness=0.35, softness=0.0012)


def _haemorrhages(canvas: Canvas, eye: Eye, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw dark red dots and blots across the retina, and a few large ones."""
    dots = eye.fovea + rng.normal(0, 0.38, (int(rng.integers(18, 46)), 2))
    blots = eye.fovea + rng.normal(0, 0.34, (int(rng.integers(4, 11)), 2))
    spots = np.concatenate([dots, blots])
    sizes = np.concatenate([rng.uniform(0.006, 0.015, len(dots)), rng.uniform(0.025, 0.062, len(blots))])
    return _fill(canvas, spots, sizes, rng, roughness=0.3, softness=0.0022)


def _drusen(canvas: Canvas, eye: Eye, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw soft pale spots crowding the macula."""
    spots = _around(eye.fovea, 0.13, int(rng.integers(45, 110)), rng)
    sizes = 0.008 + rng.gamma(2.2, 0.0052, len(spots))
    return _fill(canvas, spots, sizes, rng, roughness=0.15, softness=0.005)


_DRAWERS: dict[str, Callable[[Canvas, Eye, np.random.Generator], NDArray[np.uint8]]] = {
    "exudates": _exudates,
    "haemorrhages": _haemorrhages,
    "drusen": _drusen,
}


def draw_lesions(
    canvas: Canvas, eye: Eye, kinds: tuple[str, ...], rng: np.random.Generator
) -> dict[str, NDArray[np.uint8]]:
    """Draw the spots of an eye; cupping belongs to the disc and is drawn with it.

    Returns:
        Coverage by lesion, uint8 [height, width], 255 = fully covered.
    """
    return {kind: _DRAWERS[kind](canvas, eye, rng) for kind in kinds if kind in _DRAWERS}
