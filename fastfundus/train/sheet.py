"""A contact sheet of augmented photos, to check the augmentation settings before a long run."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.config import AugmentConfig
from fastfundus.data.store import PhotoArray
from fastfundus.kernels.ops import sample
from fastfundus.spec import PreprocessSpec
from fastfundus.train.augment import draw_epoch

__all__ = ["augmentation_sheet"]

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
        geometry, colour = draw_epoch(config, shown, len(rows), seed=seed, epoch=epoch)
        changed = sample(images, torch.from_numpy(geometry), torch.from_numpy(colour), spec.size).permute(0, 2, 3, 1)
        columns.append(changed.round().clamp(0, 255).to(torch.uint8).numpy())
    step = _CELL_PX + _GAP_PX
    sheet = np.full((len(rows) * step + _GAP_PX, len(columns) * step + _GAP_PX, 3), 255, np.uint8)
    for across, column in enumerate(columns):
        for down, image in enumerate(column):
            cell = cv2.resize(image, (_CELL_PX, _CELL_PX), interpolation=cv2.INTER_AREA)
            top, left = down * step + _GAP_PX, across * step + _GAP_PX
            sheet[top : top + _CELL_PX, left : left + _CELL_PX] = cell
    return sheet
