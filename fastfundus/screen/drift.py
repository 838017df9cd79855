"""Whether what is screened looks like what the model was made from: population stability of scores and quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_PHOTOS", "Drift", "drift_of", "reference_of"]

LEAST_PHOTOS = 50
"""Fewer tell nothing about their distribution."""
_BINS = 10
_ALIKE, _SHIFTED = 0.1, 0.25
"""Customary limits of the index, above what chance gives. Source: Siddiqi, Credit Risk Scorecards, 2006."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How one distribution differs from its reference."""

    what: str
    index: float
    """Population stability index: the sum over bins of (share - expected) x ln(share / expected)."""
    chance: float
    """What photos drawn from the reference itself would give on average."""
    shares: list[float]
    """By bin of the reference."""
    expected: list[float]
    photos: int

    @property
    def verdict(self) -> str:
        """In words."""
        excess = self.index - self.chance
        if excess < _ALIKE:
            return "alike"
        return "shifted" if excess < _SHIFTED else "very different: look at the photos, and measure the model on them"


def reference_of(values: NDArray[np.float64]) -> dict[str, Any] | None:
    """Describe a distribution by its tenths: plain data for `bundle.json`; None of fewer than `LEAST_PHOTOS`."""
    if len(values) < LEAST_PHOTOS:
        return None
    # Equal values may make tenths empty: bins are what differs.
    edges = np.unique(np.quantile(values, np.arange(1, _BINS) / _BINS))
    return {"edges": edges.tolist(), "shares": _shares(values, edges).tolist(), "photos": len(values)}


def drift_of(what: str, values: NDArray[np.float64], reference: dict[str, Any] | None) -> Drift | None:
    """Compare values with what `reference_of` described; None where either side is too few."""
    if reference is None or len(values) < LEAST_PHOTOS:
        return None
    edges, expected = np.array(reference["edges"]), np.array(reference["shares"])
    shares = _shares(values, edges)
    # An empty bin counts as half a photo: a logarithm of nothing says nothing.
    seen = np.maximum(shares, 0.5 / len(values))
    wanted = np.maximum(expected, 0.5 / reference["photos"])
    index = float(((seen - wanted) * np.log(seen / wanted)).sum())
    # Twice the divergence of two samples of one distribution: chi-squared by its degrees of freedom.
    chance = (len(shares) - 1) * (1 / len(values) + 1 / reference["photos"])
    return Drift(what, index, chance, shares.tolist(), expected.tolist(), len(values))


def _shares(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1) / len(values)
