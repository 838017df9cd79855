"""Bootstrap confidence intervals that resample patients with replacement.

Photos of one patient are not independent, so patients are resampled rather than photos. Resamples are computed in
batches: fifty thousand photos need no more memory than fifty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Interval", "PatientBootstrap"]

Floats = NDArray[np.float64]

_MAX_AT_ONCE = 1 << 21
"""Maximum number of weights per batch: 16 MB, parts of which fit into a processor's cache."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % bootstrap percentile interval; NaN where it cannot be estimated."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return plain data for JSON, with None in place of NaN, which JSON lacks."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}


class PatientBootstrap:
    """Bootstrap resamples of one set of photos; equal arguments give equal resamples.

    Args:
        patients: [N] patient of each photo.
        resamples: number of resamples.
        seed: random seed of the resampling.
    """

    def __init__(self, patients: Sequence[str], resamples: int = 2000, seed: int = 0) -> None:
        _, self._number = np.unique(np.asarray(patients), return_inverse=True)
        self.patients = int(self._number.max()) + 1 if len(self._number) else 0
        self._resamples, self._seed = resamples, seed

    def weights(self, order: NDArray[np.int64] | None = None) -> Iterator[Floats]:
        """Yield how often each photo counts, in batches of [b, N]; the very first row is the original set, all ones.

        Args:
            order: order in which to return the photos; None keeps the original order.
        """
        number = self._number if order is None else self._number[order]
        generator = np.random.default_rng(self._seed)
        at_once = max(1, _MAX_AT_ONCE // max(1, len(number)))
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
                row[:] = np.bincount(generator.integers(0, self.patients, self.patients), minlength=self.patients)

    def values(
        self, statistics: Callable[[Floats], dict[str, Floats]], order: NDArray[np.int64] | None = None
    ) -> dict[str, Floats]:
        """Return the statistics of the original set and of every resample: [1 + resamples] each.

        Args:
            statistics: maps weights [b, N] to named values [b]; NaN where a value cannot be estimated.
            order: see `weights`.
        """
        parts = [statistics(weights) for weights in self.weights(order)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def intervals(
        self, statistics: Callable[[Floats], dict[str, Floats]], order: NDArray[np.int64] | None = None
    ) -> dict[str, Interval]:
        """Return each statistic with its 95 % percentile interval; see `values` for the arguments."""
        return {name: interval(values) for name, values in self.values(statistics, order).items()}


def interval(values: Floats) -> Interval:
    """Return the value of the original set with the percentile interval of its finite resamples: [1 + resamples]."""
    usable = values[1:][np.isfinite(values[1:])]
    if not len(usable):
        return Interval(float(values[0]), float("nan"), float("nan"))
    low, high = np.percentile(usable, (2.5, 97.5))
    return Interval(float(values[0]), float(low), float(high))
