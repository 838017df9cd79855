"""Metrics against scikit-learn and hand numbers; calibration and thresholds."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from fastfundus.data import PhotoCache
from fastfundus.errors import SpecMismatch
from fastfundus.evaluate.metrics import auroc, binary_metrics
from fastfundus.evaluate.operating_point import (
    _threshold,
    fit_operating_point,
    fit_temperature,
    measure,
    read_operating_point,
)
from fastfundus.spec import PreprocessSpec
from fastfundus.train.run import Run
from tests.conftest import Trained


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_equals_scikit_learn(ties: bool) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.uniform(size=500) < 0.3).astype(float)
    scores = rng.normal(labels, 1.0)
    scores = np.round(scores, 1) if ties else scores
    assert auroc(scores, labels)[0] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    weights = rng.integers(0, 4, (6, 500)).astype(float)
    expected = [roc_auc_score(labels, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(auroc(scores, labels, weights), expected, atol=1e-12)


def test_auroc_by_hand_and_without_a_class() -> None:
    assert auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.0, 0, 1, 1]))[0] == 0.75
    assert auroc(np.array([0.5, 0.5]), np.array([0.0, 1]))[0] == 0.5
    assert np.isnan(auroc(np.array([0.1, 0.2]), np.array([1.0, 1]))[0])


def test_rates_by_hand() -> None:
    probabilities = np.array([0.9, 0.6, 0.5, 0.4, 0.2])
    labels = np.array([1.0, 0, 1, 1, 0])
    got = binary_metrics(probabilities, labels, list("abcde"), 0.5)
    assert got.sensitivity.value == pytest.approx(2 / 3)
    assert got.specificity.value == pytest.approx(1 / 2)
    assert got.brier == pytest.approx(np.mean([0.01, 0.36, 0.25, 0.36, 0.04]))
    assert (got.photos, got.patients, got.positives) == (5, 5, 3)


def test_intervals_cover_the_truth_and_know_of_patients() -> None:
    """95 % intervals over 60 simulated studies; photo-wise ones would be too narrow, as a patient has equal photos."""
    truth, covered, widths = 0.7602, 0, []  # P(N(1, 1) > N(0, 1))
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = np.repeat((rng.uniform(size=100) < 0.5).astype(float), 4)
        scores = np.repeat(rng.normal(labels[::4], 1.0), 4)
        patients = np.repeat(np.arange(100), 4).astype(str).tolist()
        probabilities = 1 / (1 + np.exp(-scores))
        interval = binary_metrics(probabilities, labels, patients, 0.5, resamples=400).auroc
        covered += interval.low <= truth <= interval.high
        widths.append(interval.high - interval.low)
    # 57 of 60 are expected; fewer than 51 happens once in a thousand.
    assert covered >= 51
    naive = binary_metrics(probabilities, labels, [str(n) for n in range(400)], 0.5, resamples=400).auroc
    assert np.mean(widths) > 1.6 * (naive.high - naive.low)


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_temperature_is_found(truth: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, 20_000)
    labels = (rng.uniform(size=20_000) < 1 / (1 + np.exp(-logits))).astype(float)
    assert fit_temperature(logits[:, None] * truth, labels[:, None]) == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 1.0])
def test_threshold_reaches_its_target_and_no_higher_one_does(target: float) -> None:
    rng = np.random.default_rng(2)
    labels = (rng.uniform(size=400) < 0.4).astype(float)
    probabilities = rng.beta(2 + 2 * labels, 4 - 2 * labels)
    threshold = _threshold(probabilities, labels, target)
    positive = probabilities[labels == 1]
    assert (positive >= threshold).mean() >= target
    next_higher = positive[positive > threshold].min() + 1e-12
    assert (positive >= next_higher).mean() < target


def test_a_threshold_below_all_scores_lies_on_none_of_them() -> None:
    assert _threshold(np.array([0.2, 0.5, 0.3]), np.array([1.0, 1.0, 0.0]), 1.0) == pytest.approx(0.1)


def test_operating_point_of_a_run(trained: Trained, cache: PhotoCache) -> None:
    run = Run.open(trained.run)
    stored = read_operating_point(run)["labels"]["abnormal"]
    assert stored["validation"]["sensitivity"]["value"] >= 0.9
    again = fit_operating_point(run, cache)["labels"]["abnormal"]
    assert again["threshold"] == stored["threshold"]
    measured = measure(run, cache)
    predictions = measured.predictions
    assert measured.which == "test patients"
    assert measured.labels["abnormal"] == stored["test"]
    kept = pl.read_parquet(trained.run / "predictions.parquet")
    assert kept.filter(pl.col("split") == "test").drop("split").equals(predictions)
    splits = pl.read_parquet(trained.run / "splits.parquet")
    assert set(predictions["path"]) == set(splits.filter(pl.col("split") == "test")["path"])


def test_external_photos_leave_out_what_was_learned(trained: Trained, cache: PhotoCache, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = Run.open(trained.run)
    elsewhere = PhotoCache(tmp_path / "other", cache.spec, cache.photos, cache.manifest, cache.source)
    measured = measure(run, elsewhere)
    splits = pl.read_parquet(trained.run / "splits.parquet")
    learned = int(splits["split"].is_in(["train", "val"]).sum())
    assert f"({learned} left out" in measured.which
    assert measured.labels["abnormal"]["photos"] == len(splits) - learned


def test_another_spec_is_refused(trained: Trained, cache: PhotoCache) -> None:
    other = PhotoCache(cache.path, PreprocessSpec(size=96), cache.photos, cache.manifest, cache.source)
    with pytest.raises(SpecMismatch, match="size 96 / 64"):
        measure(Run.open(trained.run), other)
