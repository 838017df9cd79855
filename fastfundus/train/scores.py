"""Scores of validation: quick point estimates, by task."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from fastfundus.train.targets import both_classes, grades

__all__ = ["mean_auroc", "scores_of"]


def mean_auroc(chances: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """AUROC of each output among the photos of which it is known, averaged; outputs without both classes are left out.

    Args:
        chances: [N, L].
        truth: [N, L] 0, 1 or NaN.

    Returns:
        NaN where no output has both classes.
    """
    values = []
    for column, known in zip(chances.T, truth.T, strict=True):
        usable = np.isfinite(known)
        if both_classes(known):
            values.append(float(roc_auc_score(known[usable], column[usable])))
    return float(np.mean(values)) if values else float("nan")


def scores_of(task: str, chances: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float]:
    """Score probabilities [N, L] against truth [N, L]."""
    area = mean_auroc(chances, truth)
    if task == "multiclass":
        right = (chances.argmax(axis=1) == truth.argmax(axis=1)).mean()
        return {"auroc": area, "accuracy": float(right)}
    if task == "ordinal":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one grade only, given and true: it is NaN, and said so
            agreement = cohen_kappa_score(
                grades(truth), grades(chances >= 0.5), labels=np.arange(truth.shape[1] + 1), weights="quadratic"
            )
        return {"qwk": float(agreement), "auroc": area}
    return {"auroc": area}
