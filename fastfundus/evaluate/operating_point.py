"""Temperature and threshold, fitted on validation and locked; then measured on test.

operating_point.json   schema, and by label: temperature, threshold, the target it was chosen for, metrics of
                       validation and test
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import CheckpointError, DataError
from fastfundus.evaluate.metrics import BinaryMetrics, binary_metrics
from fastfundus.train.run import Run
from fastfundus.train.step import predict_logits
from fastfundus.train.targets import abnormality_targets, usable_rows

__all__ = ["OperatingPoint", "fit_operating_point", "fit_temperature", "measure", "read_operating_point"]

SCHEMA = 1
_FILE = "operating_point.json"


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """How a logit becomes a probability and a decision."""

    temperature: float
    """probability = sigmoid(logit / temperature)"""
    threshold: float
    """Positive at or above this probability."""
    target_sensitivity: float
    """The threshold is the largest that reaches this sensitivity on validation."""


def fit_temperature(logits: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    """Find the temperature, 0.05 to 20, with the smallest log loss.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean(np.logaddexp(0, scaled) - labels * scaled))

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(best.x))


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -values))


def _threshold(probabilities: NDArray[np.float64], labels: NDArray[np.float64], target: float) -> float:
    """Largest threshold that calls at least `target` of the positives; halfway to the next lower score."""
    positive = np.sort(probabilities[labels == 1])[::-1]
    needed = positive[int(np.ceil(target * len(positive))) - 1]
    lower = probabilities[probabilities < needed]
    # Halfway between two scores, so that rounding in another runtime does not flip the photo that set the threshold; to
    # zero below the lowest of all.
    return float((needed + (lower.max() if len(lower) else 0.0)) / 2)


def fit_operating_point(run: Run, cache: PhotoCache, *, target_sensitivity: float = 0.90) -> dict[str, Any]:
    """Fit on the validation patients, measure on the test patients, write `operating_point.json` into the run.

    Returns:
        The written document.

    Raises:
        SpecMismatch, CheckpointError: the cache is not the run's.
    """
    splits = _rows_by_split(run, cache)
    targets, _ = abnormality_targets(cache.manifest, run.config.data.label)
    model = run.load_model()
    logits = {
        name: predict_logits(model, cache.photos, rows, cache.spec)[:, 0].astype(np.float64)
        for name, rows in splits.items()
    }
    temperature = fit_temperature(logits["val"], targets[splits["val"]])
    probabilities = {name: _sigmoid(values / temperature) for name, values in logits.items()}
    point = OperatingPoint(
        temperature, _threshold(probabilities["val"], targets[splits["val"]], target_sensitivity), target_sensitivity
    )
    patients = cache.manifest["patient"].to_numpy()
    results = {
        name: binary_metrics(probabilities[name], targets[rows], patients[rows].tolist(), point.threshold).to_dict()
        for name, rows in splits.items()
    }
    document = {
        "schema": SCHEMA,
        "labels": {
            run.labels[0]: {
                "temperature": point.temperature,
                "threshold": point.threshold,
                "target_sensitivity": point.target_sensitivity,
                "validation": results["val"],
                "test": results["test"],
            }
        },
    }
    (run.path / _FILE).write_text(json.dumps(document, indent=1) + "\n")
    return document


def _rows_by_split(run: Run, cache: PhotoCache) -> dict[str, NDArray[np.int64]]:
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


def measure(run: Run, cache: PhotoCache) -> tuple[BinaryMetrics, pl.DataFrame, str]:
    """Apply a run, as locked, to photos it has not learned from.

    On the run's own cache these are its test patients; on another, every usable photo whose bytes were not in the run's
    training or validation.

    Returns:
        Metrics, predictions (path, sha256, patient, label, p_<label>), and in words which photos they are of.
    """
    cache.spec.require_same(run.spec, mine=f"the cache {cache.path}", theirs=f"the run {run.path}")
    point = read_operating_point(run)["labels"][run.labels[0]]
    splits = pl.read_parquet(run.path / "splits.parquet")
    targets, _ = abnormality_targets(cache.manifest, run.config.data.label)
    if cache.path.absolute() == run.cache:
        rows, which = _rows_by_split(run, cache)["test"], "test patients"
    else:
        seen = set(splits.filter(pl.col("split").is_in(["train", "val"]))["sha256"])
        usable = usable_rows(cache.manifest, targets)
        hashes = cache.manifest["sha256"].to_list()
        rows = np.array([row for row in usable if hashes[row] not in seen], dtype=np.int64)
        which = f"external photos ({len(usable) - len(rows)} left out: the run learned from them)"
    if len(set(targets[rows].tolist())) < 2:
        raise DataError("the photos to evaluate do not show both classes; add photos", path=cache.path)
    logits = predict_logits(run.load_model(), cache.photos, rows, cache.spec)[:, 0].astype(np.float64)
    probabilities = _sigmoid(logits / point["temperature"])
    part = cache.manifest[rows].select("path", "sha256", "patient")
    predictions = part.with_columns(label=pl.Series(targets[rows]), **{f"p_{run.labels[0]}": pl.Series(probabilities)})
    metrics = binary_metrics(probabilities, targets[rows], part["patient"].to_list(), point["threshold"])
    return metrics, predictions, which
