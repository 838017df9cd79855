"""Names of metrics and texts of comparisons, shared by the terminal, pages and model cards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastfundus.records import interval_text

__all__ = ["FIGURE_NAMES", "differences", "prevalence_of"]

FIGURE_NAMES = {
    "auroc": "AUROC", "auprc": "AUPRC", "sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV",
    "npv": "NPV", "f1": "F1", "brier": "Brier score", "ece": "calibration error", "dice": "Dice", "cldice": "clDice",
    "qwk": "quadratic kappa", "accuracy": "accuracy", "pixels_auroc": "AUROC of all pixels",
}  # fmt: skip


def prevalence_of(labels: Mapping[str, Any]) -> float | None:
    """Return the stated prevalence; None means that of the photos."""
    stated = {entry.get("prevalence") for entry in labels.values()} - {None}
    return stated.pop() if stated else None


def differences(against: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str, str]]:
    """Yield output, metric, difference (first minus second) and p-value, adjusted if available, of a comparison."""
    for name, found in (against or {"labels": {}})["labels"].items():
        for key, entry in found.items():
            shown = interval_text({"value": entry["difference"], "low": entry["low"], "high": entry["high"]})
            p = entry.get("p_holm", entry["p"])
            yield name, FIGURE_NAMES[key], shown, "not estimable" if p is None else f"{p:.3g}"
