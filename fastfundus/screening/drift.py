"""Drift between the screened photos and the model's own data: population stability of scores and quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MIN_PHOTOS", "Drift", "drift_of", "reference_of"]

MIN_PHOTOS = 50
"""Minimum number of photos; fewer do not characterise their distribution."""
_BINS = 10
_ALIKE, _SHIFTED = 0.1, 0.25
"""Customary limits of the index, applied to its excess over chance. Source: Siddiqi, Credit Risk Scorecards, 2006."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Difference between a distribution and its reference."""

    what: str
    index: float
    """Population stability index: the sum over bins of (share - expected) x ln(share / expected)."""
    expected_index: float
    """Expected index of photos drawn from the reference itself."""
    shares: list[float]
    """Share of the photos in each bin of the reference."""
    expected: list[float]
    photos: int

    @property
    def verdict(self) -> str:
        """Verbal verdict on the index."""
        excess = self.index - self.expected_index
        if excess < _ALIKE:
            return "alike"
        return "shifted" if excess < _SHIFTED else "very different: inspect the photos and evaluate the model on them"


def reference_of(values: NDArray[np.float64]) -> dict[str, Any] | None:
    """Describe a distribution by its deciles, as JSON data for `bundle.json`; None for fewer than `MIN_PHOTOS`."""
    if len(values) < MIN_PHOTOS:
        return None
    # Equal values may produce duplicate decile edges: keep the distinct ones.
    edges = np.unique(np.quantile(values, np.arange(1, _BINS) / _BINS))
    return {"edges": edges.tolist(), "shares": _shares(values, edges).tolist(), "photos": len(values)}


def drift_of(what: str, values: NDArray[np.float64], reference: dict[str, Any] | None) -> Drift | None:
    """Compare values with a reference from `reference_of`; return None if either has too few photos."""
    if reference is None or len(values) < MIN_PHOTOS:
        return None
    edges, expected = np.array(reference["edges"]), np.array(reference["shares"])
    shares = _shares(values, edges)
    # Count an empty bin as half a photo to keep the logarithm finite.
    seen = np.maximum(shares, 0.5 / len(values))
    wanted = np.maximum(expected, 0.5 / reference["photos"])
    index = float(((seen - wanted) * np.log(seen / wanted)).sum())
    # Twice the divergence of two samples of one distribution is chi-squared; its mean is the degrees of freedom.
    expected_index = (len(shares) - 1) * (1 / len(values) + 1 / reference["photos"])
    return Drift(what, index, expected_index, shares.tolist(), expected.tolist(), len(values))


def _shares(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1) / len(values)
