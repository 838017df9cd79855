"""Progress callbacks of a run, from which the command line draws its progress bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["EpochResult", "Observer"]


@dataclass(frozen=True, slots=True)
class EpochResult:
    """Results of one epoch, a line of metrics.csv."""

    epoch: int
    """Counted from 1."""
    learning_rate: float
    train_loss: float
    val_loss: float
    scores: dict[str, float]
    """Validation scores by name."""
    images_per_s: float
    """Throughput of training, without validation."""
    seconds: float
    best: bool
    """True if this is the best epoch so far."""

    def line(self) -> dict[str, Any]:
        """Return the columns of metrics.csv."""
        return {
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "train_loss": self.train_loss,
            "val_loss": self.val_loss,
            **{f"val_{name}": value for name, value in self.scores.items()},
            "images_per_s": self.images_per_s,
            "seconds": self.seconds,
        }


class Observer:
    """Receives progress callbacks; this base class ignores them."""

    def say(self, text: str) -> None:
        """Show a line of text to the user."""

    def step(self, epoch: int, step: int, steps: int) -> None:
        """Handle the end of a step; `epoch` counts from 1, `step` from 1 to `steps`."""

    def epoch(self, result: EpochResult) -> None:
        """Handle the end of an epoch and its validation."""
