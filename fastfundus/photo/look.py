"""What a photo looks like, in 256 bits: near duplicates differ in few of them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["LOOK_BITS", "look_of", "mirrored_looks", "thumbnail"]

LOOK_BITS = 256
_GRID = 16
_INSIDE = 0.70
"""Share of the crop's side that is looked at: the square within the field."""
_THUMBNAIL_PX = 64


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Local contrast of the middle of a crop: float32 [64, 64], mean 0, standard deviation 1 (or all 0).

    Brightness, colour balance and illumination are taken away; vessels, disc and lesions stay.

    Args:
        image: uint8 [S, S, 3] RGB, a prepared photo.
    """
    side = len(image)
    inset = round(side * (1 - _INSIDE) / 2)
    middle = np.ascontiguousarray(image[inset : side - inset, inset : side - inset, 1])
    method = cv2.INTER_AREA if len(middle) >= _THUMBNAIL_PX else cv2.INTER_LINEAR
    small = cv2.resize(middle, (_THUMBNAIL_PX, _THUMBNAIL_PX), interpolation=method).astype(np.float32)
    small = cv2.GaussianBlur(small, (0, 0), 0.8)
    detail = small - cv2.GaussianBlur(small, (0, 0), 8.0)
    deviation = float(detail.std())
    return (detail - float(detail.mean())) / deviation if deviation > 1e-3 else np.zeros_like(detail)


def look_of(image: NDArray[np.uint8]) -> bytes:
    """The 256 bits of a prepared photo, 32 bytes: whether each of 16 x 16 cells is brighter than its surroundings.

    Cells are read row by row. Two photos of one camera file, re-encoded or resized, differ in a few bits; two
    different retinas in about half of them.
    """
    cells = cv2.resize(thumbnail(image), (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    return np.packbits(cells > 0).tobytes()


def mirrored_looks(looks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What looks become when their photos are mirrored left to right, [N, 32] -> [N, 32]."""
    bits = np.unpackbits(looks, axis=1).reshape(-1, _GRID, _GRID)
    return np.packbits(bits[:, :, ::-1].reshape(-1, LOOK_BITS), axis=1)
