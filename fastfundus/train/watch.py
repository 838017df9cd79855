"""Running loss of an epoch, without synchronising the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LossWatch"]

_STEPS_BETWEEN_LOOKS = 32


class LossWatch:
    """Sums the losses of an epoch on their device, and detects non-finite losses.

    On a CPU, the sum is checked after every step. On a GPU, it is copied at intervals and checked once the copy has
    arrived. A non-finite loss makes every later sum non-finite, so that none is missed.

    Args:
        device: device of the losses.
        total: sum of the epoch's earlier steps, when a run resumes.
    """

    def __init__(self, device: torch.device, total: float = 0.0) -> None:
        self._sum = torch.tensor(total, dtype=torch.float64, device=device)
        self._since = 0
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, loss: Tensor) -> None:
        """Add the loss of one step, a scalar on the device."""
        self._sum += loss
        self._since += 1

    def failed(self) -> bool:
        """Return whether a loss is known to be non-finite; never waits for the device."""
        if self._sum.device.type == "cpu":
            return not math.isfinite(self._sum.item())
        if self._copy is not None and self._copy[1].query():  # type: ignore[no-untyped-call]
            if not math.isfinite(self._copy[0].item()):
                return True
            self._copy = None
        if self._copy is None and self._since >= _STEPS_BETWEEN_LOOKS:
            self._since = 0
            there = torch.empty((), dtype=torch.float64, pin_memory=True)
            there.copy_(self._sum, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copy = there, event
        return False

    def total(self) -> float:
        """Return the sum; waits for the device."""
        return float(self._sum.item())
