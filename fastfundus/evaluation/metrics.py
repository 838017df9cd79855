"""Performance metrics with patient-clustered confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import DataError
from fastfundus.evaluation.bootstrap import Floats, Interval, PatientBootstrap
from fastfundus.training.tasks.targets import both_classes

__all__ = [
    "INTERVALS", "BinaryMetrics", "auroc", "binary_metrics", "mean_with_interval", "net_benefit",
    "overall_metrics", "quadratic_kappa",
]  # fmt: skip

INTERVALS = ("auroc", "auprc", "sensitivity", "specificity", "ppv", "npv", "f1", "brier", "ece")
_ECE_BINS = 15


@dataclass(frozen=True, slots=True)
class BinaryMetrics:
    """Metrics of one label on one set of photos; NaN where the set does not allow an estimate."""

    photos: int
    patients: int
    positives: int
    auroc: Interval
    auprc: Interval
    """Average precision: the area under the stepwise precision-recall curve."""
    sensitivity: Interval
    """At the threshold, like specificity, PPV, NPV and F1."""
    specificity: Interval
    ppv: Interval
    """Share of positive calls that are correct, at the stated prevalence or else at that of this set."""
    npv: Interval
    f1: Interval
    brier: Interval
    ece: Interval
    """Expected calibration error: |share of positives - mean probability| in 15 equal-width bins, weighted by size."""
    threshold: float | None
    """None if each photo has its own threshold."""
    prevalence: float | None
    """Stated prevalence for `ppv` and `npv`; None means the prevalence of this set."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {name: getattr(self, name).to_dict() for name in INTERVALS}


def auroc(scores: Floats, labels: Floats, weights: Floats | None = None) -> Floats:
    """Return the area under the ROC curve: the probability that a positive outranks a negative, ties counting half.

    Args:
        scores: [N] scores.
        labels: [N] 0 or 1.
        weights: [B, N] how often each photo counts in each of B sets; None means one set with each photo once.

    Returns:
        [B] areas; NaN where a set lacks one of the classes.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    return _Ranked(scores[order], labels[order]).areas(weights[:, order])["auroc"]


class _Ranked:
    """Labels of photos in ascending order of their scores, with ties grouped."""

    def __init__(self, scores: Floats, labels: Floats) -> None:
        self._labels = labels
        self._first_of_tie = np.flatnonzero(np.r_[True, np.diff(scores) > 0])

    def areas(self, weights: Floats) -> dict[str, Floats]:
        """Return `auroc` and `auprc` of weighted sets [B, N], with photos in the order of the scores."""
        positive = np.add.reduceat(weights * self._labels, self._first_of_tie, axis=1)
        negative = np.add.reduceat(weights, self._first_of_tie, axis=1) - positive
        below = np.cumsum(negative, axis=1) - negative
        positives, negatives = positive.sum(axis=1), negative.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            roc = (positive * (below + negative / 2)).sum(axis=1) / (positives * negatives)
            # From the highest score down, sum the precision at each step weighted by the recall it adds.
            right = np.cumsum(positive[:, ::-1], axis=1)
            called = right + np.cumsum(negative[:, ::-1], axis=1)
            precision = np.divide(right, called, out=np.zeros_like(right), where=called > 0)
            pr = (positive[:, ::-1] * precision).sum(axis=1) / positives
        return {"auroc": roc, "auprc": np.where(negatives > 0, pr, np.nan)}


def binary_metrics(
    probabilities: Floats,
    labels: Floats,
    patients: Sequence[str],
    threshold: float | Floats,
    *,
    prevalence: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> BinaryMetrics:
    """Measure one output.

    Args:
        probabilities: [N] probabilities, 0 to 1.
        labels: [N] 0 or 1.
        patients: [N] patient of each photo.
        threshold: a photo is called positive if its probability is at least this; one value or [N]. It must not have
            been chosen on these photos.
        prevalence: share of positives, 0 to 1, where the model will be used; `ppv` and `npv` then refer to it.
        resamples: number of bootstrap resamples.
        seed: random seed of the resampling.

    Raises:
        DataError: a probability is not finite or not within 0 to 1.
    """
    bad = np.flatnonzero(~((probabilities >= 0) & (probabilities <= 1)))
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(probabilities)} predictions are not probabilities, the first is "
            f"{probabilities[bad[0]]} of patient {patients[bad[0]]}; check the model that made them"
        )
    order = np.argsort(probabilities, kind="stable")
    predicted, truth = probabilities[order], labels[order]
    called = (probabilities >= threshold)[order]
    ranked = _Ranked(predicted, truth)
    bins = np.minimum((predicted * _ECE_BINS).astype(int), _ECE_BINS - 1)
    in_bin = np.zeros((len(predicted), _ECE_BINS))
    in_bin[np.arange(len(predicted)), bins] = truth - predicted
    outcomes = np.stack([called * truth, called * (1 - truth), ~called * truth, ~called * (1 - truth)], axis=1)

    def statistics(weights: Floats) -> dict[str, Floats]:
        tp, fp, fn, tn = (weights @ outcomes).T
        count = weights.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
            if prevalence is None:
                ppv, npv = tp / (tp + fp), tn / (tn + fn)
            else:
                sick, well = prevalence, 1 - prevalence
                ppv = sensitivity * sick / (sensitivity * sick + (1 - specificity) * well)
                npv = specificity * well / (specificity * well + (1 - sensitivity) * sick)
            return {
                **ranked.areas(weights),
                "sensitivity": sensitivity,
                "specificity": specificity,
                "ppv": ppv,
                "npv": npv,
                "f1": np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan),
                "brier": weights @ np.square(predicted - truth) / count,
                "ece": np.abs(weights @ in_bin).sum(axis=1) / count,
            }

    found = PatientBootstrap(patients, resamples, seed).intervals(statistics, order)
    return BinaryMetrics(
        photos=len(labels),
        patients=len(set(patients)),
        positives=int(labels.sum()),
        threshold=None if isinstance(threshold, np.ndarray) else threshold,
        prevalence=prevalence,
        **found,
    )


def net_benefit(probabilities: Floats, labels: Floats, thresholds: Floats) -> Floats:
    """Return the net benefit per photo of acting on a model's positive calls.

    It is the rate of true positives minus that of false positives weighted by the odds of each threshold. Source:
    Vickers and Elkin, Medical Decision Making 2006.

    Args:
        probabilities: [N] probabilities.
        labels: [N] 0 or 1.
        thresholds: [T] threshold probabilities below 1; the probability from which one would act states the cost of a
            missed positive.

    Returns:
        [T]; acting on all photos gives `prevalence - (1 - prevalence) * threshold / (1 - threshold)`, acting on none 0.
    """
    called = probabilities[None, :] >= thresholds[:, None]
    right, wrong = (called & (labels == 1)).mean(axis=1), (called & (labels == 0)).mean(axis=1)
    return right - wrong * thresholds / (1 - thresholds)


def quadratic_kappa(truth: NDArray[np.int64], given: NDArray[np.int64], grades: int, weights: Floats) -> Floats:
    """Return Cohen's kappa with quadratic weights: agreement on grades beyond chance, 1 if all are equal.

    Args:
        truth: [N] true grades, 0 to grades - 1.
        given: [N] predicted grades, 0 to grades - 1.
        grades: number of grades.
        weights: [B, N] how often each photo counts in each of B sets.

    Returns:
        [B]; NaN where a set contains one grade only.
    """
    table = weights @ np.eye(grades * grades)[truth * grades + given]
    table = table.reshape(-1, grades, grades)
    cost = np.square(np.subtract.outer(np.arange(grades), np.arange(grades)))
    expected = table.sum(axis=2)[:, :, None] * table.sum(axis=1)[:, None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        by_chance = (expected * cost).sum(axis=(1, 2)) / table.sum(axis=(1, 2))
        return np.asarray(1 - (table * cost).sum(axis=(1, 2)) / by_chance)


def overall_metrics(
    task: str, predicted: Floats, truth: Floats, patients: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """Measure all outputs of a task together.

    Args:
        task: task of the config.
        predicted: [N, L] probabilities.
        truth: [N, L] 0, 1 or NaN.
        patients: [N] patient of each photo.
        resamples: number of bootstrap resamples.
        seed: random seed of the resampling.

    Returns:
        `auroc`, the mean over outputs that have both classes; also `accuracy` for the task multiclass and `qwk` for
        ordinal.
    """
    usable = [
        (np.isfinite(known), column, known)
        for column, known in zip(predicted.T, truth.T, strict=True)
        if both_classes(known)
    ]
    reached, given = (values.sum(axis=1).astype(np.int64) for values in (np.nan_to_num(truth), predicted >= 0.5))

    def statistics(weights: Floats) -> dict[str, Floats]:
        areas = [auroc(column[known], labels[known], weights[:, known]) for known, column, labels in usable]
        # The mean of a resample skips outputs that have only one class in it.
        found = np.array(areas).reshape(-1, len(weights))
        with np.errstate(invalid="ignore"):
            result = {"auroc": np.nansum(found, axis=0) / np.isfinite(found).sum(axis=0)}
        if task == "multiclass":
            result["accuracy"] = weights @ (predicted.argmax(axis=1) == truth.argmax(axis=1)) / weights.sum(axis=1)
        if task == "ordinal":
            result["qwk"] = quadratic_kappa(reached, given, truth.shape[1] + 1, weights)
        return result

    return PatientBootstrap(patients, resamples, seed).intervals(statistics)


def mean_with_interval(values: Floats, patients: Sequence[str], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of one value per photo, [N], with its interval."""

    def statistics(weights: Floats) -> dict[str, Floats]:
        return {"mean": weights @ values / weights.sum(axis=1)}

    return PatientBootstrap(patients, resamples, seed).intervals(statistics)["mean"]
