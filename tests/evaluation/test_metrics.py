"""Metrics against scikit-learn and hand-computed values; calibration, thresholds and locked runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from fastfundus.data import PhotoCache
from fastfundus.errors import CheckpointError, DataError, SpecMismatch
from fastfundus.evaluation.bootstrap import PatientBootstrap
from fastfundus.evaluation.locked_run import read_operating_point
from fastfundus.evaluation.metrics import INTERVALS, auroc, binary_metrics, net_benefit
from fastfundus.evaluation.operating_point import fit_operating_point, measure
from fastfundus.evaluation.thresholds import fit_temperature, fit_threshold
from fastfundus.spec import PreprocessSpec
from fastfundus.training.run import Run
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
    assert got.brier.value == pytest.approx(np.mean([0.01, 0.36, 0.25, 0.36, 0.04]))
    assert (got.photos, got.patients, got.positives) == (5, 5, 3)


@pytest.mark.parametrize("ties", [False, True])
def test_every_figure_equals_scikit_learn(ties: bool) -> None:
    rng = np.random.default_rng(1)
    labels = (rng.uniform(size=400) < 0.3).astype(float)
    predicted = 1 / (1 + np.exp(-rng.normal(labels - 0.5, 1.0)))
    predicted = np.round(predicted, 1) if ties else predicted
    got = binary_metrics(predicted, labels, [str(n) for n in range(400)], 0.45, resamples=10)
    called = predicted >= 0.45
    expected = {
        "auroc": roc_auc_score(labels, predicted),
        "auprc": average_precision_score(labels, predicted),
        "sensitivity": recall_score(labels, called),
        "specificity": recall_score(labels, called, pos_label=0),
        "ppv": precision_score(labels, called),
        "npv": precision_score(labels, called, pos_label=0),
        "f1": f1_score(labels, called),
        "brier": brier_score_loss(labels, predicted),
    }
    for name, value in expected.items():
        assert getattr(got, name).value == pytest.approx(value, abs=1e-12), name
        assert getattr(got, name).low <= getattr(got, name).high


def test_calibration_error_by_hand() -> None:
    # Two of fifteen bins are used: half of the photos at 0.1 are positive, and all at 0.9.
    predicted, labels = np.array([0.1, 0.1, 0.9, 0.9]), np.array([0.0, 1, 1, 1])
    got = binary_metrics(predicted, labels, list("abcd"), 0.5, resamples=10).ece.value
    assert got == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)


def test_predictive_values_where_the_model_will_be_used() -> None:
    """A published example of Bayes' rule: sensitivity 90 %, specificity 91 % and prevalence 1 % give a PPV of 9.2 %."""
    predicted = np.r_[np.repeat([0.9, 0.1], [90, 10]), np.repeat([0.9, 0.1], [9, 91])]
    labels = np.repeat([1.0, 0.0], 100)
    got = binary_metrics(predicted, labels, [str(n) for n in range(200)], 0.5, prevalence=0.01, resamples=10)
    assert got.ppv.value == pytest.approx(0.9 * 0.01 / (0.9 * 0.01 + 0.09 * 0.99))
    assert got.npv.value == pytest.approx(0.91 * 0.99 / (0.91 * 0.99 + 0.1 * 0.01))
    plain = binary_metrics(predicted, labels, [str(n) for n in range(200)], 0.5, resamples=10)
    assert plain.ppv.value == pytest.approx(90 / 99)


def test_net_benefit_by_hand() -> None:
    predicted, labels = np.array([0.9, 0.6, 0.4, 0.2]), np.array([1.0, 0, 1, 0])
    got = net_benefit(predicted, labels, np.array([0.1, 0.5, 0.8]))
    # At 0.1 all are called: 2 correct, 2 wrong at odds of 1 to 9. At 0.5 one of each. At 0.8 one correct.
    assert got == pytest.approx([(2 - 2 / 9) / 4, (1 - 1) / 4, 1 / 4])


def test_sets_without_positives_are_not_estimable_and_others_are() -> None:
    got = binary_metrics(np.array([0.2, 0.7, 0.1]), np.zeros(3), list("abc"), 0.5, resamples=20).to_dict()
    for name in ("auroc", "auprc", "sensitivity", "f1"):
        assert got[name] == {"value": None, "low": None, "high": None}
    assert got["specificity"]["value"] == pytest.approx(2 / 3)
    assert got["ppv"]["value"] == 0.0
    assert set(INTERVALS) <= set(got)


@pytest.mark.parametrize("bad", [float("nan"), -0.1, 1.5, float("inf")])
def test_predictions_that_are_no_probabilities_are_named(bad: float) -> None:
    with pytest.raises(DataError, match=r"1 of 3 predictions are not probabilities, the first is .* of patient b"):
        binary_metrics(np.array([0.1, bad, 0.3]), np.array([0.0, 1, 0]), list("abc"), 0.5)


def test_resamples_are_the_same_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastfundus.evaluation import bootstrap

    patients = [str(n // 2) for n in range(50)]
    whole = np.concatenate(list(PatientBootstrap(patients, 100, 3).weights()))
    monkeypatch.setattr(bootstrap, "_MAX_AT_ONCE", 350)
    parts = list(PatientBootstrap(patients, 100, 3).weights())
    assert len(parts) > 10
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert whole.shape == (101, 50)
    assert (whole[0] == 1).all()
    # Photos of one patient are resampled together, and as many patients are drawn as exist.
    np.testing.assert_array_equal(whole[:, ::2], whole[:, 1::2])
    assert (whole.sum(axis=1) == 50).all()
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(
        np.concatenate(list(PatientBootstrap(patients, 100, 3).weights(order))), whole[:, order]
    )


def test_intervals_cover_the_truth_and_resample_patients() -> None:
    """Simulate 60 studies; per-photo intervals would be too narrow, because the photos of a patient are identical."""
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
    # 57 of 60 are expected; fewer than 51 occur with a probability of about 0.001.
    assert covered >= 51
    naive = binary_metrics(probabilities, labels, [str(n) for n in range(400)], 0.5, resamples=400).auroc
    assert np.mean(widths) > 1.6 * (naive.high - naive.low)


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_temperature_is_found(truth: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, 20_000)
    labels = (rng.uniform(size=20_000) < 1 / (1 + np.exp(-logits))).astype(float)
    assert fit_temperature(logits[:, None] * truth, labels[:, None]) == pytest.approx(truth, rel=0.05)


def threshold_of(predicted: np.ndarray, labels: np.ndarray, target: float, of: str = "sensitivity") -> float:
    patients = [str(n) for n in range(len(labels))]
    return fit_threshold(predicted, labels, patients, target, of, resamples=1).value  # type: ignore[arg-type]


@pytest.mark.parametrize("of", ["sensitivity", "specificity"])
def test_threshold_interval_is_that_of_refitted_thresholds(of: str) -> None:
    """Compare with the spread of thresholds over simulated validation sets with two photos per patient."""
    thresholds, spans = [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        labels = np.repeat((rng.uniform(size=80) < 0.5).astype(float), 2)
        predicted = 1 / (1 + np.exp(-np.repeat(rng.normal(labels[::2], 1.0), 2) - rng.normal(0, 0.3, 160)))
        patients = np.repeat(np.arange(80), 2).astype(str).tolist()
        found = fit_threshold(predicted, labels, patients, 0.8, of, resamples=200)  # type: ignore[arg-type]
        thresholds.append(found.value)
        spans.append(found.high - found.low)
        # The original set is itself a possible resample.
        assert found.low <= found.value <= found.high
    # 150 sets give a standard deviation to within 6 %; quantiles of 40 patients' scores are not quite normal.
    assert np.mean(spans) / 3.92 == pytest.approx(np.std(thresholds), rel=0.25)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95, 1.0])
def test_specificity_threshold_is_the_lowest_that_suffices(target: float) -> None:
    rng = np.random.default_rng(3)
    labels = (rng.uniform(size=300) < 0.3).astype(float)
    predicted = np.round(1 / (1 + np.exp(-rng.normal(labels, 1.0))), 2)
    threshold = threshold_of(predicted, labels, target, "specificity")
    negative = predicted[labels == 0]
    assert (negative < threshold).mean() >= target
    lower = predicted[predicted < threshold].max()
    assert (negative < lower).mean() < target
    assert threshold not in predicted, "rounding in another runtime must not change a decision"
    assert threshold_of(np.array([0.2, 0.4]), np.array([0.0, 0]), 1.0, "specificity") == pytest.approx(0.7)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 1.0])
def test_threshold_reaches_its_target_and_no_higher_one_does(target: float) -> None:
    rng = np.random.default_rng(2)
    labels = (rng.uniform(size=400) < 0.4).astype(float)
    probabilities = rng.beta(2 + 2 * labels, 4 - 2 * labels)
    threshold = threshold_of(probabilities, labels, target)
    positive = probabilities[labels == 1]
    assert (positive >= threshold).mean() >= target
    next_higher = positive[positive > threshold].min() + 1e-12
    assert (positive >= next_higher).mean() < target


def test_a_threshold_below_all_scores_lies_on_none_of_them() -> None:
    assert threshold_of(np.array([0.2, 0.5, 0.3]), np.array([1.0, 1.0, 0.0]), 1.0) == pytest.approx(0.1)


def test_operating_point_by_specificity(trained: Trained, cache: PhotoCache, tmp_path: Path) -> None:
    shutil.copytree(trained.run, tmp_path / "run")
    point = fit_operating_point(Run.open(tmp_path / "run"), cache, target_specificity=0.8)["labels"]["abnormal"]
    assert (point["target_specificity"], point["target_sensitivity"], point["note"]) == (0.8, None, None)
    assert point["validation"]["specificity"]["value"] >= 0.8
    assert point["threshold"] == point["test"]["threshold"]


@pytest.mark.parametrize("changed", ["threshold", "weights"])
def test_what_was_locked_cannot_be_changed_unnoticed(trained: Trained, tmp_path: Path, changed: str) -> None:
    shutil.copytree(trained.run, tmp_path / "run")
    file = tmp_path / "run" / "operating_point.json"
    if changed == "threshold":
        document = json.loads(file.read_text())
        document["labels"]["abnormal"]["threshold"] += 0.01
        file.write_text(json.dumps(document))
    else:
        with (tmp_path / "run" / "best.safetensors").open("r+b") as weights:
            weights.seek(-1, 2)
            last = weights.read(1)[0]
            weights.seek(-1, 2)
            weights.write(bytes([last ^ 1]))
    with pytest.raises(CheckpointError, match=r"were changed after they were locked; remove operating_point\.json"):
        read_operating_point(Run.open(tmp_path / "run"))


def test_operating_point_of_a_run(trained: Trained, cache: PhotoCache) -> None:
    run = Run.open(trained.run)
    stored = read_operating_point(run)["labels"]["abnormal"]
    assert stored["validation"]["sensitivity"]["value"] >= 0.9
    assert stored["threshold_low"] <= stored["threshold"] <= stored["threshold_high"]
    again = fit_operating_point(run, cache)["labels"]["abnormal"]
    assert again["threshold"] == stored["threshold"]
    # A bundle records the lock of its operating point.
    assert trained.bundle.metadata["provenance"]["lock"] == read_operating_point(run)["lock"]
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
