"""The benchmark of cost and scaling, with small inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.suites import bench_cost
from bench.tables.cost_tables import cost_table
from bench.tables.report import RESULTS
from fastfundus.data import PhotoCache
from fastfundus.spec import PreprocessSpec


def test_costs_are_fitted_to_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cost, "WIDTHS", (160, 320, 640))
    monkeypatch.setattr(bench_cost, "QUALITIES", (75, 97))
    cost, rows = bench_cost.fit_preparing(tmp_path, PreprocessSpec(size=64), 0.01)
    assert len(rows) == 6
    assert all(row["measured_s"] > 0 and row["fitted_s"] > 0 for row in rows)
    assert cost.fixed_s >= 0


@pytest.mark.long
def test_other_networks_are_predicted_and_measured(
    tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cost, "WIDTHS", (160, 320))
    monkeypatch.setattr(bench_cost, "QUALITIES", (75, 97))
    monkeypatch.setattr(bench_cost, "FITTED", (("test_resnet", 32),))
    monkeypatch.setattr(bench_cost, "CHECKED", (("test_resnet", 32),))
    monkeypatch.setattr(bench_cost, "DATA", tmp_path)
    (tmp_path / "fullres_dr").symlink_to(photo_folder / "images")
    found = bench_cost.predictions(tmp_path, "fp32", 0.01)
    (check,) = found["checks"]
    assert check["gflop"] == found["fitted_on"][0]["gflop"] > 0
    assert check["engine"]["predicted_s"] == pytest.approx(found["s_per_gflop"] * check["gflop"])
    predicted = check["predicted"]["photos_per_s"]
    expected = bench_cost.CORES / (check["prepare"]["predicted_s"] + check["engine"]["predicted_s"])
    assert predicted == pytest.approx(expected)
    assert check["measured"]["photos_per_s"] > 0
    assert json.dumps(found), "plain data"


def test_the_table_is_drawn_from_the_result() -> None:
    result = json.loads(sorted(RESULTS.glob("cost_cpu_*.json"))[-1].read_text())
    table = cost_table(result)
    for check in result["model"]["checks"]:
        assert f"{check['predicted']['photos_per_s'] / check['measured']['photos_per_s'] - 1:+.0%}" in table


def test_large_manifests_are_caches(tmp_path: Path) -> None:
    small = bench_cost.SmallCache(tmp_path)
    rows = bench_cost.over_manifest(tmp_path, small, (100, 1000))
    assert [row["photos"] for row in rows] == [100, 1000]
    assert all(row["peak_mib"] > 0 and row["split_s"] > 0 for row in rows)
    cache = PhotoCache.open(tmp_path / "rows_1000")
    assert len(cache.manifest) == 1000
    assert cache.manifest["patient"].n_unique() == 500
    assert cache.photos.shape == (1000, 32, 32, 3)
