"""`run.html`, a self-contained page with the results of a run; works offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.data.cache import PhotoCache
from fastfundus.data.split import side_counts
from fastfundus.evaluation.figures import INK, decision_curves, roc_curves
from fastfundus.evaluation.locked_run import read_operating_point
from fastfundus.pages import write_page
from fastfundus.pictures import as_svg, thumbnail
from fastfundus.records import interval_text
from fastfundus.training.precision import describe_precision
from fastfundus.training.run import Run, read_table

__all__ = ["write_run_page"]

_WORST = 12


def write_run_page(run: Run, cache: PhotoCache) -> None:
    """Write the page of a finished and measured run.

    Args:
        run: a run with operating_point.json and predictions.parquet.
        cache: the run's own cache, for pictures of wrong decisions.
    """
    document = read_operating_point(run)
    table = read_table(run.path, "predictions.parquet")
    history = pl.read_csv(run.path / "metrics.csv")
    vessels = run.config.task == "vessels"
    test = table.filter(pl.col("split") == "test")
    write_page(
        run.path / "run.html",
        "evaluation/run.html",
        name=run.path.name,
        run=run,
        precision=describe_precision(run.config.loop),
        document=document,
        curves=_curves(history, run),
        roc=None if vessels else roc_curves(test, run.labels),
        decision=None if vessels else decision_curves(test, run.labels),
        rows=[_row(name, point) for name, point in document["labels"].items()],
        overall=document["overall"]["test"],
        counts=side_counts(read_table(run.path, "splits.parquet")["split"]).items(),
        worst=_worst(test, document["labels"], cache, vessels),
        vessels=vessels,
        text=interval_text,
    )


def _row(name: str, point: dict[str, Any]) -> dict[str, Any]:
    test = point["test"]
    shown = [key for key in ("auroc", "dice", "cldice", "sensitivity", "specificity") if test.get(key) is not None]
    return {
        "name": name,
        "threshold": point["threshold"],
        "photos": test["photos"],
        "patients": test["patients"],
        "positives": test.get("positives"),
        "values": {
            key: interval_text(test[key]) if isinstance(test[key], dict) else f"{test[key]:.3f}" for key in shown
        },
    }


def _curves(history: pl.DataFrame, run: Run) -> str:
    def draw(axes: Sequence[Any]) -> None:
        epochs = history["epoch"].to_numpy()
        axes[0].plot(epochs, history["train_loss"], color=INK[0], label="training", marker=".")
        axes[0].plot(epochs, history["val_loss"], color=INK[1], label="validation", marker=".")
        axes[0].set(xlabel="epoch", ylabel="loss")
        axes[0].legend(frameon=False, fontsize=8)
        name = f"val_{run.score[0]}"
        axes[1].plot(epochs, history[name], color=INK[1], marker=".")
        axes[1].axvline(run.epoch, color="#111827", linewidth=1, linestyle="--")
        axes[1].annotate(f"best: epoch {run.epoch}", (run.epoch, 0), xycoords=("data", "axes fraction"), fontsize=8,
                         xytext=(4 if run.epoch <= epochs.mean() else -4, 4), textcoords="offset points",
                         ha="left" if run.epoch <= epochs.mean() else "right")  # fmt: skip
        axes[1].set(xlabel="epoch", ylabel=f"validation {run.score[0].upper()}")

    return as_svg(draw, columns=2, height_in=2.9)


def _worst(
    test: pl.DataFrame, points: dict[str, dict[str, Any]], cache: PhotoCache, vessels: bool
) -> list[dict[str, str]]:
    """Return the test photos with the lowest Dice, or the wrong decisions farthest from the threshold."""
    if vessels:
        shown = [
            (row["path"], f"Dice {row['dice']:.3f}") for row in test.sort("dice").head(_WORST).iter_rows(named=True)
        ]
    else:
        outputs = list(points)
        errors = np.stack([_error(test, name, points[name]["threshold"]) for name in outputs], axis=1)
        shown = []
        for place in np.argsort(-errors.max(axis=1), kind="stable")[:_WORST].tolist():
            if not errors[place].any():
                break
            name = outputs[int(errors[place].argmax())]
            row = test.row(place, named=True)
            said = "yes" if row[f"label_{name}"] else "no"
            shown.append((row["path"], f"{name}: {said}; p = {row[f'p_{name}']:.3f}"))
    rows = {path: number for number, path in enumerate(cache.manifest["path"].to_list())}
    return [{"path": path, "said": said, "picture": thumbnail(cache.photos[rows[path]])} for path, said in shown]


def _error(test: pl.DataFrame, name: str, threshold: float) -> NDArray[np.float64]:
    """Return how far each probability is from its label, 0 where the decision is right or the label unknown."""
    probability, label = pl.col(f"p_{name}"), pl.col(f"label_{name}")
    wrong = (probability >= threshold) != (label > 0.5)
    error = pl.when(wrong).then((probability - label).abs()).otherwise(0.0)
    return test.select(error.cast(pl.Float64).fill_null(0.0)).to_series().to_numpy()
