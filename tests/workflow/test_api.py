"""The Python API, used as its documentation shows: with plain paths, from photos to decisions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastfundus
from fastfundus.config import TrainConfig
from fastfundus.data import PhotoCache
from fastfundus.data.journal import locked
from fastfundus.errors import DataError
from tests.conftest import Trained

SETTINGS = {"model": {"backbone": "test_resnet"}, "loop": {"epochs": 1, "batch_size": 8}, "data": {"folds": 3}}


def test_from_photos_to_decisions(photo_folder: Path, tmp_path: Path) -> None:
    cache, run, output = (str(tmp_path / name) for name in ("cache", "run", "evaluation"))
    prepared = fastfundus.prepare(str(photo_folder), cache, labels=str(photo_folder / "labels.csv"), size=64)
    assert len(prepared.manifest) == 48
    trained = fastfundus.train(prepared, run, TrainConfig.from_dict(SETTINGS))
    assert isinstance(trained, fastfundus.Run)
    measured, document = fastfundus.evaluate(run, cache, output)
    assert measured.which == "test patients"
    assert json.loads((Path(output) / "metrics.json").read_text())["labels"] == document["labels"]
    bundle, report = fastfundus.build_engine(run, str(tmp_path / "bundle"), precision="fp32")
    assert report.passed
    records = list(fastfundus.screen([str(photo_folder / "images")], str(tmp_path / "bundle")))
    assert len(records) == 48
    assert {record["bundle"] for record in records} == {bundle.fingerprint}
    assert fastfundus.Bundle.open(str(tmp_path / "bundle")).labels == fastfundus.Run.open(run).labels


def test_resuming_takes_the_settings_of_the_run(cache: PhotoCache, tmp_path: Path) -> None:
    config = TrainConfig.from_dict({**SETTINGS, "loop": {"epochs": 2, "batch_size": 8}})

    class Stop(fastfundus.Observer):
        def epoch(self, result: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastfundus.train(cache.path, tmp_path / "run", config, observer=Stop())
    with pytest.raises(fastfundus.ConfigError, match="config cannot change when resuming"):
        fastfundus.train(cache.path, tmp_path / "run", config, resume=True)
    run = fastfundus.train(cache.path, tmp_path / "run", resume=True)
    assert isinstance(run, fastfundus.Run)
    assert run.config.loop.epochs == 2


def test_folds_that_differ_from_those_of_the_run(cache: PhotoCache, tmp_path: Path) -> None:
    (tmp_path / "runs" / "fold0").mkdir(parents=True)
    (tmp_path / "runs" / "fold0" / "config.toml").write_text("[data]\nfolds = 3\n")
    with pytest.raises(fastfundus.ConfigError, match="was started with 3 folds, not 4"):
        fastfundus.train(cache.path, tmp_path / "runs", folds=4, resume=True)


def test_a_short_salt_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(fastfundus.ConfigError, match="a patient salt of 1 bytes is too easy to guess; at least 16"):
        fastfundus.prepare(photo_folder, tmp_path / "cache", patient_salt=b"x")


def test_recipes_and_exports() -> None:
    assert fastfundus.read_recipe("linear_probe", {"loop.epochs": 3}).loop.epochs == 3
    assert issubclass(fastfundus.GateRefused, fastfundus.FastFundusError)
    assert issubclass(fastfundus.Interrupted, fastfundus.FastFundusError)
    assert fastfundus.ThresholdTargets().sensitivity == 0.90


def test_runs_of_version_0_1_are_read_and_resumed(trained: Trained, cache: PhotoCache, tmp_path: Path) -> None:
    """Their files spell the section `optimiser`; in a user's file the old key is an error that names the new one."""
    run = Path(shutil.copytree(trained.run, tmp_path / "run"))
    old = (run / "config.toml").read_text().replace("[optimizer]", "[optimiser]")
    (run / "config.toml").write_text(old)
    with safe_open(run / "best.safetensors", "pt") as tensors:
        header = json.loads(tensors.metadata()["fastfundus"])
    header["config"]["optimiser"] = header["config"].pop("optimizer")
    save_file(load_file(run / "best.safetensors"), run / "best.safetensors", {"fastfundus": json.dumps(header)})
    state = torch.load(run / "last.ckpt", weights_only=True)
    state["config"]["optimiser"] = state["config"].pop("optimizer")
    state["optimiser"] = state.pop("optimizer")
    torch.save(state, run / "last.ckpt")

    expected = fastfundus.Run.open(trained.run).config
    assert fastfundus.Run.open(run).config == TrainConfig.from_run(run) == expected
    from fastfundus.training.trainer import Trainer

    resumed = Trainer(cache, run, replace(expected), resume=True)
    assert resumed.state.epoch == expected.loop.epochs
    with pytest.raises(fastfundus.ConfigError, match="optimiser is not a setting; did you mean 'optimizer'"):
        TrainConfig.from_toml(run / "config.toml")


def test_changed_pixels_stop_every_step(trained: Trained, cache: PhotoCache, tmp_path: Path) -> None:
    """Thirty of a hundred photos were inverted, and nobody noticed."""
    shutil.copytree(cache.path, tmp_path / "cache")
    pixels = np.load(tmp_path / "cache" / "photos.npy", mmap_mode="r+")
    pixels[::3] = 255 - pixels[::3]
    pixels.flush()
    config = TrainConfig.from_dict({"model": {"backbone": "test_resnet"}, "loop": {"epochs": 1}})
    for step in (
        lambda: fastfundus.train(tmp_path / "cache", tmp_path / "run", config),
        lambda: fastfundus.evaluate(trained.run, tmp_path / "cache"),
        lambda: fastfundus.build_engine(trained.run, tmp_path / "bundle", cache=tmp_path / "cache"),
        lambda: fastfundus.explain(trained.run, tmp_path / "cache", tmp_path / "heatmaps"),
    ):
        with pytest.raises(DataError, match="have changed since they were prepared"):
            step()


def test_two_trainings_cannot_share_a_folder(cache: PhotoCache, tmp_path: Path) -> None:
    config = TrainConfig.from_dict({"model": {"backbone": "test_resnet"}, "loop": {"epochs": 1}})
    with (
        locked(tmp_path / "run", tmp_path / "run.lock", "trained into"),
        pytest.raises(DataError, match="is being trained into by another process"),
    ):
        fastfundus.train(cache, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
