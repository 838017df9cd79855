"""Subgroups are complete, disjoint, and flagged if small."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fastfundus.data import PhotoCache
from fastfundus.errors import ConfigError
from fastfundus.evaluation.metrics import binary_metrics
from fastfundus.evaluation.subgroups import subgroup_metrics
from tests.cli.test_cli import run
from tests.conftest import Trained


@pytest.fixture
def tables() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Predictions and manifest of 200 photos of 100 patients; photos of the second camera have random labels."""
    rng = np.random.default_rng(4)
    labels = (rng.uniform(size=200) < 0.5).astype(float)
    probabilities = np.clip(0.5 + 0.3 * (labels - 0.5) + rng.normal(0, 0.1, 200), 0, 1)
    camera = np.where(np.arange(200) < 120, "A", "B")
    labels = np.where(camera == "B", (rng.uniform(size=200) < 0.5).astype(float), labels)
    names = {"path": [f"{n}.jpg" for n in range(200)], "sha256": [f"{n:064x}" for n in range(200)]}
    predictions = pl.DataFrame(
        names | {"patient": [f"p{n // 2}" for n in range(200)], "label_dr": labels, "p_dr": probabilities}
    )
    manifest = pl.DataFrame(
        names | {
            "camera": camera, "age": [None, *(20 + np.arange(199) % 55)], "eye": ["L", "R"] * 100,
            "quality": np.linspace(0, 1, 200),
        }
    )  # fmt: skip
    return predictions, manifest


def test_groups_are_measured_each_by_itself(tables: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    predictions, manifest = tables
    found = subgroup_metrics(predictions, manifest, ["camera", "eye", "age", "quality"], {"dr": 0.5}, resamples=200)
    good, random = found["camera"]["dr"]
    assert (good["group"], good["photos"], random["photos"]) == ("A", 120, 80)
    part = predictions[:120]
    by_hand = binary_metrics(
        part["p_dr"].to_numpy(), part["label_dr"].to_numpy(), part["patient"].to_list(), 0.5, resamples=200
    )
    assert {**by_hand.to_dict(), "group": "A", "small": False} == good
    assert good["auroc"]["low"] > random["auroc"]["high"]
    for groups in found.values():
        assert sum(group["photos"] for group in groups["dr"]) == 200
    ages = [group["group"] for group in found["age"]["dr"]]
    assert ages == ["20 to 29", "30 to 39", "40 to 49", "50 to 59", "60 to 69", "70 to 79", "unknown"]
    assert found["age"]["dr"][-1]["small"]
    assert len(found["quality"]["dr"]) == 4
    assert {group["photos"] for group in found["quality"]["dr"]} == {50}


def test_empty_and_unknown_groups(tables: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    predictions, manifest = tables
    unlabelled = predictions.with_columns(label_dr=pl.when(manifest["camera"] == "A").then(pl.col("label_dr")))
    empty = subgroup_metrics(unlabelled, manifest, ["camera"], {"dr": 0.5}, resamples=50)["camera"]["dr"][1]
    assert empty == {"group": "B", "photos": 0, "patients": 0, "positives": 0, "small": True}
    with pytest.raises(ConfigError, match="the manifest has no column 'cameras'; did you mean 'camera'"):
        subgroup_metrics(predictions, manifest, ["cameras"], {"dr": 0.5})


def test_the_command_writes_groups_and_a_comparison(trained: Trained, cache: PhotoCache, tmp_path: Path) -> None:
    result = run(
        "evaluate", trained.run, cache.path, "--output", tmp_path, "--by", "eye", "--against", trained.run,
        "--prevalence", "0.1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert {group["group"] for group in written["subgroups"]["eye"]["abnormal"]} == {"L", "R"}
    assert written["against"]["labels"]["abnormal"]["auroc"]["difference"] == 0
    assert written["labels"]["abnormal"]["prevalence"] == 0.1
    card = (tmp_path / "model_card.md").read_text()
    weights = hashlib.sha256((trained.run / "best.safetensors").read_bytes()).hexdigest()
    for said in (weights, trained.bundle.spec.fingerprint, "### By eye", "at a prevalence of 0.1", "| abnormal | L |",
                 f"### Comparison with `{trained.run}`", "Groups too small to judge: eye L, eye R"):  # fmt: skip
        assert said in card, said
    assert "eye L, abnormal" in result.output
    assert "(small group, interpret with care)" in result.output
    assert "first minus second 0.000" in result.output
