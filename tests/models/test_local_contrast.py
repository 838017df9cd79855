"""Local contrast: against its definition, in copies, half precision, runs, engines and with earlier runs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fastfundus.config import ModelConfig, TrainConfig
from fastfundus.data import PhotoCache
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import CheckpointError, ConfigError
from fastfundus.evaluation.operating_point import fit_operating_point
from fastfundus.models.classifier import create_model
from fastfundus.models.initial import resolve_local_contrast
from fastfundus.models.local_contrast import LocalContrast, add_local_contrast
from fastfundus.spec import IMAGENET_MEAN, IMAGENET_STD
from fastfundus.synthetic import draw_photo
from fastfundus.training.run import Run
from fastfundus.training.trainer import Trainer
from fastfundus.workflow.build_engine import build_engine
from tests.conftest import Trained

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("size", [224, 512, 101, 64])
@pytest.mark.parametrize(("mean", "std"), [(HALF, HALF), (IMAGENET_MEAN, IMAGENET_STD)])
def test_it_is_the_difference_from_a_blurred_copy(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    rgb = draw_photo(3, lesions=("exudates",), long_side=size).image[:size, :size].astype(np.float32) / 255
    m, s = np.array(mean, np.float32), np.array(std, np.float32)
    inputs = torch.from_numpy(((rgb - m) / s).transpose(2, 0, 1))[None]
    got = LocalContrast(mean, std)(inputs)[0].numpy().transpose(1, 2, 0) * s + m
    frame = rgb.max(axis=2) < 0.05
    expected = np.clip(2 * (rgb - gaussian_filter(rgb, (size / 20, size / 20, 0), mode="nearest")) + 0.5, 0, 1)
    np.testing.assert_allclose(got[frame], 0.5, atol=1e-6)
    # Boxes and bilinear interpolation stand in for the Gaussian, so that the two agree in what they show.
    inside = ~frame
    assert np.corrcoef(got[inside].ravel(), expected[inside].ravel())[0, 1] > 0.95
    assert np.abs(got[inside] - expected[inside]).mean() < 0.03


def test_brightness_does_not_matter_and_contrast_does() -> None:
    rgb = torch.rand(1, 3, 64, 64) * 0.2 + 0.3
    layer = LocalContrast((0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(layer(rgb), layer(rgb + 0.2))
    assert layer(rgb).std() > 1.5 * rgb.std()


def test_copies_and_half_precision_keep_the_constants() -> None:
    model, report = create_model(ModelConfig(backbone="test_resnet", init="scratch", local_contrast=True), 1)
    plain, _ = create_model(ModelConfig(backbone="test_resnet", init="scratch", local_contrast=False), 1)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    torch.nn.init.normal_(model.fc.weight)  # type: ignore[arg-type, union-attr]
    photos = torch.randn(2, 3, 64, 64)
    duplicate = copy.deepcopy(model).eval()
    torch.testing.assert_close(duplicate(photos), model.eval()(photos), rtol=0, atol=0)
    assert duplicate.forward_features.__self__ is duplicate  # type: ignore[union-attr]
    assert not torch.equal(model.eval().forward_features(photos), plain.eval().forward_features(photos))  # type: ignore[operator]
    layer = duplicate.to(torch.bfloat16).local_contrast
    assert layer.mean.dtype is torch.float32  # type: ignore[union-attr]
    np.testing.assert_allclose(layer.mean.ravel(), report.normalisation.mean, rtol=1e-7)  # type: ignore[union-attr]


def test_auto_follows_the_initial_weights(trained: Trained, tmp_path: Path) -> None:
    def resolved(init: str, task: str = "abnormality", **rest: object) -> object:
        return resolve_local_contrast(ModelConfig(init=init, **rest), task).local_contrast  # type: ignore[arg-type]

    assert resolved("scratch") is False
    assert resolved("imagenet") is True
    assert resolved("hf_hub:timm/resnet18.a1_in1k") is True
    assert resolved(str(trained.run)) is False
    assert resolved("scratch", local_contrast=True) is True
    assert resolved("imagenet", "vessels") is False
    with pytest.raises(ConfigError, match="vessels do not support it"):
        resolved("imagenet", "vessels", local_contrast=True)
    (tmp_path / "w.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="header cannot be read"):
        resolved(str(tmp_path / "w.safetensors"))
    torch.save({}, tmp_path / "w.pth")
    assert resolved(str(tmp_path / "w.pth")) is True


def test_networks_without_separate_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no forward_features"):
        add_local_contrast(torch.nn.Linear(2, 2), HALF, HALF)


@pytest.mark.long
def test_a_run_and_its_engines_compute_it(cache: PhotoCache, tmp_path: Path) -> None:
    settings = {
        "model": {"backbone": "test_resnet", "init": "scratch", "local_contrast": True},
        "data": {"folds": 3},
        "loop": {"epochs": 1, "batch_size": 16},
    }
    Trainer(cache, tmp_path / "run", TrainConfig.from_dict(settings)).fit()
    run = Run.open(tmp_path / "run")
    fit_operating_point(run, cache)
    assert run.config.model.local_contrast is True
    assert hasattr(run.load_model(), "local_contrast")
    assert resolve_local_contrast(ModelConfig(init=str(run.path)), "abnormality").local_contrast is True
    build_engine(run.path, tmp_path / "bundle", precision="fp32")
    # The gate has compared the engine with the network; without local contrast it would be another one.
    with Bundle.open(tmp_path / "bundle").load() as engine:
        photos = np.asarray(cache.photos[:4])
        assert engine.infer(photos).shape == (4, 1)
