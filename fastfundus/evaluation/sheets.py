"""Self-contained pages of heatmaps, and the choice of photos to show for each outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastfundus.pages import write_page

__all__ = ["OUTCOMES", "Shown", "outcome_rows", "write_sheet"]

OUTCOMES = ("true positives", "false positives", "false negatives", "true negatives")


@dataclass(frozen=True, slots=True)
class Shown:
    """One photo on a page."""

    name: str
    text: str
    photo: str
    """Data URL, like `heat`."""
    heat: str


def outcome_rows(
    probabilities: NDArray[np.float64], truth: NDArray[np.float64], threshold: float, *, limit: int
) -> dict[str, NDArray[np.int64]]:
    """Choose photos of each outcome: the most confident correct ones and the largest errors.

    Args:
        probabilities: [N] probabilities of one output.
        truth: [N] 0, 1, or NaN where unknown.
        threshold: the locked threshold.
        limit: maximum number of photos per outcome.

    Returns:
        Row indices by the names in `OUTCOMES`.
    """
    called = probabilities >= threshold
    chosen = {}
    for name, label, call in zip(OUTCOMES, (1, 0, 1, 0), (True, True, False, False), strict=True):
        rows = np.flatnonzero((truth == label) & (called == call))
        # Positive calls in descending, negative calls in ascending order of probability.
        order = np.argsort(-probabilities[rows] if call else probabilities[rows], kind="stable")
        chosen[name] = rows[order][:limit]
    return chosen


def write_sheet(path: Path, title: str, facts: Sequence[str], groups: Sequence[tuple[str, Sequence[Shown]]]) -> None:
    """Write a page of heatmaps.

    Args:
        path: the HTML file.
        title: title of the page.
        facts: paragraphs above the photos.
        groups: title and photos of each group.
    """
    write_page(path, "evaluation/sheet.html", title=title, facts=facts, groups=groups)
