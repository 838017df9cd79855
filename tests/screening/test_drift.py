"""The stability index, checked by hand and against its expected value."""

from __future__ import annotations

import numpy as np
import pytest

from fastfundus.screening.drift import drift_of, reference_of


def test_index_by_hand() -> None:
    reference = {"edges": [0.5], "shares": [0.5, 0.5], "photos": 100}
    values = np.array([0.2] * 80 + [0.7] * 20)
    drift = drift_of("scores", values, reference)
    assert drift is not None
    assert drift.shares == [0.8, 0.2]
    assert drift.index == pytest.approx(0.3 * np.log(1.6) + 0.3 * np.log(2.5))
    assert drift.expected_index == pytest.approx(0.02)
    assert drift.verdict.startswith("very different")


def test_samples_of_one_distribution_are_alike() -> None:
    generator = np.random.default_rng(3)
    found = [drift_of("scores", generator.beta(1, 4, 400), reference_of(generator.beta(1, 4, 300))) for _ in range(200)]
    drifts = [drift for drift in found if drift is not None]
    # About one in a hundred may be called shifted by chance.
    assert sum(drift.verdict != "alike" for drift in drifts) <= 4
    # The mean of 200 has a standard error of 2.5 %, and the formula is exact only for large samples.
    assert np.mean([drift.index for drift in drifts]) == pytest.approx(drifts[0].expected_index, rel=0.15)
    moved = drift_of("scores", generator.beta(2, 3, 400), reference_of(generator.beta(1, 4, 300)))
    assert moved is not None
    assert moved.verdict.startswith("very different")


def test_equal_values_and_few_photos() -> None:
    reference = reference_of(np.full(80, 0.3))
    assert reference is not None
    assert (reference["edges"], reference["shares"]) == ([0.3], [0.0, 1.0])
    same = drift_of("quality", np.full(60, 0.3), reference)
    assert same is not None
    assert same.verdict == "alike"
    assert reference_of(np.full(49, 0.3)) is None
    assert drift_of("quality", np.full(49, 0.3), reference) is None
    assert drift_of("quality", np.full(60, 0.3), None) is None
