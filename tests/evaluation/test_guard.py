"""The guard: a photo unlike those that a model learned from gets no decision, in every engine and report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from fastfundus.data import PhotoCache
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import CheckpointError
from fastfundus.evaluation import guard as guard_module
from fastfundus.evaluation.guard import load_guard
from fastfundus.evaluation.locked_run import read_operating_point, rows_by_split
from fastfundus.evaluation.operating_point import fit_operating_point
from fastfundus.models.guard import Guard, Penultimate, fit_guard_model
from fastfundus.photo.prepare import PreparedPhoto
from fastfundus.records import GUARD_LIMIT, SourcePhoto, Status
from fastfundus.screening.pipeline import make_result
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.training.run import Run
from fastfundus.workflow.build_engine import build_engine
from tests.conftest import Trained


def drawn_features(count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    scales = np.concatenate([[3.0, 2.0, 1.0], np.full(61, 0.2)])
    return (5 + generator.normal(size=(count, 64)) * scales).astype(np.float32)


def test_distances_are_those_of_the_full_covariance() -> None:
    """With all but one direction as components, the model is a full Gaussian; SciPy has its Mahalanobis distance."""
    from scipy.spatial.distance import mahalanobis

    features = drawn_features(4000, 0)[:, :8]
    fitted = fit_guard_model(features)
    assert fitted.components.shape == (7, 8)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    precision = np.linalg.inv(np.cov(unit.T) + 1e-12 * np.eye(8))
    expected = [mahalanobis(row, unit.mean(axis=0), precision) for row in unit[:50]]
    # Unit vectors have little variance along their mean; float32 squares of it leave four digits.
    np.testing.assert_allclose(fitted.distances(features[:50]), expected, rtol=0.02)


def test_unlike_features_are_far_and_lengths_do_not_matter() -> None:
    fitted = fit_guard_model(drawn_features(2000, 0))
    known = fitted.distances(drawn_features(500, 1))
    other = fitted.distances(np.random.default_rng(2).normal(size=(500, 64)).astype(np.float32))
    assert np.quantile(known, 0.99) < np.quantile(other, 0.01)
    np.testing.assert_allclose(fitted.distances(7 * drawn_features(500, 1)), known, rtol=1e-3)


def test_the_value_is_one_half_at_the_limit() -> None:
    features = drawn_features(200, 0)
    fitted = fit_guard_model(features)
    distances = fitted.distances(features)
    values = Guard(fitted, float(distances[3]))(torch.from_numpy(features))[:, 0].numpy()
    assert values[3] == pytest.approx(GUARD_LIMIT)
    assert ((values > GUARD_LIMIT) == (distances > distances[3])).sum() >= len(values) - 1
    assert 0 <= values.min() <= values.max() < 1


@pytest.mark.parametrize("backbone", ["resnet18", "test_convnext", "test_vit", "tf_efficientnet_lite0"])
def test_penultimate_features_are_what_the_last_layer_receives(backbone: str) -> None:
    network = timm.create_model(backbone, num_classes=3).eval()
    size = 160 if backbone == "test_vit" else 64
    assert Penultimate.available(network, size)
    photos = torch.randn(2, 3, size, size)
    with torch.no_grad():
        logits = network.get_classifier()(Penultimate(network)(photos))  # type: ignore[operator]
        torch.testing.assert_close(logits, network(photos))
    assert not Penultimate.available(torch.nn.Conv2d(3, 1, 1), 64)


def test_too_few_photos_are_reported(trained: Trained, cache: PhotoCache) -> None:
    entry = read_operating_point(Run.open(trained.run))["guard"]
    assert entry["limit"] is None
    assert "no guard against unfamiliar photos" in entry["note"]
    assert "it takes 100 of each" in entry["note"]
    assert load_guard(Run.open(trained.run), entry) is None


@pytest.fixture(scope="module")
def guarded(trained: Trained, cache: PhotoCache, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The shared run with a guard: its photos are fewer than a guard otherwise takes."""
    folder = tmp_path_factory.mktemp("guarded") / "run"
    shutil.copytree(trained.run, folder)
    (folder / "operating_point.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard_module, "MIN_GUARD_PHOTOS", 8)
        fit_operating_point(Run.open(folder), cache)
    return Run.open(folder)


def test_the_stored_guard_is_the_fitted_one(guarded: Run, cache: PhotoCache) -> None:
    """Its limit is a twentieth beyond the farthest of its few validation photos."""
    point = read_operating_point(guarded)
    guard = load_guard(guarded, point["guard"])
    assert guard is not None
    rows = rows_by_split(guarded, cache)["val"]
    features = guard_module._features(guarded, cache, guarded.load_model(), rows)
    with torch.no_grad():
        distances = guard.distance(torch.from_numpy(features)).numpy()
    assert 1.05 * distances.max() == pytest.approx(point["guard"]["limit"], rel=1e-3)


def test_the_guard_is_locked_with_the_thresholds(guarded: Run, tmp_path: Path) -> None:
    point = read_operating_point(guarded)
    assert point["guard"]["limit"] > 0
    assert point["guard"]["refused_share"] == 0.005
    shutil.copytree(guarded.path, tmp_path / "run")
    file = tmp_path / "run" / "operating_point.json"
    document = json.loads(file.read_text())
    document["guard"]["limit"] *= 2
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="were changed after they were locked"):
        read_operating_point(Run.open(tmp_path / "run"))
    (tmp_path / "run" / "guard.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"guard.safetensors: missing, or changed after it was locked"):
        load_guard(Run.open(tmp_path / "run"), point["guard"])


@pytest.fixture(scope="module")
def guarded_bundle(guarded: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_engine(guarded, tmp_path_factory.mktemp("guarded") / "bundle", precision="fp32")[0]


@pytest.mark.long
def test_every_backend_has_the_guard(guarded: Run, guarded_bundle: Bundle, cache: PhotoCache) -> None:
    assert guarded_bundle.guarded
    photos = np.ascontiguousarray(cache.photos[np.arange(6)])
    guard = load_guard(guarded, read_operating_point(guarded)["guard"])
    network = guarded.load_model()
    mean, std = torch.tensor(guarded.spec.mean), torch.tensor(guarded.spec.std)
    inputs = ((torch.from_numpy(photos) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = guard(Penultimate(network)(inputs)).numpy()[:, 0]  # type: ignore[misc]
    for backend in ("openvino", "onnxruntime"):
        with guarded_bundle.using(backend).load() as engine:
            raw = engine.infer(photos, guard=True)
            assert raw.shape == (6, 2)
            np.testing.assert_allclose(raw[:, 1], expected, atol=1e-3)
            np.testing.assert_array_equal(engine.infer(photos), raw[:, :1])


def test_an_unfamiliar_photo_gets_no_decision(guarded_bundle: Bundle) -> None:
    source, prepared = SourcePhoto(Path("a.jpg"), "a.jpg", "a.jpg"), PreparedPhoto(Status.OK, "")
    far = make_result(source, prepared, np.array([0.9, 0.51], np.float32), guarded_bundle, ScreenPolicy())
    assert (far.status, far.answer, far.decision) == (Status.UNFAMILIAR, None, None)
    assert far.reason == "unlike the photos that the model learned from: look at it"
    near = make_result(source, prepared, np.array([0.9, 0.49], np.float32), guarded_bundle, ScreenPolicy())
    assert near.status is Status.OK
    assert near.answer is not None
    assert near.answer.tolist() == [np.float32(0.9)]
    assert near.decision is not None
