"""Paired comparisons, checked against definitions and simulations, and the inputs they reject."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from fastfundus.errors import DataError
from fastfundus.evaluation.compare import area_covariance, compare_areas, compare_predictions, compare_rates, holm


def delong(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Covariances by the pairwise definition of the paper."""
    positive, negative = scores[:, labels == 1], scores[:, labels == 0]
    wins = (positive[:, :, None] > negative[:, None, :]) + 0.5 * (positive[:, :, None] == negative[:, None, :])
    return np.cov(wins.mean(axis=2)) / positive.shape[1] + np.cov(wins.mean(axis=1)) / negative.shape[1]


@pytest.mark.parametrize("ties", [False, True])
def test_one_photo_a_patient_is_delong(ties: bool) -> None:
    rng = np.random.default_rng(2)
    labels = (rng.uniform(size=120) < 0.4).astype(float)
    scores = rng.normal(labels, 1.0, (3, 120))
    scores = np.round(scores, 1) if ties else scores
    areas, covariance = area_covariance(scores, labels, [str(n) for n in range(120)])
    np.testing.assert_allclose(areas, [roc_auc_score(labels, row) for row in scores])
    np.testing.assert_allclose(covariance, delong(scores, labels), rtol=1e-9)


def test_clustered_standard_errors_match_simulated_spread() -> None:
    """Eyes of a patient are correlated, some with one diseased eye: the estimated error must match the spread."""
    areas, errors, naive = [], [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        sick = (rng.uniform(size=(80, 2)) < np.where(rng.uniform(size=(80, 1)) < 0.4, 0.8, 0.1)).astype(float)
        scores = sick + rng.normal(0, 1, (80, 1)) + rng.normal(0, 0.4, (80, 2))
        patients = np.repeat(np.arange(80), 2).astype(str).tolist()
        area, covariance = area_covariance(scores.reshape(1, -1), sick.ravel(), patients)
        areas.append(area[0])
        errors.append(covariance[0, 0])
        naive.append(area_covariance(scores.reshape(1, -1), sick.ravel(), [str(n) for n in range(160)])[1][0, 0])
    # A standard deviation estimated from 400 studies is accurate to 3.5 %.
    assert np.sqrt(np.mean(errors)) == pytest.approx(np.std(areas), rel=0.12)
    assert np.mean(errors) > 1.2 * np.mean(naive), "photos are not independent in this simulation"


def test_no_difference_is_found_as_often_as_promised() -> None:
    found = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        labels = np.repeat((rng.uniform(size=60) < 0.5).astype(float), 2)
        shared = np.repeat(rng.normal(labels[::2], 1.0), 2)
        first, second = (shared + rng.normal(0, 0.7, 120) for _ in range(2))
        found.append(compare_areas(first, second, labels, np.repeat(np.arange(60), 2).astype(str).tolist()).p < 0.05)
    # 15 of 300 are expected; 28 or more occur with a probability of about 0.001.
    assert 3 <= sum(found) <= 27


def test_folds_are_compared_within_themselves() -> None:
    """Two equally good models with different calibration, one per fold: ranked together, they would look worse."""
    rng = np.random.default_rng(3)
    labels = (rng.uniform(size=400) < 0.5).astype(float)
    folds, patients = np.repeat([0, 1], 200), [str(n) for n in range(400)]
    first = rng.normal(labels, 1.0)
    second = first + 3 * folds
    assert compare_areas(second, first, labels, patients).difference < -0.05
    found = compare_areas(second, first, labels, patients, folds)
    assert (found.difference, found.p) == (0, 1)
    noisy = first + rng.normal(0, 1, 400)
    whole, parts = (compare_areas(first, noisy, labels, patients, strata) for strata in (None, folds))
    assert parts.high - parts.low == pytest.approx(whole.high - whole.low, rel=0.1), "as precise as without folds"
    # A fold with one class contributes no area.
    one_class = np.where(folds == 1, 1.0, labels)
    alone = compare_areas(first[:200], noisy[:200], labels[:200], patients[:200])
    assert compare_areas(first, noisy, one_class, patients, folds) == alone


def test_few_positives_a_fold_are_not_oversure() -> None:
    """Five folds with about four diseased patients each: a normal distribution would give far too small p-values."""
    found = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        labels = np.repeat((rng.uniform(size=150) < 0.13).astype(float), 2)
        folds = np.repeat(np.arange(150) % 5, 2)
        first, second = (np.repeat(rng.normal(labels[::2], 1.0), 2) for _ in range(2))
        patients = np.repeat(np.arange(150), 2).astype(str).tolist()
        found.append(compare_areas(first, second, labels, patients, folds).p)
    known = np.array([p for p in found if np.isfinite(p)])
    assert len(known) > 250
    # 5 % is nominal; an error estimated from so few patients leaves slightly more. For 0.2 %, allow at most 1 %.
    assert (known < 0.05).mean() <= 0.08
    assert (known < 0.002).mean() <= 0.01


def test_a_difference_is_found_and_has_its_sign() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.uniform(size=400) < 0.5).astype(float)
    good, poor = rng.normal(2 * labels, 1.0), rng.normal(0.3 * labels, 1.0)
    patients = [str(n) for n in range(400)]
    better = compare_areas(good, poor, labels, patients)
    assert better.difference == pytest.approx(roc_auc_score(labels, good) - roc_auc_score(labels, poor))
    assert better.low > 0
    assert better.p < 1e-6
    worse = compare_areas(poor, good, labels, patients)
    assert (worse.difference, worse.p) == (-better.difference, better.p)
    same = compare_areas(good, good, labels, patients)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    rates = compare_rates(good > 1, poor > 0.15, labels, patients)
    assert rates["sensitivity"].difference == pytest.approx(
        (good > 1)[labels == 1].mean() - (poor > 0.15)[labels == 1].mean()
    )
    assert rates["specificity"].difference == pytest.approx(
        (poor > 0.15)[labels == 0].mean() - (good > 1)[labels == 0].mean()
    )
    assert rates["sensitivity"].p < 0.01


def test_one_class_is_not_estimable() -> None:
    found = compare_areas(np.arange(4.0), np.arange(4.0), np.ones(4), list("abcd"))
    assert np.isnan([found.difference, found.low, found.p]).all()


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    adjusted = holm([0.02, float("nan"), 0.01])
    assert adjusted[0::2] == pytest.approx([0.02, 0.02])
    assert np.isnan(adjusted[1])


def predictions(count: int, seed: int, first: int = 0) -> pl.DataFrame:
    labels = (np.random.default_rng(5).uniform(size=200) < 0.5).astype(float)
    rows = np.arange(first, first + count)
    probabilities = 1 / (1 + np.exp(-np.random.default_rng(seed).normal(labels[rows] - 0.5, 1.0)))
    return pl.DataFrame(
        {
            "path": [f"{row}.jpg" for row in rows],
            "sha256": [f"{row:064x}" for row in rows],
            "patient": [f"p{row // 2}" for row in rows],
            "label_dr": labels[rows],
            "p_dr": probabilities,
        }
    )


def test_tables_are_joined_by_photo_and_the_rest_is_counted() -> None:
    first, second = predictions(100, 0), predictions(100, 1, first=20)
    found = compare_predictions(first, second.sample(fraction=1.0, shuffle=True, seed=2), {"dr": (0.5, 0.4)})
    assert (found["photos"], found["left_out"]) == (80, 40)
    shared = first[20:]
    by_hand = compare_areas(
        shared["p_dr"].to_numpy(),
        second[:80]["p_dr"].to_numpy(),
        shared["label_dr"].to_numpy(),
        shared["patient"].to_list(),
    )
    assert found["labels"]["dr"]["auroc"]["difference"] == pytest.approx(by_hand.difference)
    assert found["labels"]["dr"]["auroc"]["p_holm"] == pytest.approx(by_hand.p)


def test_tables_that_do_not_fit_are_refused() -> None:
    first = predictions(40, 0)
    with pytest.raises(DataError, match="were not measured on any common photo"):
        compare_predictions(first, predictions(40, 1, first=100), {"dr": (0.5, 0.5)})
    with pytest.raises(DataError, match="have no output in common; the first has glaucoma"):
        compare_predictions(first, first, {"glaucoma": (0.5, 0.5)})
    turned = first.with_columns(label_dr=1 - pl.col("label_dr"))
    with pytest.raises(DataError, match=r"40 photos have different values of dr in the two runs, such as 0\.jpg"):
        compare_predictions(first, turned, {"dr": (0.5, 0.5)})
