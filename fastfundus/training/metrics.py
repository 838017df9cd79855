"""What a run measures while it trains: running loss, throughput, validation scores, and the files they go to."""

from __future__ import annotations

import csv
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from torch import Tensor

from fastfundus.training.run import run_file
from fastfundus.training.tasks.base import Batch
from fastfundus.training.tasks.targets import both_classes, grades

__all__ = [
    "MetricsWriter",
    "RunningLoss",
    "Throughput",
    "mean_auroc",
    "measure_resident_throughput",
    "validation_scores",
]

_STEPS_BETWEEN_CHECKS = 32
"""Steps between copies of the running loss from a GPU."""
_MAX_STEPS = 5
_ABOUT_S = 4.0
"""Approximate duration of the measurement of throughput in seconds; at least two steps are taken."""


class RunningLoss:
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
        if self._copy is None and self._since >= _STEPS_BETWEEN_CHECKS:
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


@dataclass(slots=True)
class Throughput:
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

    def summary(self, device: torch.device) -> str:
        """Return a description for the user."""
        text = (
            f"{self.images_per_s:.1f} images/s with data loading, {self.resident_images_per_s:.1f} without: "
            f"{self.share:.0%} of the throughput of the model alone"
        )
        if device.type == "cuda":
            text += f"; peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
        return text


def measure_resident_throughput(
    one_step: Callable[[Batch], object], batch: Batch, speed: Throughput, *, processes: int = 1
) -> None:
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

    steps = int(min(_MAX_STEPS, max(2, _ABOUT_S / speed.step_s)))
    one_step(batch)
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        one_step(batch)
    wait()
    speed.resident_images_per_s = steps * len(batch[0]) * processes / (time.perf_counter() - began)


def mean_auroc(probabilities: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Return the mean AUROC of the outputs, each over the photos with a known label.

    Args:
        probabilities: [N, L] probabilities.
        truth: [N, L] ground truth: 0, 1, or NaN for unknown labels.

    Returns:
        Mean over the outputs that have both classes; NaN if there are none.
    """
    values = []
    for column, known in zip(probabilities.T, truth.T, strict=True):
        usable = np.isfinite(known)
        if both_classes(known):
            values.append(float(roc_auc_score(known[usable], column[usable])))
    return float(np.mean(values)) if values else float("nan")


def validation_scores(task: str, probabilities: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float]:
    """Return the scores of probabilities [N, L] against ground truth [N, L], by name."""
    area = mean_auroc(probabilities, truth)
    if task == "multiclass":
        right = (probabilities.argmax(axis=1) == truth.argmax(axis=1)).mean()
        return {"auroc": area, "accuracy": float(right)}
    if task == "ordinal":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # with a single grade, kappa is NaN and sklearn warns
            agreement = cohen_kappa_score(
                grades(truth), grades(probabilities >= 0.5), labels=np.arange(truth.shape[1] + 1), weights="quadratic"
            )
        return {"qwk": float(agreement), "auroc": area}
    return {"auroc": area}


class MetricsWriter:
    """Writes the metrics of a run to metrics.csv and to TensorBoard.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "metrics.csv"
        self._events: Any = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()

    def write(self, history: list[dict[str, float]]) -> None:
        """Write metrics.csv, one row per epoch, and add the last epoch to TensorBoard."""
        with run_file(self._file) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(history[0]))
            writer.writeheader()
            writer.writerows(history)
        if self._events is None:
            # Not before there is something to write: a finished run that is resumed must not change.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # raised inside TensorBoard's own protobuf code
                from torch.utils.tensorboard import SummaryWriter
            self._events = SummaryWriter(str(self._folder))
        for name, value in history[-1].items():
            if name not in ("epoch", "seconds"):
                self._events.add_scalar(name, value, history[-1]["epoch"])
