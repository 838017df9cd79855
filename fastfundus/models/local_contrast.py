"""Local contrast as the first step of a network: what differs from its surroundings, whatever lighting and pigment."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastfundus.errors import ConfigError

__all__ = ["LocalContrast", "add_local_contrast"]

_CELLS = 30
"""The mean is taken on a grid of about this many cells along each side, for a standard deviation of a twentieth."""
_GAIN = 2.0
_FRAME = 0.05
"""Pixels whose brightest channel is below this are the frame, which has no contrast."""


class LocalContrast(nn.Module):
    """Replaces normalised photos [N, 3, S, S] by their local contrast, normalised alike.

    In RGB from 0 to 1, the result is gain * (photo - local mean) + 0.5, clipped, and 0.5 in the black frame. It
    computes in float32 and returns the dtype of its input.

    Args:
        mean: what was subtracted from RGB in 0 to 1 to normalise it, one value per channel.
        std: what it was divided by.

    Source: B. Graham, Kaggle Diabetic Retinopathy Detection competition report, 2015; the Gaussian is replaced by two
    box filters and bilinear interpolation, which engines compute without a convolution.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self._values = (tuple(mean), tuple(std))
        # Not persistent: the weights of a run stay those of its backbone.
        for name, values in zip(("mean", "std"), self._values, strict=True):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers without rounding them to the 16-bit type of the network."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in zip(("mean", "std"), self._values, strict=True):
            device = self.get_buffer(name).device
            setattr(self, name, torch.tensor(values, device=device).reshape(1, 3, 1, 1))
        return self

    def forward(self, photos: Tensor) -> Tensor:
        """Return the local contrast of photos [N, 3, S, S]."""
        with torch.autocast(photos.device.type, enabled=False):
            rgb = photos.float() * self.std + self.mean
            contrast = (_GAIN * (rgb - local_mean(rgb)) + 0.5).clamp(0, 1)
            contrast = torch.where(rgb.amax(dim=1, keepdim=True) < _FRAME, torch.full_like(contrast, 0.5), contrast)
            return ((contrast - self.mean) / self.std).to(photos.dtype)


def local_mean(rgb: Tensor) -> Tensor:
    """Return the mean around every pixel of photos [N, 3, S, S]: box filters to a grid, interpolated bilinearly."""
    size = rgb.shape[-1]
    cell = _cell(size)
    added = -size % cell
    padded = functional.pad(rgb, (0, added, 0, added), mode="replicate") if added else rgb
    low = functional.avg_pool2d(padded, 3 * cell, cell, cell, count_include_pad=False)
    low = functional.avg_pool2d(low, 3, 1, 1, count_include_pad=False)
    low = functional.interpolate(low, size=(size + added, size + added), mode="bilinear", align_corners=False)
    return low[:, :, :size, :size] if added else low


def _cell(size: int) -> int:
    """Return the side of a cell: a divisor of the photo's side, if there is one for 20 to 45 cells."""
    nearest = max(1, round(size / _CELLS))
    divisors = [cell for cell in range(1, size + 1) if size % cell == 0 and 20 <= size // cell <= 45]
    return min(divisors, key=lambda cell: abs(cell - nearest)) if divisors else nearest


def add_local_contrast(network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Make a timm network begin with `LocalContrast`, for photos normalised by `mean` and `std`.

    Raises:
        ConfigError: the network has no separate feature extractor.
    """
    if not hasattr(network, "forward_features"):
        raise ConfigError(f"model.local_contrast: {type(network).__name__} has no forward_features(); set it to false")
    network.local_contrast = LocalContrast(mean, std)

    def forward_features(self: Any, photos: Tensor, **options: Any) -> Tensor:
        features: Tensor = type(self).forward_features(self, self.local_contrast(photos), **options)
        return features

    # On the instance: timm's forward, the guard, heatmaps and engines all begin here. Copies bind to themselves.
    network.forward_features = MethodType(forward_features, network)  # type: ignore[assignment]
