"""Learning rate and photo size as pure functions of step and epoch."""

from __future__ import annotations

import math

__all__ = ["learning_rate", "training_size"]

_SIZES = 4
_SIZE_STEP_PX = 32
"""Total stride of convolutional backbones."""


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Return the learning rate: linear warm-up to `peak`, then half a cosine down to zero at `total`.

    Args:
        step: step, counted from 0.
        peak: largest learning rate.
        warmup: number of warm-up steps.
        total: number of steps of the whole run.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def training_size(epoch: int, *, epochs: int, size: int, first: float) -> int:
    """Return the side of the photos in an epoch: from `first` times `size` to `size` over two thirds of the run.

    It grows in at most four steps, because a compiled model is recompiled for each size.

    Args:
        epoch: epoch, counted from 0.
        epochs: number of epochs of the whole run.
        size: side of the photos in the cache, in pixels.
        first: side in the first epoch, as a share of `size`.

    Returns:
        Pixels.
    """
    grown = min(_SIZES, _SIZES * epoch // max(1, round(epochs * 2 / 3)))
    share = first + (1 - first) * grown / _SIZES
    return size if share == 1 else max(_SIZE_STEP_PX, round(share * size / _SIZE_STEP_PX) * _SIZE_STEP_PX)
