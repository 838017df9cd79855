"""Paired comparison of two models on the same photos, with patient-clustered intervals and p-values.

Areas under the ROC curve are compared by DeLong's method (Biometrics 1988) in Obuchowski's form for clustered data
(Biometrics 1997); with one photo per patient the two are identical. Everything else is compared by resampling patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata, t

from fastfundus.errors import DataError
from fastfundus.evaluation.bootstrap import Floats, PatientBootstrap, interval
from fastfundus.evaluation.segmentation import VESSEL_FIGURES

__all__ = [
    "PairedDifference", "area_covariance", "compare_areas", "compare_means", "compare_predictions", "compare_rates",
    "holm",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """First minus second, with a 95 % interval; NaN where it cannot be estimated."""

    difference: float
    low: float
    high: float
    p: float
    """Two-sided p-value of the null hypothesis of no difference."""

    def to_dict(self) -> dict[str, float | None]:
        """Return plain data for JSON, with None in place of NaN."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}


def area_covariance(scores: Floats, labels: Floats, patients: Sequence[str]) -> tuple[Floats, Floats]:
    """Estimate the areas under the ROC curves of several models on the same photos, and their covariance.

    Args:
        scores: [M, N] scores by model.
        labels: [N] 0 or 1.
        patients: [N] patient of each photo.

    Returns:
        [M] areas and [M, M] covariances; NaN if a class is absent or all its photos are of one patient.
    """
    models = len(scores)
    positive, negative = labels == 1, labels == 0
    m, n = int(positive.sum()), int(negative.sum())
    if not m or not n:
        return np.full(models, np.nan), np.full((models, models), np.nan)
    # Each photo's contribution to the area: for a positive, the share of negatives below it, ties counting half.
    all_ranks = np.stack([rankdata(row) for row in scores])
    above = (all_ranks[:, positive] - np.stack([rankdata(row[positive]) for row in scores])) / n
    below = 1 - (all_ranks[:, negative] - np.stack([rankdata(row[negative]) for row in scores])) / m
    areas = above.mean(axis=1)
    _, cluster = np.unique(np.asarray(patients), return_inverse=True)
    count = int(cluster.max()) + 1
    # Sums of deviations over the photos of each patient: [M, patients].
    sums_positive = _by_cluster(above - areas[:, None], cluster[positive], count)
    sums_negative = _by_cluster(below - areas[:, None], cluster[negative], count)
    with_positive, with_negative = (len(np.unique(cluster[side])) for side in (positive, negative))
    with np.errstate(invalid="ignore", divide="ignore"):
        of_positive = np.float64(with_positive) / (with_positive - 1) * sums_positive @ sums_positive.T / m**2
        of_negative = np.float64(with_negative) / (with_negative - 1) * sums_negative @ sums_negative.T / n**2
        crossed = np.float64(count) / (count - 1) * sums_positive @ sums_negative.T / (m * n)
        return areas, of_positive + of_negative + crossed + crossed.T


def _by_cluster(values: Floats, cluster: NDArray[np.int64], count: int) -> Floats:
    return np.stack([np.bincount(cluster, weights=row, minlength=count) for row in values])


def compare_areas(
    first: Floats, second: Floats, labels: Floats, patients: Sequence[str], strata: NDArray[np.int64] | None = None
) -> PairedDifference:
    """Compare the areas under the ROC curves of two models on the same photos.

    Args:
        first: [N] scores of the first model.
        second: [N] scores of the second model.
        labels: [N] 0 or 1.
        patients: [N] patient of each photo.
        strata: [N] disjoint sets of patients, such as folds, whose scores come from different models and must not be
            ranked together. Areas are computed within each stratum and averaged over those with both classes. None
            means a single stratum.
    """
    strata = np.zeros(len(labels), np.int64) if strata is None else strata
    scores, names = np.stack([first, second]), np.asarray(patients)
    differences, variances, freedom = [], [], 0
    for stratum in np.unique(strata):
        part = strata == stratum
        areas, covariance = area_covariance(scores[:, part], labels[part], names[part].tolist())
        if np.isfinite(areas).all():
            differences.append(areas[0] - areas[1])
            variances.append(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
            freedom += min(len(np.unique(names[part & (labels == side)])) for side in (0, 1)) - 1
    difference = float(np.mean(differences)) if differences else float("nan")
    variance = float(np.sum(variances)) / max(1, len(variances)) ** 2
    if not differences or not np.isfinite(variance):
        return PairedDifference(difference, float("nan"), float("nan"), float("nan"))
    error = np.sqrt(max(variance, 0.0))
    # With few patients the error estimate is itself uncertain: use Student's t, with degrees of freedom from the rarer
    # class.
    student = t(max(freedom, 1))
    # Equal scores have neither difference nor error: p is 1.
    p = float(2 * student.sf(abs(difference) / error)) if error > 0 else float(difference == 0)
    reach = float(student.ppf(0.975) * error)
    return PairedDifference(difference, difference - reach, difference + reach, p)


def compare_rates(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    labels: Floats,
    patients: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Compare `sensitivity` and `specificity` of two models' decisions on the same photos.

    The p-value is twice the smaller share of resamples on either side of zero, where one is added to both the count and
    the number of resamples.

    Args:
        first: [N] photos that the first model calls positive.
        second: [N] photos that the second model calls positive.
        labels: [N] 0 or 1.
        patients: [N] patient of each photo.
        resamples: number of bootstrap resamples.
        seed: random seed of the resampling.
    """
    gains = first.astype(np.float64) - second
    of = {"sensitivity": (labels == 1, gains), "specificity": (labels == 0, -gains)}

    def statistics(weights: Floats) -> dict[str, Floats]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return {name: weights @ (side * gain) / (weights @ side) for name, (side, gain) in of.items()}

    values = PatientBootstrap(patients, resamples, seed).values(statistics)
    return {name: _difference(drawn) for name, drawn in values.items()}


def compare_means(
    first: Floats, second: Floats, patients: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Compare the means of one value per photo, [N] each, such as Dice; p-values are computed as in `compare_rates`."""
    gains = first - second

    def statistics(weights: Floats) -> dict[str, Floats]:
        return {"mean": weights @ gains / weights.sum(axis=1)}

    return _difference(PatientBootstrap(patients, resamples, seed).values(statistics)["mean"])


def _difference(values: Floats) -> PairedDifference:
    """Return the difference, interval and p-value from a difference and its resamples, [1 + resamples]."""
    drawn = values[1:][np.isfinite(values[1:])]
    minimum = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * float(minimum + 1) / (len(drawn) + 1)) if len(drawn) else float("nan")
    known = interval(values)
    return PairedDifference(known.value, known.low, known.high, p)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple testing; NaN values are kept and not counted.

    Source: Holm, Scand. J. Statist. 1979.
    """
    known = [number for number, value in enumerate(p) if np.isfinite(value)]
    adjusted, highest = list(p), 0.0
    for place, number in enumerate(sorted(known, key=lambda number: p[number])):
        highest = max(highest, min(1.0, (len(known) - place) * p[number]))
        adjusted[number] = highest
    return adjusted


def compare_predictions(
    first: pl.DataFrame, second: pl.DataFrame, thresholds: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    """Compare two models on the photos on which both were measured.

    Args:
        first: predictions of `Measured`, as `evaluate` writes them.
        second: the same for the second model.
        thresholds: thresholds of the first and second model by output.

    Returns:
        Plain data: `photos`, the number of shared photos; `left_out`, the number of photos that only one model has; and
        `labels`, the differences (first minus second) by output. Areas also have `p_holm`, the p-value adjusted for the
        number of outputs.

    Raises:
        DataError: the runs share no photo or no output, or their labels of a photo differ.
    """
    both = first.join(second, on=["path", "sha256"], how="inner", suffix="_second")
    if not len(both):
        raise DataError("the two runs were not measured on any common photo; evaluate both on the same cache")
    counts = {"photos": len(both), "left_out": len(first) + len(second) - 2 * len(both)}
    if "dice" in first.columns and "dice" in second.columns:
        return counts | {"labels": {"vessel": _vessels(both)}}
    outputs = [name for name in thresholds if {f"p_{name}", f"p_{name}_second"} <= set(both.columns)]
    if not outputs:
        raise DataError(f"the two runs have no output in common; the first has {', '.join(thresholds)}")
    by_output: dict[str, dict[str, Any]] = {}
    for name in outputs:
        label, other = both[f"label_{name}"], both[f"label_{name}_second"]
        differing = both.filter((label != other) & label.is_not_null() & other.is_not_null())
        if len(differing):
            raise DataError(
                f"{len(differing)} photos have different values of {name} in the two runs, such as "
                f"{differing['path'][0]}; check the label files of both"
            )
        known = both.filter(label.is_not_null())
        truth, patients = known[f"label_{name}"].to_numpy().astype(np.float64), known["patient"].to_list()
        scores = [known[column].to_numpy() for column in (f"p_{name}", f"p_{name}_second")]
        calls = [values >= threshold for values, threshold in zip(scores, thresholds[name], strict=True)]
        area = compare_areas(scores[0], scores[1], truth, patients)
        rates = compare_rates(calls[0], calls[1], truth, patients)
        by_output[name] = {"auroc": area.to_dict(), **{key: value.to_dict() for key, value in rates.items()}}
    values = [entry["auroc"]["p"] for entry in by_output.values()]
    adjusted = holm([float("nan") if p is None else p for p in values])
    for entry, p in zip(by_output.values(), adjusted, strict=True):
        entry["auroc"]["p_holm"] = p if np.isfinite(p) else None
    return counts | {"labels": by_output}


def _vessels(both: pl.DataFrame) -> dict[str, Any]:
    found = {}
    for name in VESSEL_FIGURES:
        known = both.filter(pl.col(name).is_finite() & pl.col(f"{name}_second").is_finite())
        values = known[name].to_numpy(), known[f"{name}_second"].to_numpy()
        found[name] = compare_means(*values, known["patient"].to_list()).to_dict()
    return found
