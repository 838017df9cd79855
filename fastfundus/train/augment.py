"""Random changes to training photos as two small matrices each, for `kernels.ops.sample`.

Everything is drawn on the host for a whole epoch from (seed, epoch), one row a photo: what a photo goes through does
not depend on batches, workers, ranks or devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastfundus.config import AugmentConfig
from fastfundus.spec import PreprocessSpec

__all__ = ["draw_epoch", "fixed_matrices", "normalisation"]

Matrix = NDArray[np.float64]
# Luma of Rec. ITU-R BT.601 and the YIQ colour space built on it (hue turns I and Q).
_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def normalisation(spec: PreprocessSpec) -> Matrix:
    """Matrix [4, 4] that takes RGB in grey levels to (RGB / 255 - mean) / std."""
    result = np.eye(4)
    std = np.array(spec.std)
    result[:3, :3] = np.diag(1 / (255 * std))
    result[:3, 3] = -np.array(spec.mean) / std
    return result


def fixed_matrices(spec: PreprocessSpec, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Geometry [count, 2, 3] and colour [count, 3, 4] that copy and normalise: those of evaluation."""
    geometry = np.tile(np.eye(3)[:2], (count, 1, 1))
    colour = np.tile(normalisation(spec)[:3], (count, 1, 1))
    return geometry.astype(np.float32), colour.astype(np.float32)


def draw_epoch(
    config: AugmentConfig, spec: PreprocessSpec, count: int, *, seed: int, epoch: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw an epoch's changes.

    Args:
        config: how strong they are.
        spec: of the cache; its size is both source and output size, its mean and std end the colour matrix.
        count: photos.
        seed: of the run.
        epoch: counted from 0; equal seed and epoch give equal matrices.

    Returns:
        Geometry [count, 2, 3] and colour [count, 3, 4], float32, in the order of the photos (not of the batches).
    """
    uniform = np.random.default_rng([seed, epoch, 0xA6]).uniform(-1, 1, (count, 10))
    return (
        _geometry(config, spec.size, uniform[:, :6]).astype(np.float32),
        _colour(config, normalisation(spec), uniform[:, 6:]).astype(np.float32),
    )


def _geometry(config: AugmentConfig, size: int, uniform: Matrix) -> Matrix:
    """Crop, mirror and turn about the crop's centre; output positions to source positions."""
    scale = 1 - (1 - config.scale) * (uniform[:, 0] + 1) / 2
    centre = size / 2 * (1 + (1 - scale)[:, None] * uniform[:, 1:3])
    angle = np.radians(config.rotate_degrees) * uniform[:, 3]
    mirror_x = np.where(config.flip_horizontal & (uniform[:, 4] < 0), -1.0, 1.0)
    mirror_y = np.where(config.flip_vertical & (uniform[:, 5] < 0), -1.0, 1.0)
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.stack([np.stack([cosine, -sine], 1), np.stack([sine, cosine], 1)], 1)
    linear = turn * np.stack([mirror_x, mirror_y], 1)[:, None, :]
    shift = centre - linear @ np.full(2, size / 2)
    return np.concatenate([linear, shift[:, :, None]], axis=2)


def _colour(config: AugmentConfig, normalise: Matrix, uniform: Matrix) -> Matrix:
    """Brightness, contrast, saturation, hue, then normalisation, as one matrix."""
    count = len(uniform)
    brightness = 1 + config.brightness * uniform[:, 0]
    contrast = 1 + config.contrast * uniform[:, 1]
    saturation = 1 + config.saturation * uniform[:, 2]
    angle = np.radians(config.hue_degrees) * uniform[:, 3]
    cosine, sine = np.cos(angle), np.sin(angle)
    zero, one = np.zeros(count), np.ones(count)
    turn = np.stack(
        [np.stack([one, zero, zero], 1), np.stack([zero, cosine, -sine], 1), np.stack([zero, sine, cosine], 1)], 1
    )
    hue = _FROM_YIQ @ turn @ _TO_YIQ
    # Saturation 0 would leave each pixel's luma in all three channels.
    grey = np.tile(_LUMA, (3, 1))
    saturate = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * grey
    matrix = np.tile(np.eye(4), (count, 1, 1))
    matrix[:, :3, :3] = hue @ saturate * (brightness * contrast)[:, None, None]
    # Contrast turns about mid-grey; hue and saturation leave grey where it is.
    matrix[:, :3, 3] = (127.5 * (1 - contrast))[:, None]
    return (normalise @ matrix)[:, :3]
