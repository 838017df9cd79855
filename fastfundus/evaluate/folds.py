"""Pools the folds of a cross-validation: every photo is tested once, by the model that has not seen its patient.

out_of_fold.parquet  path, sha256, patient, label, p_<label>, fold, threshold
folds.json           metrics by fold on its test patients, their mean and standard deviation, and of all together
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
from fastfundus.evaluate.metrics import binary_metrics
from fastfundus.evaluate.operating_point import measure, read_operating_point
from fastfundus.train.run import Run

__all__ = ["pool_folds"]

SCHEMA = 1


def pool_folds(output: Path, runs: Sequence[Run], cache: PhotoCache) -> dict[str, Any]:
    """Measure each fold on its test patients and all of them together; write both files into `output`.

    Decisions are each fold's own, by the threshold that its validation patients locked. Pooled AUROC compares scores of
    different models: it is a little lower than the mean of the folds when these are calibrated differently.

    Args:
        output: folder of the cross-validation.
        runs: one a fold, in order.
        cache: that they were trained on.

    Returns:
        The content of folds.json.

    Raises:
        CheckpointError: a photo is in the test part of two folds.
    """
    label = runs[0].labels[0]
    parts, by_fold = [], []
    for fold, run in enumerate(runs):
        metrics, predictions, _ = measure(run, cache)
        by_fold.append(metrics.to_dict())
        threshold = read_operating_point(run)["labels"][label]["threshold"]
        parts.append(predictions.with_columns(fold=pl.lit(fold), threshold=pl.lit(threshold)))
    pooled = pl.concat(parts)
    twice = pooled.filter(pl.col("path").is_duplicated())["path"]
    if len(twice):
        raise CheckpointError(f"{output}: {twice[0]} is tested by two folds; train all of them with one --folds")
    together = binary_metrics(
        pooled[f"p_{label}"].to_numpy(),
        pooled["label"].to_numpy(),
        pooled["patient"].to_list(),
        pooled["threshold"].to_numpy(),
    )
    spread = {
        name: {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        for name in ("auroc", "sensitivity", "specificity")
        for values in [[entry[name]["value"] for entry in by_fold]]
    }
    document = {
        "schema": SCHEMA,
        "label": label,
        "folds": by_fold,
        "mean_and_sd": spread,
        "out_of_fold": together.to_dict(),
    }
    pooled.write_parquet(output / "out_of_fold.parquet")
    (output / "folds.json").write_text(json.dumps(document, indent=1) + "\n")
    return document
