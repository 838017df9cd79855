"""Metrics with patient-clustered bootstrap intervals.

Photos of one patient are not independent: resampling draws patients, not photos. All resamples are computed at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.train.targets import both_classes

__all__ = [
    "BinaryMetrics", "Interval", "auroc", "binary_metrics", "mean_with_interval", "overall_metrics", "quadratic_kappa",
]  # fmt: skip

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % bootstrap percentile interval; NaN where it cannot be estimated."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return plain data for JSON, which knows no NaN: None stands for it."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class BinaryMetrics:
    """Metrics of one label on one set of photos."""

    photos: int
    patients: int
    positives: int
    auroc: Interval
    sensitivity: Interval
    """At the threshold."""
    specificity: Interval
    threshold: float | None
    """None where each photo has its own."""
    brier: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        intervals = {name: getattr(self, name).to_dict() for name in ("auroc", "sensitivity", "specificity")}
        return asdict(self) | intervals


def auroc(scores: Floats, labels: Floats, weights: Floats | None = None) -> Floats:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: [N]
        labels: [N] 0 or 1.
        weights: [B, N] how often each photo counts in each of B sets; None is one set with each photo once.

    Returns:
        [B]; NaN where a set lacks one of the classes.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    sorted_scores, sorted_labels = scores[order], labels[order]
    first_of_tie = np.flatnonzero(np.r_[True, np.diff(sorted_scores) > 0])
    positive = np.add.reduceat(weights[:, order] * sorted_labels, first_of_tie, axis=1)
    negative = np.add.reduceat(weights[:, order] * (1 - sorted_labels), first_of_tie, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((positive * (below + negative / 2)).sum(axis=1) / pairs)


def _patient_weights(patients: Sequence[str], resamples: int, seed: int) -> Floats:
    """[resamples, N]: how often each photo counts when patients are drawn with replacement."""
    _, number = np.unique(np.asarray(patients), return_inverse=True)
    count = int(number.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return draws[:, number].astype(np.float64)


def _interval(value: float, resampled: Floats) -> Interval:
    usable = resampled[np.isfinite(resampled)]
    if not len(usable):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(usable, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def binary_metrics(
    probabilities: Floats,
    labels: Floats,
    patients: Sequence[str],
    threshold: float | Floats,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> BinaryMetrics:
    """Measure one output.

    Args:
        probabilities: [N], 0 to 1.
        labels: [N] 0 or 1.
        patients: [N] who each photo is of.
        threshold: a photo is positive when its probability is at least this, one for all or [N]; chosen elsewhere,
            never on these photos.
        resamples: bootstrap sets.
        seed: of the resampling.
    """
    weights = _patient_weights(patients, resamples, seed)
    called = probabilities >= threshold
    rates = []
    for truth in (1, 0):
        of_class = labels == truth
        right = (called == bool(truth)) & of_class
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled = (weights @ right) / (weights @ of_class)
            value = float(np.float64(right.sum()) / of_class.sum())
        rates.append(_interval(value, resampled))
    return BinaryMetrics(
        photos=len(labels),
        patients=len(set(patients)),
        positives=int(labels.sum()),
        auroc=_interval(float(auroc(probabilities, labels)[0]), auroc(probabilities, labels, weights)),
        sensitivity=rates[0],
        specificity=rates[1],
        threshold=None if isinstance(threshold, np.ndarray) else threshold,
        brier=float(np.mean((probabilities - labels) ** 2)),
    )


def quadratic_kappa(truth: NDArray[np.int64], given: NDArray[np.int64], grades: int, weights: Floats) -> Floats:
    """Cohen's kappa with quadratic weights: agreement on grades beyond chance, 1 when they are all equal.

    Args:
        truth: [N] 0 to grades - 1.
        given: [N] likewise.
        grades: how many there are.
        weights: [B, N] how often each photo counts in each of B sets.

    Returns:
        [B]; NaN where a set holds one grade only.
    """
    table = weights @ np.eye(grades * grades)[truth * grades + given]
    table = table.reshape(-1, grades, grades)
    cost = np.square(np.subtract.outer(np.arange(grades), np.arange(grades)))
    expected = table.sum(axis=2)[:, :, None] * table.sum(axis=1)[:, None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = (expected * cost).sum(axis=(1, 2)) / table.sum(axis=(1, 2))
        return np.asarray(1 - (table * cost).sum(axis=(1, 2)) / chance)


def overall_metrics(
    task: str, chances: Floats, truth: Floats, patients: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """Measure all outputs of a task together.

    Args:
        task: of the config.
        chances: [N, L] probabilities.
        truth: [N, L] 0, 1 or NaN.
        patients: [N] who each photo is of.
        resamples: bootstrap sets.
        seed: of the resampling.

    Returns:
        `auroc`, the mean over outputs that have both classes; for classes `accuracy` too, and for grades `qwk`.
    """
    weights = np.concatenate([np.ones((1, len(truth))), _patient_weights(patients, resamples, seed)])
    areas = []
    for column, known in zip(chances.T, truth.T, strict=True):
        usable = np.isfinite(known)
        if both_classes(known):
            areas.append(auroc(column[usable], known[usable], weights[:, usable]))
    # An output that a resample has left without one of its classes is left out of that resample's mean.
    found = np.array(areas).reshape(-1, len(weights))
    with np.errstate(invalid="ignore"):
        area = np.nansum(found, axis=0) / np.isfinite(found).sum(axis=0)
    result = {"auroc": area}
    if task == "multiclass":
        result["accuracy"] = weights @ (chances.argmax(axis=1) == truth.argmax(axis=1)) / weights.sum(axis=1)
    if task == "ordinal":
        reached, given = (values.sum(axis=1).astype(np.int64) for values in (np.nan_to_num(truth), chances >= 0.5))
        result["qwk"] = quadratic_kappa(reached, given, truth.shape[1] + 1, weights)
    return {name: _interval(float(values[0]), values[1:]) for name, values in result.items()}


def mean_with_interval(values: Floats, patients: Sequence[str], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of one value a photo."""
    weights = _patient_weights(patients, resamples, seed)
    return _interval(float(values.mean()), weights @ values / weights.sum(axis=1))
