"""Validation scores: fast point estimates for each task."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from fastfundus.train.targets import both_classes, grades

__all__ = ["mean_auroc", "scores_of"]


def mean_auroc(chances: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Return the mean AUROC of the outputs, each over the photos with a known label.

    Args:
        chances: [N, L] probabilities.
        truth: [N, L] ground truth: 0, 1, or NaN for unknown labels.

    Returns:
        Mean over the outputs that have both classes; NaN if there are none.
    """
    values = []
    for column, known in zip(chances.T, truth.T, strict=True):
        usable = np.isfinite(known)
        if both_classes(known):
            values.append(float(roc_auc_score(known[usable], column[usable])))
    return float(np.mean(values)) if values else float("nan")


def scores_of(task: str, chances: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float]:
    """Return the scores of probabilities [N, L] against ground truth [N, L], by name."""
    area = mean_auroc(chances, truth)
    if task == "multiclass":
        right = (chances.argmax(axis=1) == truth.argmax(axis=1)).mean()
        return {"auroc": area, "accuracy": float(right)}
    if task == "ordinal":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # with a single grade, kappa is NaN and sklearn warns
            agreement = cohen_kappa_score(
                grades(truth), grades(chances >= 0.5), labels=np.arange(truth.shape[1] + 1), weights="quadratic"
            )
        return {"qwk": float(agreement), "auroc": area}
    return {"auroc": area}
