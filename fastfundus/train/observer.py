"""Who hears of a run's progress; the command line draws a progress bar from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["EpochResult", "Observer"]


@dataclass(frozen=True, slots=True)
class EpochResult:
    """One line of metrics.csv."""

    epoch: int
    """Counted from 1."""
    learning_rate: float
    train_loss: float
    val_loss: float
    scores: dict[str, float]
    """On validation, by name."""
    images_per_s: float
    """Training only, validation not counted."""
    seconds: float
    best: bool
    """Whether this is the best epoch so far."""

    def line(self) -> dict[str, Any]:
        """The columns of metrics.csv."""
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
    """Hears what happens."""

    def say(self, text: str) -> None:
        """A line worth reading."""

    def step(self, epoch: int, step: int, steps: int) -> None:
        """A step was taken; `epoch` from 1, `step` from 1 to `steps`."""

    def epoch(self, result: EpochResult) -> None:
        """An epoch and its validation are over."""
