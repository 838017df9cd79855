"""The tables agree with the results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench.tables.case_tables import loader_table, prepare_table, sample_table
from bench.tables.cost_tables import cluster_table, serve_table
from bench.tables.labels import label
from bench.tables.model_tables import SCREEN_PEERS, engine_table, screen_table, train_table
from bench.tables.report import PACKAGES, RESULTS, condense
from bench.tables.targets import newest, targets_table


def result(suite: str) -> dict[str, Any]:
    return newest(RESULTS, suite)


def times(found: dict[str, Any], name: str) -> list[float]:
    values: list[float] = found["variants"][name]["times_ms"]
    return values


def test_every_suite_has_a_result_of_one_run() -> None:
    for suite in PACKAGES:
        for found in result(suite)["cases"]:
            assert sum(row["reference"] for row in found["variants"].values()) == 1, suite
            for row in found["variants"].values():
                assert len(row["times_ms"]) == found["rounds"]
                assert statistics.median(row["times_ms"]) == pytest.approx(row["ms"])


@pytest.mark.parametrize(
    ("suite", "table"),
    [("prepare", prepare_table), ("loader", loader_table), ("sample", sample_table), ("engine", engine_table)],
)
def test_a_row_for_each_variant(suite: str, table: Any) -> None:
    found, drawn = result(suite), table(result(suite))
    for case in found["cases"]:
        for name, row in case["variants"].items():
            digits = 1 if suite == "engine" else 0
            rate = f"{row['photos_per_s']:.{digits}f}"
            assert any(label(name) in line and rate in line for line in drawn.splitlines() if line.startswith("|"))
    assert found["commit"] in drawn


def test_ratios_are_of_the_same_round() -> None:
    (found,) = result("screen")["cases"]
    ratios = [a / b for a, b in zip(times(found, SCREEN_PEERS), times(found, "screen, bf16"), strict=True)]
    summary = f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
    assert summary in screen_table(result("screen"))
    assert f"bf16 {statistics.median(ratios):.1f}x" in targets_table(RESULTS)
    assert targets_table(RESULTS).count("| open |") == 3


def test_training_is_compared_with_its_step() -> None:
    found = result("train")["cases"][0]
    ours, step = (
        statistics.median(times(found, name)) for name in ("FastFundus, train --amp", found["case"]["limit"]["what"])
    )
    assert f"{step / ours:.0%}" in train_table(result("train"))


def test_the_server_and_the_cluster() -> None:
    assert "0 lost or mixed up" in serve_table(result("serve"))
    screen = result("screen")
    cluster = cluster_table(screen, result("serve"))
    rate = screen["cases"][0]["variants"]["screen, bf16"]["photos_per_s"] / screen["machine"]["cores"]
    assert f"| screen, bf16 | {rate:.2f} | {1e8 / rate / 3600:,.0f} |" in cluster
    assert "extrapolated" in cluster


def test_a_run_without_timing_is_refused(tmp_path: Path) -> None:
    raw = {"benchmarks": [], "datetime": "2026-11-24", "commit_info": {}, "machine_info": {}}
    with pytest.raises(SystemExit, match="the run contains no cases"):
        condense(json.loads(json.dumps(raw)), "train")
