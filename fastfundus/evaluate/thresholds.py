"""Temperatures and thresholds, chosen on validation patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from fastfundus.evaluate.bootstrap import Floats, Interval, PatientBootstrap
from fastfundus.models.activation import Activation
from fastfundus.train.loss import LOSSES
from fastfundus.train.targets import both_classes

__all__ = ["fit_temperature", "fit_temperatures", "fit_threshold", "threshold_entry"]


def fit_temperature(logits: NDArray[np.float64], truth: NDArray[np.float64], kind: Activation = "sigmoid") -> float:
    """Find the temperature, 0.05 to 20, by which logits [N, L] are divided for the smallest log loss.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    scores, wanted = torch.from_numpy(logits), torch.from_numpy(truth)

    def loss(log_temperature: float) -> float:
        return float(LOSSES[kind](scores / float(np.exp(log_temperature)), wanted))

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(best.x))


def fit_temperatures(logits: NDArray[np.float64], truth: NDArray[np.float64], kind: Activation) -> list[float]:
    """One an output where outputs are apart, one for all where they share a probability."""
    if kind != "sigmoid":
        return [fit_temperature(logits, truth, kind)] * logits.shape[1]
    return [
        fit_temperature(logits[:, [output]], truth[:, [output]]) if both_classes(truth[:, output]) else 1.0
        for output in range(logits.shape[1])
    ]


def fit_threshold(
    chances: Floats,
    labels: Floats,
    patients: Sequence[str],
    target: float,
    of: Literal["sensitivity", "specificity"] = "sensitivity",
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Choose a threshold: the largest that reaches a sensitivity, or the smallest that reaches a specificity.

    It lies halfway between two scores, so that rounding in another runtime does not flip the photo that set it; halfway
    to zero below the lowest of all, halfway to one above the highest.

    Args:
        chances: [N] probabilities.
        labels: [N] 0 or 1; at least one is what `of` counts.
        patients: [N] who each photo is of.
        target: to be reached, 0 to 1.
        of: what is to be reached: the share of positives that are called, or of negatives that are spared.
        resamples: bootstrap sets.
        seed: of the resampling.

    Returns:
        The threshold, and how far it moves when other patients are drawn.
    """
    counted = np.flatnonzero(labels == (of == "sensitivity"))
    scores = np.sort(chances)
    # From the surest side on: the first photo by which enough are counted sets the threshold.
    if of == "sensitivity":
        order = counted[np.argsort(-chances[counted], kind="stable")]
        place = np.searchsorted(scores, chances[order], side="left") - 1
        beside = np.where(place >= 0, scores[place], 0.0)
    else:
        order = counted[np.argsort(chances[counted], kind="stable")]
        place = np.searchsorted(scores, chances[order], side="right")
        beside = np.where(place < len(scores), scores[np.minimum(place, len(scores) - 1)], 1.0)
    candidates = (chances[order] + beside) / 2

    def statistics(weights: Floats) -> dict[str, Floats]:
        reached = np.cumsum(weights, axis=1)
        # Shares such as 0.07 of 100 are not to be rounded up to 8.
        needed = np.ceil(np.round(target * reached[:, -1:], 9))
        chosen = candidates[(reached >= np.maximum(needed, 1)).argmax(axis=1)]
        return {"threshold": np.where(reached[:, -1] > 0, chosen, np.nan)}

    return PatientBootstrap(patients, resamples, seed).intervals(statistics, order)["threshold"]


def threshold_entry(found: Interval) -> dict[str, float | None]:
    """A threshold and its interval as operating points hold them."""
    plain = found.to_dict()
    return {"threshold": plain["value"], "threshold_low": plain["low"], "threshold_high": plain["high"]}
