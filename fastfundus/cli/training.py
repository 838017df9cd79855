"""The progress bar of training, and metrics in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from fastfundus.cli.console import progress_bar, remark
from fastfundus.evaluate.wording import FIGURE_NAMES
from fastfundus.records import interval_text
from fastfundus.train.observer import EpochResult, Observer

__all__ = ["TrainingBar", "metrics_lines"]

_IN_FILES_ONLY = ("f1", "brier", "ece")


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
        scores = "  ".join(f"val {FIGURE_NAMES.get(name, name)} {value:.4f}" for name, value in result.scores.items())
        remark(
            f"epoch {result.epoch}/{self._epochs}  loss {result.train_loss:.4f}  val loss {result.val_loss:.4f}  "
            f"{scores}{' *' if result.best else '  '}  {result.images_per_s:.0f} images/s  {result.seconds:.1f} s"
        )


def metrics_lines(labels: Mapping[str, Mapping[str, Any]], overall: Mapping[str, Any]) -> Iterator[str]:
    """Metrics of one set of photos: a line an output, and one of all together where there are several."""
    for name, metrics in labels.items():
        values = [
            f"{FIGURE_NAMES.get(key, key)} {interval_text(entry)}" for key, entry in metrics.items() if _is(key, entry)
        ]
        start = f"{name}: " if len(labels) > 1 else ""
        yield f"{start}{', '.join(values)}; {metrics['photos']} photos of {metrics['patients']} patients"
    if len(labels) > 1 or "pixels_auroc" in overall:
        yield "all together: " + ", ".join(
            f"{FIGURE_NAMES.get(key, key)} {interval_text(entry)}" for key, entry in overall.items()
        )


def _is(key: str, entry: object) -> bool:
    return isinstance(entry, dict) and "low" in entry and key not in _IN_FILES_ONLY
