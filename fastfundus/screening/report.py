"""The screening report: a self-contained HTML file that needs neither network access nor other files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle
from fastfundus.engines.heatmap import Heatmapper
from fastfundus.pages import write_page
from fastfundus.pictures import as_svg
from fastfundus.records import Status, interval_text
from fastfundus.screening.drift import Drift, drift_of
from fastfundus.screening.gallery import others, worst
from fastfundus.screening.pipeline import Timing
from fastfundus.screening.policy import DECISIONS, ScreenPolicy
from fastfundus.screening.results import eye_table, makes_maps, patient_table

__all__ = ["write_report"]

_MAX_HISTOGRAMS = 6
_MAX_ROWS = 20


def _histogram(scores: NDArray[np.float64], threshold: float, label: str, abstain: float) -> str:
    """Return an SVG histogram of scores, with counts on a square-root axis so that rare positives stay visible."""

    def draw(plots: Sequence[Any]) -> None:
        axes = plots[0]
        edges = np.linspace(0, 1, 41)
        counts, _ = np.histogram(scores, edges)
        middle = (edges[:-1] + edges[1:]) / 2
        colours = np.where(middle >= threshold, "#c2410c", "#0f766e")
        axes.bar(
            edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.5
        )
        if abstain:
            axes.axvspan(threshold - abstain, threshold + abstain, color="#6d28d9", alpha=0.15, linewidth=0)
        axes.axvline(threshold, color="#111827", linewidth=1.2, linestyle="--")
        axes.annotate(
            f"threshold {threshold:.3f}",
            (threshold, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4 if threshold < 0.75 else -4, -4),
            textcoords="offset points",
            va="top",
            ha="left" if threshold < 0.75 else "right",
            fontsize=8,
        )
        axes.set_yscale("function", functions=(np.sqrt, np.square))
        axes.set(xlim=(0, 1), xlabel=f"probability of {label}", ylabel="photos")

    return as_svg(draw, columns=1)


def write_report(
    path: Path,
    results: pl.DataFrame,
    bundle: Bundle,
    policy: ScreenPolicy,
    timing: Timing,
    *,
    paths: Mapping[str, Path],
    notes: Sequence[str],
    source: str,
    finished: datetime,
) -> None:
    """Write the screening report.

    Args:
        path: the HTML file to write, in the results folder.
        results: one row per input.
        bundle: the bundle they were screened with.
        policy: the policy that made the decisions.
        timing: timing of the session that finished the run.
        paths: file of each input, by its name; some of them are shown.
        notes: notes on the inputs, such as files that vanished.
        source: description of what was screened.
        finished: time at which the run finished.
    """
    decided = [] if makes_maps(bundle) else list(bundle.findings or bundle.labels)
    scored = results.filter(pl.col("status") == Status.OK.value)
    statuses = Counter(results["status"].to_list())
    unscored = results.filter(pl.col("status") != Status.OK.value)
    histograms = [
        _histogram(scored[f"p_{name}"].to_numpy(), bundle.threshold_of(name), name, policy.abstain)
        for name in decided[:_MAX_HISTOGRAMS]
        if len(scored)
    ]
    drifts = _drifts(results, scored, bundle)
    write_page(
        path,
        "screening/report.html",
        bundle=bundle,
        maps=makes_maps(bundle),
        decided=decided,
        policy=policy,
        total=len(results),
        scored=len(scored),
        decisions=Counter(results["decision"].to_list()),
        statuses=[(status.value, statuses.get(status.value, 0)) for status in Status],
        not_screened=len(results) - statuses.get("ok", 0) - statuses.get("ungradable", 0),
        rolled=_rolled(results, policy) if bundle.findings else [],
        histograms=histograms,
        more_findings=len(decided) - len(histograms) if len(scored) else 0,
        cameras=_cameras(results),
        drifts=drifts,
        drift_picture=_drift_picture(drifts) if drifts else "",
        heatmap=bundle.metadata["heatmap"]["method"] if Heatmapper.available(bundle) else "",
        reasons=_counted(unscored, "status", "reason"),
        worst=worst(results, bundle, paths, path.parent),
        others=others(results, bundle, paths),
        others_total=len(unscored),
        timing=timing,
        notes=notes,
        source=source,
        finished=finished.strftime("%Y-%m-%d %H:%M %Z").strip(),
        interval=interval_text,
    )


def _rolled(results: pl.DataFrame, policy: ScreenPolicy) -> list[tuple[str, int, dict[str, int]]]:
    """Return the number of photos, eyes and patients, in total and by decision."""
    eyes = eye_table(results, policy)
    tables = [
        ("photos", results.with_columns(pl.col("decision").fill_null("not screened"))),
        ("eyes", eyes),
        ("patients", patient_table(eyes, policy)),
    ]
    rolled = []
    for name, table in tables:
        counts = Counter(table["decision"].to_list())
        rolled.append((name, len(table), {decision: counts[decision] for decision in reversed(DECISIONS)}))
    return rolled


def _drifts(results: pl.DataFrame, scored: pl.DataFrame, bundle: Bundle) -> list[Drift]:
    """Compare scores and quality with the reference in the bundle, if it has one."""
    reference = bundle.metadata.get("reference") or {"scores": {}, "quality": None}
    found = [
        drift_of(f"probability of {name}", scored[f"p_{name}"].to_numpy(), known)
        for name, known in reference["scores"].items()
    ]
    found.append(drift_of("quality", results["quality"].drop_nulls().to_numpy(), reference["quality"]))
    return [drift for drift in found if drift is not None]


def _drift_picture(drifts: Sequence[Drift]) -> str:
    """Return an SVG plot of the share of photos in each decile of the reference."""
    shown = [*drifts[: _MAX_HISTOGRAMS - 1], *drifts[_MAX_HISTOGRAMS - 1 :][-1:]]

    def draw(plots: Sequence[Any]) -> None:
        for axes, drift in zip(plots, shown, strict=True):
            places = np.arange(1, len(drift.shares) + 1)
            axes.bar(places, drift.shares, color="#0f766e", width=0.8)
            axes.step(np.append(places - 0.5, places[-1] + 0.5), [*drift.expected, drift.expected[-1]], where="post",
                      color="#111827", linewidth=1.2, linestyle="--")  # fmt: skip
            axes.set(xlabel=f"{drift.what}, low to high", ylabel="share of photos", xticks=[])

    return as_svg(draw, columns=len(shown), width_in=10, height_in=2.4)


def _cameras(results: pl.DataFrame) -> list[dict[str, Any]]:
    """Return counts and median quality by camera; empty if no camera is known."""
    if results["camera"].null_count() == len(results):
        return []
    status = pl.col("status")
    return (
        results.group_by("camera", maintain_order=True)
        .agg(
            photos=pl.len(),
            scored=(status == Status.OK.value).sum(),
            ungradable=(status == Status.UNGRADABLE.value).sum(),
            positive=(pl.col("decision") == "positive").sum(),
            quality=pl.col("quality").median(),
        )
        .sort("photos", descending=True, maintain_order=True)
        .head(_MAX_ROWS)
        .to_dicts()
    )


def _counted(table: pl.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    """Count each combination of values, most frequent first."""
    counted = table.group_by(*columns, maintain_order=True).agg(pl.len().alias("_count"))
    return counted.sort("_count", descending=True, maintain_order=True).head(_MAX_ROWS).rows()
