"""The progress bar of training."""

from __future__ import annotations

from contextlib import ExitStack

from fastfundus.cli.console import progress_bar, remark
from fastfundus.train.loop import EpochResult, Observer

__all__ = ["TrainingBar"]


class TrainingBar(Observer):
    """Draws a bar over the steps of each epoch, and writes a line an epoch."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._stack = ExitStack()

    def __enter__(self) -> TrainingBar:
        self._progress = self._stack.enter_context(progress_bar())
        self._task = self._progress.add_task("training", total=None)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """A line worth reading."""
        remark(text)

    def step(self, epoch: int, step: int, steps: int) -> None:
        """Move the bar."""
        text = f"epoch {epoch}/{self._epochs}"
        self._progress.update(self._task, description=text, completed=step, total=steps)

    def epoch(self, result: EpochResult) -> None:
        """Write the epoch's line."""
        remark(
            f"epoch {result.epoch}/{self._epochs}  loss {result.train_loss:.4f}  val loss {result.val_loss:.4f}  "
            f"val AUROC {result.val_auroc:.4f}{' *' if result.best else '  '}  {result.images_per_s:.0f} images/s  "
            f"{result.seconds:.1f} s"
        )
