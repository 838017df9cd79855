"""Figures: names of metrics, comparisons in words, and ROC, decision and calibration curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from fastfundus.evaluation.metrics import net_benefit
from fastfundus.pictures import as_svg
from fastfundus.records import interval_text

__all__ = [
    "INK",
    "METRIC_NAMES",
    "calibration_curves",
    "decision_curves",
    "differences",
    "prevalence_of",
    "roc_curves",
]

INK = ("#0f766e", "#c2410c", "#1d4ed8", "#7c3aed", "#b45309", "#be123c", "#15803d", "#475569")
_MAX_CURVES = 8
_MAX_PLOTS = 3
_BINS = 10

METRIC_NAMES = {
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
            yield name, METRIC_NAMES[key], shown, "not estimable" if p is None else f"{p:.3g}"


def roc_curves(table: pl.DataFrame, outputs: Sequence[str]) -> str:
    """Draw one ROC curve per output from a table with label_<output> and p_<output>; return SVG."""
    from sklearn.metrics import roc_curve

    def draw(axes: Sequence[Any]) -> None:
        axes[0].plot([0, 1], [0, 1], color="#9ca3af", linewidth=1, linestyle=":")
        for ink, name in zip(INK, outputs[:_MAX_CURVES], strict=False):
            known = table.filter(pl.col(f"label_{name}").is_not_null())
            truth = known[f"label_{name}"].to_numpy()
            if len(set(truth.tolist())) == 2:
                wrong, right, _ = roc_curve(truth, known[f"p_{name}"].to_numpy())
                axes[0].plot(wrong, right, color=ink, label=name)
        axes[0].set(
            xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal"
        )
        axes[0].legend(frameon=False, fontsize=8, loc="lower right")

    return as_svg(draw, columns=1, width_in=3.5, height_in=2.9)


def decision_curves(table: pl.DataFrame, outputs: Sequence[str]) -> str:
    """Draw net benefit over the threshold probability, one plot per output; return SVG.

    Outputs without positives have no net benefit and are left out, unless that would leave nothing.
    """
    positive = [name for name in outputs if table[f"label_{name}"].sum() > 0] or list(outputs)
    grid, shown = np.linspace(0.01, 0.99, 99), positive[:_MAX_PLOTS]

    def draw(plots: Sequence[Any]) -> None:
        for axes, ink, name in zip(plots, INK, shown, strict=False):
            known = table.filter(pl.col(f"label_{name}").is_not_null())
            truth = known[f"label_{name}"].to_numpy()
            share = float(truth.mean()) if len(truth) else 0.0
            axes.plot(grid, net_benefit(known[f"p_{name}"].to_numpy(), truth, grid), color=ink, label="treat by model")
            axes.plot(grid, share - (1 - share) * grid / (1 - grid), color="#6b7280", linestyle="--", label="treat all")
            axes.axhline(0, color="#9ca3af", linewidth=1, linestyle=":", label="treat none")
            axes.set(xlabel=f"threshold probability of {name}", ylabel="net benefit per photo", xlim=(0, 1))
            axes.set_ylim(-0.05, max(0.1, 1.1 * share))
            axes.legend(frameon=False, fontsize=8)

    return as_svg(draw, columns=len(shown), width_in=2.9 * len(shown), height_in=2.6)


def calibration_curves(table: pl.DataFrame, outputs: Sequence[str]) -> str:
    """Draw the share of positives over the predicted probability, one plot per output; return SVG.

    Photos are binned into tenths by probability. Bars are 95 % Wilson intervals of the share.
    """
    from scipy.stats import binomtest

    shown = outputs[:_MAX_PLOTS]

    def draw(plots: Sequence[Any]) -> None:
        for axes, ink, name in zip(plots, INK, shown, strict=False):
            known = table.filter(pl.col(f"label_{name}").is_not_null()).sort(f"p_{name}")
            parts = [part for part in np.array_split(np.arange(len(known)), _BINS) if len(part)]
            given = [float(known[f"p_{name}"].gather(part).mean()) for part in parts]  # type: ignore[arg-type]
            yes = [int(known[f"label_{name}"].gather(part).sum()) for part in parts]
            share = np.array([count / len(part) for count, part in zip(yes, parts, strict=True)])
            spans = [
                binomtest(count, len(part)).proportion_ci(method="wilson")
                for count, part in zip(yes, parts, strict=True)
            ]
            low, high = (np.array([getattr(span, end) for span in spans]) for end in ("low", "high"))
            bars = np.stack([share - low, high - share]).clip(0)
            axes.plot([0, 1], [0, 1], color="#9ca3af", linewidth=1, linestyle=":")
            axes.errorbar(given, share, bars, color=ink, marker="o", markersize=4, capsize=2, linewidth=1)
            axes.set(xlabel=f"predicted probability of {name}", ylabel="share of positives", xlim=(-0.02, 1.02),
                     ylim=(-0.02, 1.02))  # fmt: skip

    return as_svg(draw, columns=len(shown), width_in=2.9 * len(shown), height_in=2.9)
