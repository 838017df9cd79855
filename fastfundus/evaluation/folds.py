"""Pooling of cross-validation folds: every photo is tested once, by a model that has not seen its patient.

out_of_fold.parquet  path, sha256, patient, label_<output>, p_<output>, fold, threshold_<output>; vessels: dice,
                     cldice, auroc
folds.json           metrics of each fold on its test patients, their mean and standard deviation, and pooled metrics
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from fastfundus.data.cache import PhotoCache
from fastfundus.errors import CheckpointError
from fastfundus.evaluation.locked_run import read_operating_point
from fastfundus.evaluation.metrics import binary_metrics, overall_metrics
from fastfundus.evaluation.operating_point import measure
from fastfundus.evaluation.segmentation import vessel_means
from fastfundus.files import atomic_write
from fastfundus.training.run import Run

__all__ = ["pool_folds"]

SCHEMA = 2


def pool_folds(output: Path, runs: Sequence[Run], cache: PhotoCache) -> dict[str, Any]:
    """Measure each fold on its test patients and all folds pooled; write both files into `output`.

    Each fold decides by its own threshold, locked on its validation patients. Pooled AUROC compares scores of different
    models, so it is slightly lower than the mean over folds when these are calibrated differently.

    Args:
        output: folder of the cross-validation.
        runs: one run per fold, in order.
        cache: cache that the runs were trained on.

    Returns:
        The content of folds.json.

    Raises:
        CheckpointError: a photo is in the test split of two folds, or the folds have different outputs.
    """
    task, outputs = runs[0].config.task, runs[0].labels
    parts, by_fold = [], []
    for fold, run in enumerate(runs):
        if run.labels != outputs:
            raise CheckpointError(f"{run.path} has outputs {run.labels}, {runs[0].path} {outputs}; train both again")
        measured = measure(run, cache)
        by_fold.append(measured.to_dict())
        points = read_operating_point(run)["labels"]
        thresholds = {f"threshold_{name}": pl.lit(points[name]["threshold"]) for name in outputs}
        parts.append(measured.predictions.with_columns(fold=pl.lit(fold), **thresholds))
    pooled = pl.concat(parts)
    twice = pooled.filter(pl.col("path").is_duplicated())["path"]
    if len(twice):
        raise CheckpointError(f"{output}: {twice[0]} is a test photo of two folds; train all with the same --folds")
    document = {
        "schema": SCHEMA,
        "task": task,
        "folds": by_fold,
        "mean_and_sd": {
            **{name: _spread([entry["labels"][name] for entry in by_fold]) for name in outputs},
            "overall": _spread([entry["overall"] for entry in by_fold]),
        },
        "out_of_fold": _vessels_together(pooled) if task == "vessels" else _together(task, outputs, pooled),
    }
    pooled.write_parquet(output / "out_of_fold.parquet")
    with atomic_write(output / "folds.json") as partial:
        partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def _spread(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of every metric over the folds in which it can be estimated."""
    result = {}
    for name in (key for key, value in entries[0].items() if isinstance(value, dict)):
        values = [entry[name]["value"] for entry in entries if entry[name]["value"] is not None]
        if len(values) > 1:
            result[name] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
    return result


def _together(task: str, outputs: Sequence[str], pooled: pl.DataFrame) -> dict[str, Any]:
    labels = {}
    for name in outputs:
        known = pooled.filter(pl.col(f"label_{name}").is_not_null())
        labels[name] = binary_metrics(
            known[f"p_{name}"].to_numpy(),
            known[f"label_{name}"].to_numpy(),
            known["patient"].to_list(),
            known[f"threshold_{name}"].to_numpy(),
        ).to_dict()
    probabilities = pooled.select(f"p_{name}" for name in outputs).to_numpy()
    truth = pooled.select(pl.col(f"label_{name}").fill_null(float("nan")) for name in outputs).to_numpy()
    overall = overall_metrics(task, probabilities, truth, pooled["patient"].to_list())
    return {"labels": labels, "overall": {name: value.to_dict() for name, value in overall.items()}}


def _vessels_together(pooled: pl.DataFrame) -> dict[str, Any]:
    counts = {"photos": len(pooled), "patients": pooled["patient"].n_unique()}
    return {"labels": {"vessel": counts | vessel_means(pooled)}, "overall": {}}
