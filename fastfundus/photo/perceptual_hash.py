"""A 256-bit perceptual hash of a photo: near duplicates differ in few bits."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["HASH_BITS", "flipped_hashes", "local_contrast", "perceptual_hash"]

HASH_BITS = 256
_GRID = 16
_INSIDE = 0.70
"""Side of the hashed square as a share of the crop's side, so that it lies within the field."""
_THUMBNAIL_PX = 64


def local_contrast(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the local contrast of the middle of a crop.

    Brightness, colour balance and illumination are removed; vessels, disc and lesions remain.

    Args:
        image: uint8 [S, S, 3] RGB, a prepared photo.

    Returns:
        float32 [64, 64] with mean 0 and standard deviation 1, or all 0 for a flat image.
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


def perceptual_hash(image: NDArray[np.uint8]) -> bytes:
    """Return the perceptual hash of a prepared photo: 256 bits in 32 bytes.

    Each bit states whether one of 16 x 16 cells is brighter than its surroundings, row by row. Copies of one photo,
    re-encoded or resized, differ in a few bits; different retinas differ in about half of them.

    Args:
        image: uint8 [S, S, 3] RGB, a prepared photo.
    """
    cells = cv2.resize(local_contrast(image), (_GRID, _GRID), interpolation=cv2.INTER_AREA)
    return np.packbits(cells > 0).tobytes()


def flipped_hashes(hashes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the perceptual hashes of horizontally flipped photos, uint8 [N, 32] -> [N, 32]."""
    bits = np.unpackbits(hashes, axis=1).reshape(-1, _GRID, _GRID)
    return np.packbits(bits[:, :, ::-1].reshape(-1, HASH_BITS), axis=1)
