"""Validation and packing of a batch's per-photo arguments into the layout that the kernels read; NumPy only, no torch.

The 88 bytes of a job are the struct `Job` of csrc/sample.cuh. The matrices are small and are created on the host, where
their values can be checked without waiting for a device; a single copy then transfers all jobs of a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "INTEGRATE",
    "INTERPOLATE",
    "JOB",
    "LARGEST_SIDE_PX",
    "MIN_MINIFICATION",
    "MODES",
    "NEAREST",
    "check_photos",
    "pack_jobs",
]

JOB = np.dtype(
    [("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("geometry", "<f4", (2, 3)), ("colour", "<f4", (3, 4))]
)
INTERPOLATE, INTEGRATE, NEAREST = MODES = (0, 1, 2)
"""Sampling modes, `Mode` in csrc/sample.cuh. INTEGRATE is correct for every geometry. INTERPOLATE is faster but correct
only if no output step spans more than one source pixel."""
LARGEST_SIDE_PX = 1 << 20
_LARGEST_BYTES = 2**31 - 1
_LARGEST_OUTPUT_PX = 16384
"""Keeps the number of output values, 3 * 16384^2, below 2^31."""
_FARTHEST_PX = 2.0**22
"""Positions are float32: beyond this limit they no longer resolve half pixels, and further out integers overflow."""
_MIN_DETERMINANT = 1e-6
"""Limit on the determinant of the rows scaled to unit length; below it, the photo is squeezed into a line."""
MIN_MINIFICATION = 1 + 2**-12
"""A box narrower than this many pixels counts as one pixel wide; otherwise rounding in a rotation would turn four taps
into nine."""


def check_photos(offsets: NDArray[np.int64], sizes: NDArray[np.int32], available: int) -> None:
    """Check that all photos are contained in a buffer.

    Args:
        offsets: [N], first byte of each photo.
        sizes: [N, 2], height and width in pixels.
        available: size of the buffer in bytes.

    Raises:
        ValueError: a size or an offset is out of range; the message gives the photo, the value and the allowed range.
    """
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    bad = (np.minimum(height, width) < 1) | (np.maximum(height, width) > LARGEST_SIDE_PX)
    if bad.any():
        n = int(np.argmax(bad))
        raise ValueError(f"sizes[{n}] must be 1 to {LARGEST_SIDE_PX} pixels per side, got {height[n]} x {width[n]}")
    length = 3 * height * width
    if (length > _LARGEST_BYTES).any():
        n = int(np.argmax(length > _LARGEST_BYTES))
        raise ValueError(
            f"sizes[{n}] is {height[n]} x {width[n]}, {length[n]} bytes; a photo may have at most {_LARGEST_BYTES}"
        )
    # Computing offsets + length could overflow; available - length cannot.
    bad = (offsets < 0) | (offsets > available - length)
    if bad.any():
        n = int(np.argmax(bad))
        raise ValueError(
            f"offsets[{n}] is {offsets[n]}, but its {length[n]} bytes must lie within the {available} bytes of pixels"
        )


def pack_jobs(
    offsets: NDArray[np.int64],
    sizes: NDArray[np.int32],
    geometry: NDArray[np.float32],
    colour: NDArray[np.float32],
    *,
    out_size: int,
    available: int,
    nearest: bool = False,
) -> tuple[NDArray[Any], int]:
    """Check the arguments of a batch and pack them into jobs.

    Args:
        offsets: [N], first byte of each photo.
        sizes: [N, 2], height and width in pixels.
        geometry: [N, 2, 3], maps output pixels to source pixels.
        colour: [N, 3, 4], maps RGB in grey levels to output channels.
        out_size: side of the output in pixels, 1 to 16384.
        available: size of the pixel buffer in bytes.
        nearest: sample the nearest pixel.

    Returns:
        The jobs, [N] of type `JOB`, and the mode that is correct for all of them.

    Raises:
        ValueError: a value is out of range; the message gives the argument, the photo and the value.
    """
    if not 1 <= out_size <= _LARGEST_OUTPUT_PX:
        raise ValueError(f"out_size must be 1 to {_LARGEST_OUTPUT_PX} pixels, got {out_size}")
    check_photos(offsets, sizes, available)
    for name, matrix in (("geometry", geometry), ("colour", colour)):
        finite = np.isfinite(matrix).all(axis=(1, 2))
        if not finite.all():
            n = int(np.argmin(finite))
            raise ValueError(f"{name}[{n}] must be finite, got {matrix[n].tolist()}")
    linear = geometry[:, :, :2].astype(np.float64)
    extents = np.hypot(linear[:, :, 0], linear[:, :, 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.abs(np.linalg.det(linear)) / extents.prod(axis=1)
    # The negated comparison also catches NaN, the 0 / 0 of an all-zero row.
    bad = ~(relative >= _MIN_DETERMINANT)
    if bad.any():
        n = int(np.argmax(bad))
        raise ValueError(
            f"geometry[{n}] cannot be inverted: it squeezes the photo into a line or a point: {geometry[n].tolist()}"
        )
    corners = np.array([[0, 0, 1], [out_size, 0, 1], [0, out_size, 1], [out_size, out_size, 1]], np.float64)
    farthest = np.abs(geometry.astype(np.float64) @ corners.T).max(axis=(1, 2), initial=0)
    if (farthest > _FARTHEST_PX).any():
        n = int(np.argmax(farthest))
        raise ValueError(
            f"geometry[{n}] reaches {farthest[n]:.4g} pixels from the photo's corner; at most {_FARTHEST_PX:.0f} are "
            "allowed"
        )
    jobs = np.empty(len(sizes), JOB)
    jobs["offset"], jobs["height"], jobs["width"] = offsets, sizes[:, 0], sizes[:, 1]
    jobs["geometry"], jobs["colour"] = geometry, colour
    # Compared in float32, as in the kernels.
    minifies = bool((extents.astype(np.float32) >= np.float32(MIN_MINIFICATION)).any())
    return jobs, NEAREST if nearest else INTEGRATE if minifies else INTERPOLATE
