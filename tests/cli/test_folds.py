"""Tests of `train --folds`: every photo is tested once, by a model that has not seen its patient; runs can resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastfundus.data import PhotoCache
from fastfundus.evaluation.metrics import auroc
from fastfundus.training.trainer import Interrupted, Trainer
from tests.cli.test_cli import run

OPTIONS = ("--backbone", "test_resnet", "--epochs", 1, "--batch-size", 8, "--folds", 3)


def test_folds_are_trained_pooled_and_resumed(
    cache: PhotoCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    class Stopping(Trainer):
        def __init__(self, photos, folder, settings, **options):  # type: ignore[no-untyped-def]
            trained.append((folder.name, settings.data.fold, options["resume"]))
            if len(trained) == 2:
                raise Interrupted("stopped in epoch 1")
            super().__init__(photos, folder, settings, **options)

    monkeypatch.setattr("fastfundus.workflow.train.Trainer", Stopping)
    command = ("train", cache.path, "--output", tmp_path / "runs")
    stopped = run(*command, *OPTIONS)
    assert stopped.exit_code == 1
    assert (
        f"continue with: fastfundus train {cache.path} --output {tmp_path / 'runs'} --folds 3 --resume"
        in stopped.stderr
    )
    done = run(*command, "--folds", 3, "--resume", "--json")
    assert done.exit_code == 0, done.output
    assert trained == [("fold0", 0, False), ("fold1", 1, False), ("fold1", 1, False), ("fold2", 2, False)]

    document = json.loads((tmp_path / "runs" / "folds.json").read_text())
    assert json.loads(done.stdout) == {"run": str(tmp_path / "runs"), **document}
    table = pl.read_parquet(tmp_path / "runs" / "out_of_fold.parquet")
    usable = cache.manifest.filter((pl.col("status") == "ok") & pl.col("abnormal").is_not_null())
    assert sorted(table["path"]) == sorted(usable["path"])
    for fold in range(3):
        part = table.filter(pl.col("fold") == fold)
        splits = pl.read_parquet(tmp_path / "runs" / f"fold{fold}" / "splits.parquet")
        assert set(part["path"]) == set(splits.filter(pl.col("split") == "test")["path"])
        assert not set(part["patient"]) & set(splits.filter(pl.col("split") != "test")["patient"])
        point = json.loads((tmp_path / "runs" / f"fold{fold}" / "operating_point.json").read_text())
        assert part["threshold_abnormal"].unique().to_list() == [point["labels"]["abnormal"]["threshold"]]
        assert document["folds"][fold]["labels"]["abnormal"]["auroc"]["value"] == pytest.approx(
            point["labels"]["abnormal"]["test"]["auroc"]["value"]
        )
    labels, scores = table["label_abnormal"].to_numpy(), table["p_abnormal"].to_numpy()
    pooled = document["out_of_fold"]["labels"]["abnormal"]
    assert pooled["auroc"]["value"] == pytest.approx(float(auroc(scores, labels)[0]))
    called = scores >= table["threshold_abnormal"].to_numpy()
    assert pooled["sensitivity"]["value"] == pytest.approx(called[labels == 1].mean())
    assert pooled["threshold"] is None
    values = [entry["labels"]["abnormal"]["auroc"]["value"] for entry in document["folds"]]
    spread = document["mean_and_sd"]["abnormal"]["auroc"]
    assert spread == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1)})

    text = run(*command, "--folds", 3, "--resume")
    assert text.stdout.splitlines()[0].startswith("fold 0, test: AUROC ")
    assert "every photo once: AUROC " in text.stdout


def test_a_fixed_split_cannot_be_split_again(cache: PhotoCache, tmp_path: Path) -> None:
    split = tmp_path / "split.csv"
    assert run("cache", "split", cache.path, "--folds", 3, "--output", split).exit_code == 0
    config = tmp_path / "run.toml"
    config.write_text(f'[data]\nsplit_file = "{split}"\n')
    result = run("train", cache.path, "--output", tmp_path / "runs", *OPTIONS, "--config", config)
    assert result.exit_code == 1
    assert "--folds assigns patients to folds, but the label file or data.split_file fixes a split" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--folds", 3, "--fold", 1), 2, "give --fold or --folds, not both"),
        (("--folds", 2), 2, "2 is not in the range 3<=x<=100"),
        (("--folds", 4, "--resume"), 1, "config.toml: cannot be read"),
    ],
)
def test_wrong_use_is_reported(
    cache: PhotoCache, tmp_path: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    result = run("train", cache.path, "--output", tmp_path / "runs", *options)
    assert result.exit_code == code
    assert message in result.stderr
