"""Operating points of runs that output probabilities: fitted on validation, locked, then measured on test."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import DataError
from fastfundus.evaluation.guard import fit_guard
from fastfundus.evaluation.label_map import LabelMap
from fastfundus.evaluation.locked_run import (
    Measured,
    read_operating_point,
    rows_by_split,
    rows_to_measure,
    write_operating_point,
)
from fastfundus.evaluation.metrics import binary_metrics, overall_metrics
from fastfundus.evaluation.thresholds import fit_temperatures, fit_threshold, threshold_entry
from fastfundus.models.activation import ACTIVATIONS, probabilities
from fastfundus.training.predict import inference_device, predict_logits
from fastfundus.training.run import Run
from fastfundus.training.tasks.targets import Targets, both_classes, finding_outputs, read_targets, usable_rows

__all__ = ["fit_classification", "measure_classification"]

_WITHOUT_POSITIVES = 0.5


def fit_classification(
    run: Run, cache: PhotoCache, *, target_sensitivity: float = 0.90, target_specificity: float | None = None
) -> dict[str, Any]:
    """Fit temperatures and thresholds of a run that outputs probabilities; see `fit_operating_point`."""
    sides = rows_by_split(run, cache)
    kind = ACTIVATIONS[run.config.task]
    targets = read_targets(cache.manifest, run.config.task, run.config.data.labels, run.labels)
    model = run.load_model().to(inference_device())
    logits = {
        name: predict_logits(model, cache.photos, rows, run.spec).astype(np.float64) for name, rows in sides.items()
    }
    val = targets.truth[sides["val"]]
    patients = cache.manifest["patient"].gather(sides["val"]).to_numpy()
    temperatures = fit_temperatures(logits["val"], val, kind)
    predicted = {name: probabilities(values / np.array(temperatures), kind) for name, values in logits.items()}
    findings = finding_outputs(run.labels, run.config.data.findings)
    labels: dict[str, dict[str, Any]] = {}
    of: Literal["sensitivity", "specificity"]
    if target_specificity is None:
        of, target, counted = "sensitivity", target_sensitivity, 1
    else:
        of, target, counted = "specificity", target_specificity, 0
    for number, name in enumerate(run.labels):
        known = np.isfinite(val[:, number])
        truth = val[known, number]
        point: dict[str, Any] = {
            "temperature": temperatures[number],
            "finding": name in findings,
            "threshold": _WITHOUT_POSITIVES,
            "threshold_low": None,
            "threshold_high": None,
            "target_sensitivity": None,
            "target_specificity": None,
            "note": f"no validation photo is labelled {('negative', 'positive')[counted]}, so the threshold is not "
            "fitted",
        }
        if (truth == counted).any():
            found = fit_threshold(predicted["val"][known, number], truth, patients[known].tolist(), target, of)
            point |= {**threshold_entry(found), f"target_{of}": target, "note": None}
        labels[name] = point
    thresholds = [entry["threshold"] for entry in labels.values()]
    measured = {
        name: _measured(run, cache, rows, predicted[name], targets, thresholds, name) for name, rows in sides.items()
    }
    guard = fit_guard(run, cache, model, sides["val"])
    return write_operating_point(run, labels, measured, guard)


def _predictions(
    manifest: pl.DataFrame, outputs: tuple[str, ...], truth: NDArray[np.float64], predicted: NDArray[np.float64]
) -> pl.DataFrame:
    """Return a table of path, sha256, patient, label_<output> and p_<output>; unknown labels are null."""
    known = [pl.Series(f"label_{name}", truth[:, n], nan_to_null=True) for n, name in enumerate(outputs)]
    given = [pl.Series(f"p_{name}", predicted[:, n]) for n, name in enumerate(outputs)]
    return manifest.select("path", "sha256", "patient").with_columns(*known, *given)


def _measured(
    run: Run,
    cache: PhotoCache,
    rows: NDArray[np.int64],
    predicted: NDArray[np.float64],
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
            predicted[known, number],
            truth[known, number],
            patients[known].tolist(),
            thresholds[number],
            prevalence=prevalence,
        ).to_dict()
    overall = overall_metrics(run.config.task, predicted, truth, patients.tolist())
    table = _predictions(part, run.labels, truth, predicted)
    return Measured(labels, {name: value.to_dict() for name, value in overall.items()}, table, which)


def measure_classification(
    run: Run, cache: PhotoCache, *, prevalence: float | None = None, label_map: LabelMap | None = None
) -> Measured:
    """Measure a run that outputs probabilities; see `measure`."""
    points = read_operating_point(run)["labels"]
    if label_map is None:
        targets = read_targets(cache.manifest, run.config.task, run.config.data.labels, run.labels)
    else:
        targets = label_map.targets(cache.manifest, run.labels)
    rows, which = rows_to_measure(run, cache, usable_rows(cache.manifest, targets))
    if not any(both_classes(column) for column in targets.truth[rows].T):
        raise DataError("no output has both classes in the photos to evaluate; add photos", path=cache.path)
    temperatures = np.array([points[name]["temperature"] for name in run.labels])
    logits = predict_logits(run.load_model().to(inference_device()), cache.photos, rows, run.spec).astype(np.float64)
    predicted = probabilities(logits / temperatures, ACTIVATIONS[run.config.task])
    thresholds = [points[name]["threshold"] for name in run.labels]
    return _measured(run, cache, rows, predicted, targets, thresholds, which, prevalence)
