"""Throughput of training with data loading, compared with training on a resident batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastfundus.train.problem import Batch

__all__ = ["Overlap", "measure_overlap"]

_MOST_STEPS = 5
_ABOUT_S = 4.0
"""Approximate duration of the measurement in seconds; at least two steps are taken."""


@dataclass(slots=True)
class Overlap:
    """Throughput of the last epoch, and of steps on a resident batch."""

    images_per_s: float = 0.0
    """Throughput of the last epoch with data loading, over all processes."""
    step_s: float = 0.0
    """Seconds per step of the last epoch."""
    resident_images_per_s: float = 0.0
    """Throughput of the same steps on one batch that is already on the device."""

    def epoch(self, seconds: float, *, steps: int, photos: int) -> None:
        """Record an epoch, or the rest of one after a resume; the last epoch with steps counts."""
        if steps:
            self.images_per_s, self.step_s = photos / seconds, seconds / steps

    @property
    def share(self) -> float:
        """Step time on a resident batch divided by step time with data; 1 means that data loading is fully hidden."""
        return self.images_per_s / self.resident_images_per_s

    def told(self, device: torch.device) -> str:
        """Return a description for the user."""
        text = (
            f"{self.images_per_s:.1f} images/s with data loading, {self.resident_images_per_s:.1f} without: "
            f"{self.share:.0%} of the throughput of the model alone"
        )
        if device.type == "cuda":
            text += f"; peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        return text


def measure_overlap(one_step: Callable[[Batch], object], batch: Batch, speed: Overlap, *, processes: int = 1) -> None:
    """Time steps on one batch. The steps change model and optimizer, so call this only at the end of a run.

    Args:
        one_step: takes one training step.
        batch: batch of this process.
        speed: throughput of the last epoch; the throughput on the resident batch is filled in.
        processes: number of processes that take the steps together; each of them must call this function.
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
