"""The screening report: one HTML file that needs nothing else, neither network nor folder."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle
from fastfundus.pictures import as_svg, thumbnail
from fastfundus.records import Status, interval_text
from fastfundus.screen.pipeline import ScreenedPhoto, Timing

__all__ = ["MOST_SHOWN", "Gallery", "write_report"]

MOST_SHOWN = 60
"""Photos shown in each of the report's two tables; `results.csv` has all."""
_THUMB_PX = 112


class Gallery:
    """Keeps thumbnails of the photos the report will show, and of no others: memory stays bounded."""

    def __init__(self) -> None:
        self._worst: list[tuple[float, int, str, str]] = []
        self._count = itertools.count()
        self.others: list[tuple[str, str]] = []
        """(path, thumbnail) of the first photos that were not scored."""

    def add(self, photo: ScreenedPhoto) -> None:
        """Look at one result."""
        image = photo.prepared.image
        if photo.score is None:
            if len(self.others) < MOST_SHOWN:
                self.others.append((photo.source.name, "" if image is None else thumbnail(image, _THUMB_PX)))
            return
        score = photo.score
        if image is not None and (len(self._worst) < MOST_SHOWN or score > self._worst[0][0]):
            # Among equals the earlier photo stays: the count falls.
            entry = (score, -next(self._count), photo.source.name, thumbnail(image, _THUMB_PX))
            push = heapq.heappush if len(self._worst) < MOST_SHOWN else heapq.heappushpop
            push(self._worst, entry)

    @property
    def worst(self) -> list[tuple[str, str]]:
        """(path, thumbnail) of the highest scores, worst first."""
        return [(name, thumb) for _, _, name, thumb in sorted(self._worst, reverse=True)]


def _histogram(scores: NDArray[np.float64], threshold: float, label: str) -> str:
    """Scores as an SVG picture, counts on a square-root axis so that few positives stay visible."""

    def draw(plots: Sequence[Any]) -> None:
        axes = plots[0]
        edges = np.linspace(0, 1, 41)
        counts, _ = np.histogram(scores, edges)
        middle = (edges[:-1] + edges[1:]) / 2
        colours = np.where(middle >= threshold, "#c2410c", "#0f766e")
        axes.bar(
            edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.5
        )
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
    gallery: Gallery,
    timing: Timing,
    *,
    source: str,
    finished: datetime,
) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        results: one row per input.
        bundle: what they were screened with.
        gallery: thumbnails.
        timing: of the run.
        source: what was screened, in words.
        finished: when.
    """
    # Of several findings the first is shown; results.csv has them all.
    label = bundle.findings[0] if bundle.findings else bundle.labels[0]
    about = bundle.about["labels"][label]
    decisions = Counter(results["decision"].to_list())
    statuses = Counter(results["status"].to_list())
    rows = {row["path"]: row for row in results.iter_rows(named=True)}
    scores = results[f"p_{label}"].drop_nulls().to_numpy()
    reasons = Counter((row["status"], row["reason"] or "") for row in rows.values() if row["status"] != Status.OK.value)
    # Autoescape: file names and reasons come from outside.
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        resources.files("fastfundus.screen").joinpath("report.html").read_text(encoding="utf-8")
    )
    html = template.render(
        label=label,
        about=about,
        bundle=bundle,
        total=len(results),
        decisions=decisions,
        statuses=[(status.value, statuses.get(status.value, 0)) for status in Status],
        not_screened=len(results) - statuses.get("ok", 0) - statuses.get("ungradable", 0),
        reasons=reasons.most_common(20),
        histogram=_histogram(scores, float(about["threshold"]), label) if len(scores) else "",
        worst=[(rows[name], thumb) for name, thumb in gallery.worst],
        others=[(rows[name], thumb) for name, thumb in gallery.others],
        others_total=len(results) - statuses.get("ok", 0),
        scored=len(scores),
        timing=timing,
        source=source,
        finished=finished.strftime("%Y-%m-%d %H:%M %Z").strip(),
        interval=interval_text,
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
