"""The bench of costs and scaling, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import bench_cost
from fastfundus.data import PhotoCache
from fastfundus.spec import PreprocessSpec


def test_costs_are_fitted_on_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cost, "WIDTHS", (160, 320, 640))
    monkeypatch.setattr(bench_cost, "QUALITIES", (75, 97))
    cost, rows = bench_cost.fit_preparing(tmp_path, PreprocessSpec(size=64), 0.01)
    assert len(rows) == 6
    assert all(row["measured_s"] > 0 and row["fitted_s"] > 0 for row in rows)
    assert cost.fixed_s >= 0


def test_large_manifests_are_caches(tmp_path: Path) -> None:
    small = bench_cost.SmallCache(tmp_path)
    rows = bench_cost.over_manifest(tmp_path, small, (100, 1000))
    assert [row["photos"] for row in rows] == [100, 1000]
    assert all(row["peak_mib"] > 0 and row["split_s"] > 0 for row in rows)
    cache = PhotoCache.open(tmp_path / "rows_1000")
    assert len(cache.manifest) == 1000
    assert cache.manifest["patient"].n_unique() == 500
    assert cache.photos.shape == (1000, 32, 32, 3)
