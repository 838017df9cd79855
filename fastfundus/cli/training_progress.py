"""The progress bar of training, and metrics in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from fastfundus.cli.console import progress_bar, remark
from fastfundus.evaluation.figures import METRIC_NAMES
from fastfundus.records import interval_text
from fastfundus.training.observer import EpochResult, Observer

__all__ = ["TrainingBar", "metrics_lines"]

_IN_FILES_ONLY = ("f1", "brier", "ece")


class TrainingBar(Observer):
    """Shows a bar over the steps of each epoch, and prints one line per epoch."""

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
        """Print a line."""
        remark(text)

    def step(self, epoch: int, step: int, steps: int) -> None:
        """Advance the bar."""
        text = f"epoch {epoch}/{self._epochs}"
        self._progress.update(self._task, description=text, completed=step, total=steps)

    def epoch(self, result: EpochResult) -> None:
        """Print the results of an epoch."""
        scores = "  ".join(f"val {METRIC_NAMES.get(name, name)} {value:.4f}" for name, value in result.scores.items())
        remark(
            f"epoch {result.epoch}/{self._epochs}  loss {result.train_loss:.4f}  val loss {result.val_loss:.4f}  "
            f"{scores}{' *' if result.best else '  '}  {result.images_per_s:.0f} images/s  {result.seconds:.1f} s"
        )


def metrics_lines(labels: Mapping[str, Mapping[str, Any]], overall: Mapping[str, Any]) -> Iterator[str]:
    """Yield the metrics of a set of photos: one line per output, and one for all outputs if there are several."""
    for name, metrics in labels.items():
        values = [
            f"{METRIC_NAMES.get(key, key)} {interval_text(entry)}" for key, entry in metrics.items() if _is(key, entry)
        ]
        start = f"{name}: " if len(labels) > 1 else ""
        yield f"{start}{', '.join(values)}; {metrics['photos']} photos of {metrics['patients']} patients"
    if len(labels) > 1 or "pixels_auroc" in overall:
        yield "all together: " + ", ".join(
            f"{METRIC_NAMES.get(key, key)} {interval_text(entry)}" for key, entry in overall.items()
        )


def _is(key: str, entry: object) -> bool:
    return isinstance(entry, dict) and "low" in entry and key not in _IN_FILES_ONLY
