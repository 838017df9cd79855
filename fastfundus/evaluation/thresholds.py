"""Temperature scaling and threshold selection on validation patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from fastfundus.evaluation.bootstrap import Floats, Interval, PatientBootstrap
from fastfundus.models.activation import Activation
from fastfundus.training.tasks.losses import LOSSES
from fastfundus.training.tasks.targets import both_classes

__all__ = ["fit_temperature", "fit_temperatures", "fit_threshold", "threshold_entry"]


def fit_temperature(logits: NDArray[np.float64], truth: NDArray[np.float64], kind: Activation = "sigmoid") -> float:
    """Return the temperature, 0.05 to 20, that minimises the log loss when logits [N, L] are divided by it.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    scores, wanted = torch.from_numpy(logits), torch.from_numpy(truth)

    def loss(log_temperature: float) -> float:
        return float(LOSSES[kind](scores / float(np.exp(log_temperature)), wanted))

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(best.x))


def fit_temperatures(logits: NDArray[np.float64], truth: NDArray[np.float64], kind: Activation) -> list[float]:
    """Fit one temperature per output for independent outputs, or one shared by all for dependent ones."""
    if kind != "sigmoid":
        return [fit_temperature(logits, truth, kind)] * logits.shape[1]
    return [
        fit_temperature(logits[:, [output]], truth[:, [output]]) if both_classes(truth[:, output]) else 1.0
        for output in range(logits.shape[1])
    ]


def fit_threshold(
    probabilities: Floats,
    labels: Floats,
    patients: Sequence[str],
    target: float,
    of: Literal["sensitivity", "specificity"] = "sensitivity",
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Choose the largest threshold that reaches a sensitivity, or the smallest that reaches a specificity.

    It is placed halfway between two scores, so that rounding in another runtime does not change the decision for the
    photo that determined it. Below the lowest score it is halfway to zero, above the highest halfway to one.

    Args:
        probabilities: [N] probabilities.
        labels: [N] 0 or 1, with at least one photo of the class that `of` refers to.
        patients: [N] patient of each photo.
        target: value to reach, 0 to 1.
        of: metric to reach: the share of positives called positive, or of negatives called negative.
        resamples: number of bootstrap resamples.
        seed: random seed of the resampling.

    Returns:
        The threshold with its interval over resampled patients.
    """
    counted = np.flatnonzero(labels == (of == "sensitivity"))
    scores = np.sort(probabilities)
    # Starting with the most confident photos, the one that first reaches the target determines the threshold.
    if of == "sensitivity":
        order = counted[np.argsort(-probabilities[counted], kind="stable")]
        place = np.searchsorted(scores, probabilities[order], side="left") - 1
        beside = np.where(place >= 0, scores[place], 0.0)
    else:
        order = counted[np.argsort(probabilities[counted], kind="stable")]
        place = np.searchsorted(scores, probabilities[order], side="right")
        beside = np.where(place < len(scores), scores[np.minimum(place, len(scores) - 1)], 1.0)
    candidates = (probabilities[order] + beside) / 2

    def statistics(weights: Floats) -> dict[str, Floats]:
        reached = np.cumsum(weights, axis=1)
        # Rounding first keeps floating-point errors from turning 0.07 * 100 into 8.
        needed = np.ceil(np.round(target * reached[:, -1:], 9))
        chosen = candidates[(reached >= np.maximum(needed, 1)).argmax(axis=1)]
        return {"threshold": np.where(reached[:, -1] > 0, chosen, np.nan)}

    return PatientBootstrap(patients, resamples, seed).intervals(statistics, order)["threshold"]


def threshold_entry(found: Interval) -> dict[str, float | None]:
    """Return a threshold and its interval as stored in operating points."""
    plain = found.to_dict()
    return {"threshold": plain["value"], "threshold_low": plain["low"], "threshold_high": plain["high"]}
