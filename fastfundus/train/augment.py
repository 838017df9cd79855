"""Random changes to training photos as two small matrices each, for `kernels.ops.sample`.

Everything is drawn on the host for a whole epoch from (seed, epoch), one row a photo: what a photo goes through does
not depend on batches, workers, ranks or devices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastfundus.config import AugmentConfig
from fastfundus.spec import PreprocessSpec

__all__ = ["compose_colour", "compose_geometry", "draw_epoch", "fixed_matrices", "normalisation"]

Matrix = NDArray[np.float64]
_LUMA = np.array([0.299, 0.587, 0.114])
"""Rec. ITU-R BT.601."""


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
    # Photo by photo, so that the first rows do not depend on how many follow.
    drawn = np.random.default_rng([seed, epoch, 0xA6]).uniform(-1, 1, (count, 13)).T
    side = 1 - (1 - config.scale) * (drawn[0] + 1) / 2
    ratio = config.aspect ** drawn[1]
    width, height = side * np.minimum(ratio, 1), side * np.minimum(1 / ratio, 1)
    geometry = compose_geometry(
        spec.size,
        left=(1 - width) * (drawn[2] + 1) / 2,
        top=(1 - height) * (drawn[3] + 1) / 2,
        width=width,
        height=height,
        mirror_x=config.flip_horizontal & (drawn[4] < 0),
        mirror_y=config.flip_vertical & (drawn[5] < 0),
        degrees=config.rotate_degrees * drawn[6],
        zoom=1 + config.zoom * drawn[7],
        shear_degrees=config.shear_degrees * drawn[8],
    )
    colour = compose_colour(
        brightness=1 + config.brightness * drawn[9],
        contrast=1 + config.contrast * drawn[10],
        saturation=1 + config.saturation * drawn[11],
        hue_degrees=config.hue_degrees * drawn[12],
    )
    return geometry.astype(np.float32), (normalisation(spec) @ colour)[:, :3].astype(np.float32)


def compose_geometry(
    size: int,
    *,
    left: Matrix,
    top: Matrix,
    width: Matrix,
    height: Matrix,
    mirror_x: NDArray[np.bool_],
    mirror_y: NDArray[np.bool_],
    degrees: Matrix,
    zoom: Matrix,
    shear_degrees: Matrix,
) -> Matrix:
    """Compose crops, mirrors and affine changes, in this order, into one matrix a photo.

    Args:
        size: side of source and output in pixels.
        left: [N] left edge of the crop, as a share of the photo's side.
        top: [N] its top edge.
        width: [N] its width, stretched to the whole output.
        height: [N] its height.
        mirror_x: [N] whether left and right change places.
        mirror_y: [N] whether top and bottom do.
        degrees: [N] turn about the centre, clockwise.
        zoom: [N] growth about the centre, above 0.
        shear_degrees: [N] how far the columns lean, before the turn.

    Returns:
        [N, 2, 3] float64, output positions to source positions.

    Source: `torchvision.transforms.v2.functional`'s resized_crop, hflip, vflip and affine, one after the other.
    """
    zero, one = np.zeros(len(left)), np.ones(len(left))
    angle = np.radians(degrees)
    turn = _stacked([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = _stacked([[one, -np.tan(np.radians(shear_degrees))], [zero, one]])
    # What takes an output position back: first the affine change is undone, then the mirror, then the crop.
    linear = np.linalg.inv(zoom[:, None, None] * turn @ shear)
    linear = np.stack([np.where(mirror_x, -1.0, 1.0), np.where(mirror_y, -1.0, 1.0)], 1)[:, :, None] * linear
    linear = np.stack([width, height], 1)[:, :, None] * linear
    centre = np.stack([left + width / 2, top + height / 2], 1) * size
    shift = centre - linear @ np.full(2, size / 2)
    return np.concatenate([linear, shift[:, :, None]], axis=2)


def compose_colour(
    *, brightness: Matrix, contrast: Matrix, saturation: Matrix, hue_degrees: Matrix, pivot: float = 127.5
) -> Matrix:
    """Compose changes of colour, in the order of the arguments, into one matrix a photo.

    Args:
        brightness: [N] factor.
        contrast: [N] factor, about `pivot`.
        saturation: [N] factor, about each pixel's luma.
        hue_degrees: [N] turn of HSV's colour circle, towards yellow, as it acts from red to yellow: of red >=
            green >= blue, green alone moves, by a share of red - blue. Nearly all of a retina lies there. Other colours
            take the same matrix; grey stays grey.
        pivot: grey level that contrast leaves alone. torchvision takes each photo's mean, which a matrix that is drawn
            before the photo is read cannot know.

    Returns:
        [N, 4, 4] float64 for homogeneous RGB in grey levels.

    Source: `torchvision.transforms.v2.functional`'s adjust_brightness, _contrast, _saturation and _hue.
    """
    count = len(brightness)
    zero, one = np.zeros(count), np.ones(count)
    # A sixth of the circle, 60 degrees, takes green all the way from blue to red.
    turn = hue_degrees / 60
    hue = _stacked([[one, zero, zero], [turn, one, -turn], [zero, zero, one]])
    # Saturation 0 would leave each pixel's luma in all three channels.
    saturate = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * np.tile(_LUMA, (3, 1))
    matrix = np.tile(np.eye(4), (count, 1, 1))
    matrix[:, :3, :3] = hue @ saturate * (brightness * contrast)[:, None, None]
    # Hue and saturation leave grey where it is.
    matrix[:, :3, 3] = (pivot * (1 - contrast))[:, None]
    return matrix


def _stacked(rows: list[list[Matrix]]) -> Matrix:
    """[N, R, C] from R rows of C vectors [N]."""
    return np.stack([np.stack(row, 1) for row in rows], 1)
