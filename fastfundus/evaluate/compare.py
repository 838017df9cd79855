"""Two models on the same photos: differences with intervals and p-values that know of patients.

The areas under the ROC curve are compared by DeLong's method (Biometrics 1988) in Obuchowski's form for clustered data
(Biometrics 1997): with one photo a patient the two are the same. Everything else is compared by drawing patients.
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
from fastfundus.evaluate.bootstrap import Floats, PatientBootstrap, interval
from fastfundus.evaluate.vessels import VESSEL_FIGURES

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
    """Two-sided, of no difference."""

    def to_dict(self) -> dict[str, float | None]:
        """Return plain data for JSON; None stands for NaN."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}


def area_covariance(scores: Floats, labels: Floats, patients: Sequence[str]) -> tuple[Floats, Floats]:
    """Areas under the ROC curves of several models on the same photos, and the covariance of their estimates.

    Args:
        scores: [M, N] by model.
        labels: [N] 0 or 1.
        patients: [N] who each photo is of.

    Returns:
        [M] areas and [M, M] covariances; NaN where a class is absent, or all of its photos are of one patient.
    """
    models = len(scores)
    positive, negative = labels == 1, labels == 0
    m, n = int(positive.sum()), int(negative.sum())
    if not m or not n:
        return np.full(models, np.nan), np.full((models, models), np.nan)
    # How much of the area each photo gives: of a positive, the share of negatives it lies above, ties counting half.
    all_ranks = np.stack([rankdata(row) for row in scores])
    above = (all_ranks[:, positive] - np.stack([rankdata(row[positive]) for row in scores])) / n
    below = 1 - (all_ranks[:, negative] - np.stack([rankdata(row[negative]) for row in scores])) / m
    areas = above.mean(axis=1)
    _, cluster = np.unique(np.asarray(patients), return_inverse=True)
    count = int(cluster.max()) + 1
    # Deviations, summed over the photos of each patient: [M, patients].
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
        first: [N] scores.
        second: [N] scores.
        labels: [N] 0 or 1.
        patients: [N] who each photo is of.
        strata: [N] sets of different patients, such as folds, whose scores are of different models and must not be
            ranked together: areas are taken within each, and averaged over those that hold both classes. None is one.
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
    # Of few patients the error itself is known badly: Student's t, with what the rarer class leaves of freedom.
    student = t(max(freedom, 1))
    # Equal scores differ by nothing, and surely.
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
    """Compare `sensitivity` and `specificity` of two models' calls on the same photos.

    The p-value is twice the smaller share of resamples on one side of nothing, at least one of them counted.

    Args:
        first: [N] photos called positive.
        second: likewise.
        labels: [N] 0 or 1.
        patients: [N] who each photo is of.
        resamples: bootstrap sets.
        seed: of the resampling.
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
    """Compare the means of one value a photo, [N] each, such as its Dice; p-values as for `compare_rates`."""
    gains = first - second

    def statistics(weights: Floats) -> dict[str, Floats]:
        return {"mean": weights @ gains / weights.sum(axis=1)}

    return _difference(PatientBootstrap(patients, resamples, seed).values(statistics)["mean"])


def _difference(values: Floats) -> PairedDifference:
    """From a difference and its resamples."""
    drawn = values[1:][np.isfinite(values[1:])]
    least = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * float(least + 1) / (len(drawn) + 1)) if len(drawn) else float("nan")
    known = interval(values)
    return PairedDifference(known.value, known.low, known.high, p)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for how many there are; NaN stay, and do not count. Source: Holm, Scand. J. Statist. 1979."""
    known = [number for number, value in enumerate(p) if np.isfinite(value)]
    adjusted, highest = list(p), 0.0
    for place, number in enumerate(sorted(known, key=lambda number: p[number])):
        highest = max(highest, min(1.0, (len(known) - place) * p[number]))
        adjusted[number] = highest
    return adjusted


def compare_predictions(
    first: pl.DataFrame, second: pl.DataFrame, thresholds: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    """Compare two models on the photos that both were measured on.

    Args:
        first: predictions of `Measured`, as `evaluate` writes them.
        second: likewise.
        thresholds: of each output, the first's and the second's.

    Returns:
        `photos` that both have and `left_out` that one has; by output the differences first minus second, plain data;
        p-values of the areas also adjusted for the number of outputs, `p_holm`.

    Raises:
        DataError: they share no photo, no output, or differ on what a photo shows.
    """
    both = first.join(second, on=["path", "sha256"], how="inner", suffix="_second")
    if not len(both):
        raise DataError("the two runs were measured on no common photo; evaluate them on one cache")
    about = {"photos": len(both), "left_out": len(first) + len(second) - 2 * len(both)}
    if "dice" in first.columns and "dice" in second.columns:
        return about | {"labels": {"vessel": _vessels(both)}}
    outputs = [name for name in thresholds if {f"p_{name}", f"p_{name}_second"} <= set(both.columns)]
    if not outputs:
        raise DataError(f"the two runs share no output; the first has {', '.join(thresholds)}")
    by_output: dict[str, dict[str, Any]] = {}
    for name in outputs:
        label, other = both[f"label_{name}"], both[f"label_{name}_second"]
        differing = both.filter((label != other) & label.is_not_null() & other.is_not_null())
        if len(differing):
            raise DataError(
                f"{len(differing)} photos have another {name} in one run than in the other, such as "
                f"{differing['path'][0]}; their label files disagree"
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
    return about | {"labels": by_output}


def _vessels(both: pl.DataFrame) -> dict[str, Any]:
    found = {}
    for name in VESSEL_FIGURES:
        known = both.filter(pl.col(name).is_finite() & pl.col(f"{name}_second").is_finite())
        values = known[name].to_numpy(), known[f"{name}_second"].to_numpy()
        found[name] = compare_means(*values, known["patient"].to_list()).to_dict()
    return found
