"""Camera models: frame, field, illumination, colour, blur, noise, and poor photo quality."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.records import FieldCircle

__all__ = ["CAMERAS", "QUALITIES", "Camera", "illumination", "place_field", "sensor_noise"]

Plane = NDArray[np.float32]

QUALITIES = ("good", "blur", "dark", "cut")
"""Good, or poor in one way: out of focus, under-exposed, or with part of the field missing."""


@dataclass(frozen=True, slots=True)
class Camera:
    """The frame and image properties of a camera."""

    name: str
    aspect: float
    """Frame width / frame height."""
    field: float
    """Field diameter / frame height; above 1, the top and bottom of the field are cut off."""
    gain: tuple[float, float, float]
    """RGB gains."""
    blur: float
    """Standard deviation of the Gaussian blur, in field radii."""
    noise: float
    """Standard deviation of the sensor noise, in grey levels."""
    vignette: float
    """Loss of light at the edge of the field, 0 to 1."""
    notch: bool
    """True if a notch marks the upper right edge of the field, as with some makers."""


CAMERAS = (
    Camera("square", 1.0, 0.98, (1.0, 1.0, 1.0), 0.0012, 1.6, 0.28, False),
    Camera("wide", 1.5, 0.94, (1.04, 0.96, 0.90), 0.0010, 2.2, 0.36, True),
    Camera("cropped", 1.5, 1.16, (1.08, 0.92, 0.86), 0.0016, 1.8, 0.30, False),
    Camera("handheld", 4 / 3, 1.02, (0.96, 1.02, 1.06), 0.0024, 3.6, 0.50, False),
)


def place_field(camera: Camera, long_side: int, rng: np.random.Generator) -> tuple[int, int, FieldCircle]:
    """Choose the size of the frame and the position of the field in it.

    Returns:
        Height and width in pixels, and the true field circle.
    """
    width = long_side
    height = round(long_side / camera.aspect)
    radius = camera.field * height / 2 * rng.uniform(0.97, 1.0)
    slack = np.maximum(np.array([width, height]) / 2 - radius, 0)
    centre = np.array([width, height]) / 2 + rng.uniform(-0.6, 0.6, 2) * np.minimum(slack, 0.08 * height)
    return height, width, FieldCircle(float(centre[0]), float(centre[1]), float(radius), 1.0)


def illumination(x: Plane, y: Plane, camera: Camera, rng: np.random.Generator) -> Plane:
    """Return the light that reaches the sensor at field positions `x`, `y` (same shape).

    It falls off radially, with a slight tilt.
    """
    tilt = rng.normal(0, 0.10, 2).astype(np.float32)
    exposure = np.float32(rng.uniform(0.86, 1.08))
    r2 = x * x + y * y
    light = exposure * (1 - np.float32(camera.vignette) * r2 * (0.55 + 0.45 * r2)) + tilt[0] * x + tilt[1] * y
    return np.maximum(light, np.float32(0.05))


def sensor_noise(height: int, width: int, sigma: float, rng: np.random.Generator) -> list[Plane]:
    """Return three [height, width] planes of grain, in grey levels.

    One strip of random numbers is tiled with a different shift for each plane. The repetition is invisible, and drawing
    three million normal deviates would take longer than the rest of the photo.
    """
    rows = min(height, 192)
    strip = rng.standard_normal((rows, width + 96), dtype=np.float32) * np.float32(sigma)
    strip = cv2.GaussianBlur(strip, (3, 3), 0.55) * np.float32(1.45)
    repeats = -(-height // rows)
    planes = []
    for _ in range(3):
        shift = int(rng.integers(0, 96))
        roll = int(rng.integers(0, rows))
        tile = np.roll(strip[:, shift : shift + width], roll, axis=0)
        planes.append(np.ascontiguousarray(np.tile(tile, (repeats, 1))[:height]))
    return planes
