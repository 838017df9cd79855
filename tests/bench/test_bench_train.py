"""The benchmark of training runs, tiny, and its figures belong together."""

from __future__ import annotations

import pytest

from bench import bench_train
from bench.report import train_table


def test_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    part = bench_train.measure("resnet18", 32, 4, steps=1, rounds=1, photos=96)
    ms = part["ms"]
    assert set(ms) == {bench_train.PEER, bench_train.OURS, bench_train.RESIDENT, bench_train.SINGLE}
    assert part["speedup"]["median"] == pytest.approx(ms[bench_train.PEER] / ms[bench_train.OURS])
    assert part["of_step"]["median"] == pytest.approx(ms[bench_train.RESIDENT] / ms[bench_train.OURS])
    about = {"date": "2026-11-24", "commit": "abc", "machine": {"cpu": "x", "cores": 2}, "versions": {"torch": "2"}}
    table = train_table({**about, "parts": [part]})
    assert "| resnet18, 32 px, batch 4 |" in table
    assert f"{part['speedup']['median']:.1f} x" in table
