"""Temperature and threshold, fitted on validation and locked; then measured on test.

operating_point.json   schema, task, and by output: temperature, threshold, the target it was chosen for, metrics of
                       validation and test; `overall`, metrics of all outputs together
predictions.parquet    what every photo of validation and test was given
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import CheckpointError, DataError
from fastfundus.evaluate.metrics import binary_metrics, overall_metrics
from fastfundus.models.activation import ACTIVATIONS, Activation, probabilities
from fastfundus.train.loss import LOSSES
from fastfundus.train.run import Run
from fastfundus.train.step import predict_logits
from fastfundus.train.targets import Targets, both_classes, finding_outputs, read_targets, usable_rows

__all__ = [
    "Measured", "fit_operating_point", "fit_temperature", "measure", "read_operating_point",
    "rows_by_split", "rows_to_measure", "write_operating_point",
]  # fmt: skip

SCHEMA = 2
_FILE = "operating_point.json"
_WITHOUT_POSITIVES = 0.5


@dataclass(frozen=True, slots=True)
class Measured:
    """A run, as locked, on photos it has not learned from."""

    labels: dict[str, dict[str, Any]]
    """Metrics by output, plain data."""
    overall: dict[str, dict[str, Any]]
    """Of all outputs together."""
    predictions: pl.DataFrame
    """path, sha256, patient, label_<output>, p_<output>."""
    which: str
    """In words, which photos."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"photos": self.which, "labels": self.labels, "overall": self.overall}


def fit_temperature(logits: NDArray[np.float64], truth: NDArray[np.float64], kind: Activation = "sigmoid") -> float:
    """Find the temperature, 0.05 to 20, by which logits [N, L] are divided for the smallest log loss.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    scores, wanted = torch.from_numpy(logits), torch.from_numpy(truth)

    def loss(log_temperature: float) -> float:
        return float(LOSSES[kind](scores / float(np.exp(log_temperature)), wanted))

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(best.x))


def _temperatures(logits: NDArray[np.float64], truth: NDArray[np.float64], kind: Activation) -> list[float]:
    """One an output where outputs are apart, one for all where they share a probability."""
    if kind != "sigmoid":
        return [fit_temperature(logits, truth, kind)] * logits.shape[1]
    return [
        fit_temperature(logits[:, [output]], truth[:, [output]]) if both_classes(truth[:, output]) else 1.0
        for output in range(logits.shape[1])
    ]


def _threshold(chances: NDArray[np.float64], labels: NDArray[np.float64], target: float) -> float:
    """Largest threshold that calls at least `target` of the positives; halfway to the next lower score."""
    positive = np.sort(chances[labels == 1])[::-1]
    needed = positive[int(np.ceil(target * len(positive))) - 1]
    lower = chances[chances < needed]
    # Halfway between two scores, so that rounding in another runtime does not flip the photo that set the threshold; to
    # zero below the lowest of all.
    return float((needed + (lower.max() if len(lower) else 0.0)) / 2)


def _threshold_by_negatives(chances: NDArray[np.float64], labels: NDArray[np.float64], target: float) -> float:
    """Smallest threshold that spares at least `target` of the negatives; halfway to the next lower score."""
    negative = np.sort(chances[labels == 0])
    spared = negative[int(np.ceil(target * len(negative))) - 1]
    higher = chances[chances > spared]
    return float((spared + (higher.min() if len(higher) else 1.0)) / 2)


def fit_operating_point(
    run: Run, cache: PhotoCache, *, target_sensitivity: float = 0.90, target_specificity: float | None = None
) -> dict[str, Any]:
    """Fit on the validation patients, measure on the test patients, write both files into the run.

    Args:
        run: finished.
        cache: its own.
        target_sensitivity: that each threshold reaches on validation, 0 to 1.
        target_specificity: the same of specificity, and then in place of sensitivity.

    Returns:
        The content of operating_point.json.

    Raises:
        SpecMismatch, CheckpointError: the cache is not the run's.
    """
    sides = rows_by_split(run, cache)
    kind = ACTIVATIONS[run.config.task]
    targets = read_targets(cache.manifest, run.config.task, run.config.data.labels, run.labels)
    model = run.load_model()
    logits = {
        name: predict_logits(model, cache.photos, rows, cache.spec).astype(np.float64) for name, rows in sides.items()
    }
    val = targets.truth[sides["val"]]
    temperatures = _temperatures(logits["val"], val, kind)
    chances = {name: probabilities(values / np.array(temperatures), kind) for name, values in logits.items()}
    findings = finding_outputs(run.labels, run.config.data.findings)
    labels: dict[str, dict[str, Any]] = {}
    lacking = "positive" if target_specificity is None else "negative"
    for number, name in enumerate(run.labels):
        known = np.isfinite(val[:, number])
        scores, truth = chances["val"][known, number], val[known, number]
        point: dict[str, Any] = {
            "temperature": temperatures[number],
            "finding": name in findings,
            "threshold": _WITHOUT_POSITIVES,
            "target_sensitivity": None,
            "target_specificity": None,
            "note": f"no validation photo is known to be {lacking}: the threshold is not fitted",
        }
        if target_specificity is not None and (truth == 0).any():
            threshold = _threshold_by_negatives(scores, truth, target_specificity)
            point |= {"threshold": threshold, "target_specificity": target_specificity, "note": None}
        elif target_specificity is None and (truth == 1).any():
            threshold = _threshold(scores, truth, target_sensitivity)
            point |= {"threshold": threshold, "target_sensitivity": target_sensitivity, "note": None}
        labels[name] = point
    thresholds = [entry["threshold"] for entry in labels.values()]
    measured = {
        name: _measured(run, cache, rows, chances[name], targets, thresholds, name) for name, rows in sides.items()
    }
    return write_operating_point(run, labels, measured)


def write_operating_point(run: Run, points: dict[str, dict[str, Any]], measured: dict[str, Measured]) -> dict[str, Any]:
    """Write `operating_point.json` and `predictions.parquet`.

    Args:
        run: where to.
        points: what was fitted, by output.
        measured: what "val" and "test" then gave.

    Returns:
        The content of operating_point.json.
    """
    sides = {"validation": measured["val"], "test": measured["test"]}
    labels = {
        name: point | {side: entry.labels[name] for side, entry in sides.items()} for name, point in points.items()
    }
    overall = {side: entry.overall for side, entry in sides.items()}
    document = {"schema": SCHEMA, "task": run.config.task, "labels": labels, "overall": overall}
    parts = [entry.predictions.with_columns(split=pl.lit(name)) for name, entry in measured.items()]
    pl.concat(parts).write_parquet(run.path / "predictions.parquet")
    (run.path / _FILE).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def _predictions(
    manifest: pl.DataFrame, outputs: tuple[str, ...], truth: NDArray[np.float64], chances: NDArray[np.float64]
) -> pl.DataFrame:
    """A table of path, sha256, patient, label_<output> and p_<output>; a label that is not known is null."""
    known = [pl.Series(f"label_{name}", truth[:, n], nan_to_null=True) for n, name in enumerate(outputs)]
    given = [pl.Series(f"p_{name}", chances[:, n]) for n, name in enumerate(outputs)]
    return manifest.select("path", "sha256", "patient").with_columns(*known, *given)


def _measured(
    run: Run,
    cache: PhotoCache,
    rows: NDArray[np.int64],
    chances: NDArray[np.float64],
    targets: Targets,
    thresholds: list[float],
    which: str,
    prevalence: float | None = None,
) -> Measured:
    part, truth = cache.manifest[rows], targets.truth[rows]
    patients = part["patient"].to_numpy()
    labels = {}
    for number, name in enumerate(run.labels):
        known = np.isfinite(truth[:, number])
        labels[name] = binary_metrics(
            chances[known, number],
            truth[known, number],
            patients[known].tolist(),
            thresholds[number],
            prevalence=prevalence,
        ).to_dict()
    overall = overall_metrics(run.config.task, chances, truth, patients.tolist())
    table = _predictions(part, run.labels, truth, chances)
    return Measured(labels, {name: value.to_dict() for name, value in overall.items()}, table, which)


def rows_by_split(run: Run, cache: PhotoCache) -> dict[str, NDArray[np.int64]]:
    """Rows of the run's validation and test photos in its cache."""
    cache.spec.require_same(run.spec, mine=f"the cache {cache.path}", theirs=f"the run {run.path}")
    splits = pl.read_parquet(run.path / "splits.parquet")
    place = {(path, sha): row for row, (path, sha) in enumerate(cache.manifest.select("path", "sha256").iter_rows())}
    result = {}
    for name in ("val", "test"):
        keys = splits.filter(pl.col("split") == name).select("path", "sha256").rows()
        missing = [key for key in keys if key not in place]
        if missing:
            raise CheckpointError(
                f"{run.path}: its {name} photo {missing[0][0]} is not in {cache.path}; give its own cache"
            )
        result[name] = np.array([place[key] for key in keys], dtype=np.int64)
    return result


def read_operating_point(run: Run) -> dict[str, Any]:
    """Read `operating_point.json`.

    Raises:
        CheckpointError: the run has none.
    """
    try:
        document: dict[str, Any] = json.loads((run.path / _FILE).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{run.path}: has no {_FILE}; finish the run: fastfundus train ... --resume") from None
    return document


def rows_to_measure(run: Run, cache: PhotoCache, usable: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    """Photos that a run has not learned from: its test patients, or of other caches all whose bytes it has not seen.

    Args:
        run: what is to be measured.
        cache: its own, or another.
        usable: rows of the cache that are labelled.

    Returns:
        Rows, and in words which they are.
    """
    cache.spec.require_same(run.spec, mine=f"the cache {cache.path}", theirs=f"the run {run.path}")
    if tuple(path.absolute() for path in cache.paths) == run.caches:
        return rows_by_split(run, cache)["test"], "test patients"
    splits = pl.read_parquet(run.path / "splits.parquet")
    seen = set(splits.filter(pl.col("split").is_in(["train", "val"]))["sha256"])
    hashes = cache.manifest["sha256"].to_list()
    rows = np.array([row for row in usable if hashes[row] not in seen], dtype=np.int64)
    return rows, f"external photos ({len(usable) - len(rows)} left out: the run learned from them)"


def measure(run: Run, cache: PhotoCache, *, prevalence: float | None = None) -> Measured:
    """Apply a run, as locked, to photos it has not learned from.

    Args:
        run: finished.
        cache: its own, of which its test patients are taken, or another.
        prevalence: as for `binary_metrics`.

    Raises:
        DataError: the photos show one class only.
    """
    points = read_operating_point(run)["labels"]
    targets = read_targets(cache.manifest, run.config.task, run.config.data.labels, run.labels)
    rows, which = rows_to_measure(run, cache, usable_rows(cache.manifest, targets))
    if not any(both_classes(column) for column in targets.truth[rows].T):
        raise DataError("the photos to evaluate do not show both classes; add photos", path=cache.path)
    temperatures = np.array([points[name]["temperature"] for name in run.labels])
    logits = predict_logits(run.load_model(), cache.photos, rows, cache.spec).astype(np.float64)
    chances = probabilities(logits / temperatures, ACTIVATIONS[run.config.task])
    thresholds = [points[name]["threshold"] for name in run.labels]
    return _measured(run, cache, rows, chances, targets, thresholds, which, prevalence)
