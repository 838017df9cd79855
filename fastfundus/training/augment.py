"""Random augmentation of training photos, as two small matrices per photo for `kernels.ops.sample`.

The augmentations of a whole epoch are drawn on the host from (seed, epoch), one row per photo. They do not depend on
batches, workers, ranks or devices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.config import AugmentConfig
from fastfundus.kernels.ops import sample
from fastfundus.spec import PreprocessSpec

if TYPE_CHECKING:
    # Benches on bare GPU machines lack what the rest of `data` imports.
    from fastfundus.data.store import PhotoArray

__all__ = [
    "Transforms",
    "augmentation_sheet",
    "compose_colour",
    "compose_geometry",
    "draw_epoch",
    "fixed_transforms",
    "normalisation",
]

Matrix = NDArray[np.float64]
_LUMA = np.array([0.299, 0.587, 0.114])
"""Luma weights of R, G and B. Source: Rec. ITU-R BT.601."""


def normalisation(spec: PreprocessSpec) -> Matrix:
    """Return the matrix [4, 4] that maps RGB in grey levels (0 to 255) to (RGB / 255 - mean) / std."""
    result = np.eye(4)
    std = np.array(spec.std)
    result[:3, :3] = np.diag(1 / (255 * std))
    result[:3, 3] = -np.array(spec.mean) / std
    return result


@dataclass(frozen=True, slots=True)
class Transforms:
    """What `kernels.ops.sample` does to each of N photos."""

    geometry: NDArray[np.float32]
    """[N, 2, 3], maps output positions to source positions, in pixels."""
    colour: NDArray[np.float32]
    """[N, 3, 4], maps RGB in grey levels to the output."""

    # Without this, unpacking would yield the transforms of single photos.
    __iter__ = None

    def __len__(self) -> int:
        return len(self.geometry)

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Transforms:
        """Return the transforms of some photos."""
        return Transforms(self.geometry[rows], self.colour[rows])

    def scaled(self, factor: float) -> Transforms:
        """Return the transforms for outputs whose pixels are `factor` times as large, from the same source region."""
        return Transforms(self.geometry * np.array([factor, factor, 1], np.float32), self.colour)

    def shifted(self, corner: NDArray[np.float32]) -> Transforms:
        """Return the transforms for outputs whose origin is at `corner`, [N, 2] x and y in output pixels."""
        geometry = self.geometry.copy()
        geometry[:, :, 2] += np.einsum("nij,nj->ni", geometry[:, :, :2], corner)
        return Transforms(geometry, self.colour)


def fixed_transforms(spec: PreprocessSpec, count: int) -> Transforms:
    """Return geometry [count, 2, 3] and colour [count, 3, 4] that only copy and normalise, as for evaluation."""
    geometry = np.tile(np.eye(3)[:2], (count, 1, 1))
    colour = np.tile(normalisation(spec)[:3], (count, 1, 1))
    return Transforms(geometry.astype(np.float32), colour.astype(np.float32))


def draw_epoch(config: AugmentConfig, spec: PreprocessSpec, count: int, *, seed: int, epoch: int) -> Transforms:
    """Draw the augmentations of one epoch.

    Args:
        config: strengths of the augmentations.
        spec: preprocessing of the cache. Its size is both source and output size; its mean and std are applied last,
            in the colour matrix.
        count: number of photos.
        seed: seed of the run.
        epoch: epoch, counted from 0; equal seed and epoch give equal matrices.

    Returns:
        Geometry [count, 2, 3] and colour [count, 3, 4], float32, in the order of the photos (not of the batches).
    """
    # Drawn photo by photo, so that the first rows do not depend on the number of photos.
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
    return Transforms(geometry.astype(np.float32), (normalisation(spec) @ colour)[:, :3].astype(np.float32))


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
    """Compose crops, flips and affine transforms, in this order, into one matrix per photo.

    Args:
        size: side of source and output in pixels.
        left: [N] left edge of the crop, as a share of the photo's side.
        top: [N] top edge of the crop, likewise.
        width: [N] width of the crop, likewise; it is stretched to the whole output.
        height: [N] height of the crop, likewise.
        mirror_x: [N] True to flip left and right.
        mirror_y: [N] True to flip top and bottom.
        degrees: [N] clockwise rotation about the centre.
        zoom: [N] scale factor about the centre, above 0.
        shear_degrees: [N] shear of the columns, applied before the rotation.

    Returns:
        [N, 2, 3] float64 matrices that map output positions to source positions.

    Source: resized_crop, hflip, vflip and affine of `torchvision.transforms.v2.functional`, one after the other.
    """
    zero, one = np.zeros(len(left)), np.ones(len(left))
    angle = np.radians(degrees)
    turn = _stacked([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = _stacked([[one, -np.tan(np.radians(shear_degrees))], [zero, one]])
    # Map an output position back to the source: undo the affine transform, then the flip, then the crop.
    linear = np.linalg.inv(zoom[:, None, None] * turn @ shear)
    linear = np.stack([np.where(mirror_x, -1.0, 1.0), np.where(mirror_y, -1.0, 1.0)], 1)[:, :, None] * linear
    linear = np.stack([width, height], 1)[:, :, None] * linear
    centre = np.stack([left + width / 2, top + height / 2], 1) * size
    shift = centre - linear @ np.full(2, size / 2)
    return np.concatenate([linear, shift[:, :, None]], axis=2)


def compose_colour(
    *, brightness: Matrix, contrast: Matrix, saturation: Matrix, hue_degrees: Matrix, pivot: float = 127.5
) -> Matrix:
    """Compose colour changes, in the order of the arguments, into one matrix per photo.

    Args:
        brightness: [N] factor.
        contrast: [N] factor, about `pivot`.
        saturation: [N] factor, about each pixel's luma.
        hue_degrees: [N] rotation of the HSV hue circle towards yellow, modelled as it acts between red and yellow:
            where red >= green >= blue, only green changes, by a share of red - blue. Nearly all retinal colours are in
            this range. The same matrix is applied to all other colours; grey stays grey.
        pivot: grey level that contrast leaves unchanged. torchvision uses each photo's mean, which is not known here:
            the matrix is drawn before the photo is read.

    Returns:
        [N, 4, 4] float64 matrices for homogeneous RGB in grey levels.

    Source: adjust_brightness, _contrast, _saturation and _hue of `torchvision.transforms.v2.functional`.
    """
    count = len(brightness)
    zero, one = np.zeros(count), np.ones(count)
    # 60 degrees, a sixth of the circle, move green all the way from blue to red.
    turn = hue_degrees / 60
    hue = _stacked([[one, zero, zero], [turn, one, -turn], [zero, zero, one]])
    # Saturation 0 would set all three channels to the pixel's luma.
    saturate = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * np.tile(_LUMA, (3, 1))
    matrix = np.tile(np.eye(4), (count, 1, 1))
    matrix[:, :3, :3] = hue @ saturate * (brightness * contrast)[:, None, None]
    # The offset of contrast is grey, so hue and saturation do not change it.
    matrix[:, :3, 3] = (pivot * (1 - contrast))[:, None]
    return matrix


def _stacked(rows: list[list[Matrix]]) -> Matrix:
    """Stack R rows of C vectors [N] into [N, R, C]."""
    return np.stack([np.stack(row, 1) for row in rows], 1)


_CELL_PX = 192
_GAP_PX = 4


def augmentation_sheet(
    photos: PhotoArray, rows: NDArray[np.int64], spec: PreprocessSpec, config: AugmentConfig, *, draws: int, seed: int
) -> NDArray[np.uint8]:
    """Draw a sheet with one row per photo: the original, then its augmentations in epochs 0, 1, ... of a run.

    Args:
        photos: uint8 [*, S, S, 3], the cache.
        rows: [N] rows of the photos to show.
        spec: preprocessing of the cache.
        config: strengths of the augmentations.
        draws: number of epochs.
        seed: seed of the run.

    Returns:
        uint8 [H, W, 3] RGB on a white background.
    """
    # Normalised to grey levels: except for mean and standard deviation, the sheet shows the input of the model.
    shown = replace(spec, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    images = torch.from_numpy(np.ascontiguousarray(photos[rows]))
    columns = [np.asarray(images)]
    for epoch in range(draws):
        drawn = draw_epoch(config, shown, len(rows), seed=seed, epoch=epoch)
        matrices = torch.from_numpy(drawn.geometry), torch.from_numpy(drawn.colour)
        changed = sample(images, *matrices, spec.size).permute(0, 2, 3, 1)
        columns.append(changed.round().clamp(0, 255).to(torch.uint8).numpy())
    step = _CELL_PX + _GAP_PX
    sheet = np.full((len(rows) * step + _GAP_PX, len(columns) * step + _GAP_PX, 3), 255, np.uint8)
    for across, column in enumerate(columns):
        for down, image in enumerate(column):
            cell = cv2.resize(image, (_CELL_PX, _CELL_PX), interpolation=cv2.INTER_AREA)
            top, left = down * step + _GAP_PX, across * step + _GAP_PX
            sheet[top : top + _CELL_PX, left : left + _CELL_PX] = cell
    return sheet
