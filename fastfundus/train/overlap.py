"""How well feeding hides behind computing: training with data against training on a batch that is there already."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastfundus.train.problem import Batch

__all__ = ["Overlap", "measure_overlap"]

_MOST_STEPS = 5
_ABOUT_S = 4.0
"""Measuring may take so long, but for two steps at least."""


@dataclass(slots=True)
class Overlap:
    """Speed of the last epoch, and of a resident batch."""

    images_per_s: float = 0.0
    """Of the last epoch, with data, over all processes."""
    step_s: float = 0.0
    """Of one step of it."""
    resident_images_per_s: float = 0.0
    """Of the same steps on one batch that is there already."""

    def epoch(self, seconds: float, *, steps: int, photos: int) -> None:
        """Take in an epoch, or what was left of it when the run was resumed; the last one with steps counts."""
        if steps:
            self.images_per_s, self.step_s = photos / seconds, seconds / steps

    @property
    def share(self) -> float:
        """Step on a resident batch / step with data; 1 hides all feeding."""
        return self.images_per_s / self.resident_images_per_s

    def told(self, device: torch.device) -> str:
        """In words."""
        text = (
            f"{self.images_per_s:.1f} images/s with data, {self.resident_images_per_s:.1f} on a resident batch: "
            f"{self.share:.0%} of what the model alone allows"
        )
        if device.type == "cuda":
            text += f"; {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory at most"
        return text


def measure_overlap(one_step: Callable[[Batch], object], batch: Batch, speed: Overlap, *, processes: int = 1) -> None:
    """Time steps on one batch; for the end of a run, when nothing that a step changes is used any more.

    Args:
        one_step: a step of the loop.
        batch: of this process.
        speed: of the run's last epoch; filled in.
        processes: that take the step together. Every one of them must call this.
    """
    device = batch[0].device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    steps = int(min(_MOST_STEPS, max(2, _ABOUT_S / speed.step_s)))
    one_step(batch)
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        one_step(batch)
    wait()
    speed.resident_images_per_s = steps * len(batch[0]) * processes / (time.perf_counter() - began)
