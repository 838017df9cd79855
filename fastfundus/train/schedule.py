"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

__all__ = ["learning_rate", "training_size"]

_SIZES = 4
_SIZE_STEP_PX = 32
"""What the strides of convolutional backbones multiply to."""


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to zero at `total`.

    Args:
        step: counted from 0.
        peak: the largest rate.
        warmup: steps of warm-up.
        total: steps of the whole run.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def training_size(epoch: int, *, epochs: int, size: int, first: float) -> int:
    """Side of the photos in an epoch, in pixels: from `first` times `size` to `size` over two thirds of the run.

    It grows in four steps at most: a compiled model is compiled anew for each size.

    Args:
        epoch: counted from 0.
        epochs: of the whole run.
        size: of the cache, in pixels.
        first: share of it in the first epoch.
    """
    grown = min(_SIZES, _SIZES * epoch // max(1, round(epochs * 2 / 3)))
    share = first + (1 - first) * grown / _SIZES
    return size if share == 1 else max(_SIZE_STEP_PX, round(share * size / _SIZE_STEP_PX) * _SIZE_STEP_PX)
