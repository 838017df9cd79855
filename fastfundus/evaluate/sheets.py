"""Heatmaps on a page that stands alone, and which photos of a cache to show of each outcome."""

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
    """One photo of a page."""

    name: str
    text: str
    photo: str
    """A data URL, as is `heat`."""
    heat: str


def outcome_rows(
    chances: NDArray[np.float64], truth: NDArray[np.float64], threshold: float, *, most: int
) -> dict[str, NDArray[np.int64]]:
    """Choose photos of each outcome: the surest of the right ones, and the worst of the wrong ones.

    Args:
        chances: [N] probabilities of one output.
        truth: [N] 0, 1, or NaN where it is not known.
        threshold: as locked.
        most: photos of each.

    Returns:
        Numbers of photos by the names in `OUTCOMES`.
    """
    called = chances >= threshold
    chosen = {}
    for name, label, call in zip(OUTCOMES, (1, 0, 1, 0), (True, True, False, False), strict=True):
        rows = np.flatnonzero((truth == label) & (called == call))
        # Positive calls from the highest, negative ones from the lowest.
        order = np.argsort(-chances[rows] if call else chances[rows], kind="stable")
        chosen[name] = rows[order][:most]
    return chosen


def write_sheet(path: Path, title: str, facts: Sequence[str], groups: Sequence[tuple[str, Sequence[Shown]]]) -> None:
    """Write a page.

    Args:
        path: the HTML file.
        title: of the page.
        facts: paragraphs above the photos.
        groups: titles and photos.
    """
    write_page(path, "evaluate/sheet.html", title=title, facts=facts, groups=groups)
