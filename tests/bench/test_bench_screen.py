"""The server benchmark with small inputs, which must count wrong answers, and the table of the study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.suites.bench_serve import CLIENTS, serve_under_load
from bench.tables.report import RESULTS
from bench.tables.study_table import study_table
from tests.conftest import Trained


@pytest.mark.long
def test_wrong_answers_are_counted(trained: Trained, photo_folder: Path) -> None:
    files = sorted((photo_folder / "images").iterdir())[:6]
    found = serve_under_load(trained.bundle, files, seconds=1.0)
    assert found["answers"] >= CLIENTS
    assert found["lost_or_mixed_up"] == found["exit_code"] == 0
    assert 0 < found["p50_s"] <= found["p99_s"]
    # The same photos with their names rotated by one, so that every answer is wrong.
    swapped = photo_folder.parent / "swapped"
    swapped.mkdir(exist_ok=True)
    for one, other in zip(files, [*files[1:], files[0]], strict=True):
        (swapped / one.name).write_bytes(other.read_bytes())
    expected = sorted(swapped.iterdir())
    wrong = serve_under_load(trained.bundle, expected, seconds=0.5, expected_of=files)
    assert wrong["lost_or_mixed_up"] == wrong["answers"] > 0


def test_the_study_table_matches_its_result() -> None:
    result = json.loads(sorted(RESULTS.glob("study_cpu_*.json"))[-1].read_text())
    table = study_table(result)
    compared = [row for row in result["table"] if row["init"] != "scratch"]
    assert table.count("\n| ") == len(compared)
    row = compared[-1]
    assert f"{row['difference']:.3f} ({row['difference_low']:.3f} to {row['difference_high']:.3f})" in table
