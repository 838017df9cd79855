"""The benchmark of engines, tiny, and its figures belong together."""

from __future__ import annotations

import pytest

from bench import bench_engine
from bench.report import engine_table
from fastfundus.engines.openvino_backend import precisions


def test_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is compiled takes half a minute each, and their jobs are torch's.
    monkeypatch.setattr(bench_engine.torch, "compile", lambda model: model)
    monkeypatch.setattr(bench_engine, "COMPILED_AHEAD", ())
    part = bench_engine.measure("resnet18", 32, photos=2, rounds=1, singles=1)
    rates = part["images_per_s"]
    assert {f"OpenVINO {name}" for name in precisions()} <= set(rates)
    slow, fast = rates[bench_engine.EAGER], rates["OpenVINO int8"]
    assert part["int8_over_eager"]["median"] == pytest.approx(fast / slow)
    assert set(part["latency_ms"]) == set(rates) - {bench_engine.RAW}
    about = {"date": "2026-11-24", "commit": "abc", "machine": {"cpu": "x", "cores": 2}, "versions": {"torch": "2"}}
    assert bench_engine.matmul_rate(bench_engine.torch.float32) > 1
    rate = {"float32": 100.0, "bfloat16": 200.0}
    table = engine_table({**about, "matmul_gflops": rate, "parts": [part]})
    assert f"| {rates['OpenVINO fp32'] * part['gflop'] / 100:.0%} |" in table
    # ResNet-18 of 32 x 32 pixels: 1.8 GFLOP times two at 224 x 224, by 49.
    assert part["gflop"] == pytest.approx(3.64 / 49, rel=0.05)
    assert "| images/s | resnet18, 32 px |" in table
    assert f"| **OpenVINO int8** | {fast:.1f} |" in table
    assert f"{part['int8_over_eager']['median']:.2f} x" in table


def test_a_variant_that_differs_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "right": ("fp32", lambda photos: photos[:, 0, 0, :1] / 255),
        "wrong": ("fp32", lambda photos: 1 - photos[:, 0, 0, :1] / 255),
    }
    monkeypatch.setattr(bench_engine, "variants", lambda *arguments: wrong)
    with pytest.raises(SystemExit, match="wrong: differs by 1"):
        bench_engine.measure("resnet18", 32, photos=2, rounds=1, singles=1)
