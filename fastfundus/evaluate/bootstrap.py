"""Intervals by drawing patients with replacement.

Photos of one patient are not independent: resampling draws patients, not photos. Resamples are computed some at a time,
so that fifty thousand photos take no more memory than fifty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Interval", "PatientBootstrap"]

Floats = NDArray[np.float64]

_MOST_AT_ONCE = 1 << 21
"""Weights computed with at once: 16 MB, which fits a processor's cache in parts."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % bootstrap percentile interval; NaN where it cannot be estimated."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return plain data for JSON, which knows no NaN: None stands for it."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}


class PatientBootstrap:
    """Resamples of one set of photos; equal arguments give equal resamples.

    Args:
        patients: [N] who each photo is of.
        resamples: how many sets are drawn.
        seed: of the drawing.
    """

    def __init__(self, patients: Sequence[str], resamples: int = 2000, seed: int = 0) -> None:
        _, self._number = np.unique(np.asarray(patients), return_inverse=True)
        self.patients = int(self._number.max()) + 1 if len(self._number) else 0
        self._resamples, self._seed = resamples, seed

    def weights(self, order: NDArray[np.int64] | None = None) -> Iterator[Floats]:
        """How often each photo counts, [b, N] at a time; the first row of all is the set itself, each photo once.

        Args:
            order: in which order of the photos; None takes theirs.
        """
        number = self._number if order is None else self._number[order]
        chance = np.random.default_rng(self._seed)
        at_once = max(1, _MOST_AT_ONCE // max(1, len(number)))
        counts = np.ones((1, self.patients))
        left = self._resamples
        while True:
            yield counts[:, number]
            if not left:
                return
            draws = min(at_once, left)
            left -= draws
            counts = np.empty((draws, self.patients))
            for row in counts:
                row[:] = np.bincount(chance.integers(0, self.patients, self.patients), minlength=self.patients)

    def values(
        self, statistics: Callable[[Floats], dict[str, Floats]], order: NDArray[np.int64] | None = None
    ) -> dict[str, Floats]:
        """Statistics of the set and of every resample: [1 + resamples] each.

        Args:
            statistics: from weights [b, N] to values [b] by name; NaN where one cannot be estimated.
            order: as for `weights`.
        """
        parts = [statistics(weights) for weights in self.weights(order)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def intervals(
        self, statistics: Callable[[Floats], dict[str, Floats]], order: NDArray[np.int64] | None = None
    ) -> dict[str, Interval]:
        """As `values`, each with its 95 % percentile interval."""
        return {name: interval(values) for name, values in self.values(statistics, order).items()}


def interval(values: Floats) -> Interval:
    """A value, and the percentiles of its resamples that could be estimated: [1 + resamples]."""
    usable = values[1:][np.isfinite(values[1:])]
    if not len(usable):
        return Interval(float(values[0]), float("nan"), float("nan"))
    low, high = np.percentile(usable, (2.5, 97.5))
    return Interval(float(values[0]), float(low), float(high))
