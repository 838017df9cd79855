"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


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
