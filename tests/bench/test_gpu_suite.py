"""Logic of the GPU suite, tested on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import part as gpu_part
from bench.gpu import suite as gpu_suite
from bench.gpu import table as gpu_table
from bench.gpu import train as gpu_train
from bench.harness.comparison import Case, Variant, compare

ROOT = Path(__file__).parents[2]


def suite(*arguments: str | Path, **surroundings: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "bench" / "gpu_suite.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, **surroundings}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.long
def test_dry_run_tests_measures_and_writes(tmp_path: Path) -> None:
    done = suite("--dry-run", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("gpu_dry_run_")
    whole = json.loads(path.read_text())
    result = whole["kernels"]
    assert "not measured" not in done.stdout
    assert result["dry_run"] is True
    assert result["tests"]["tests"] > 20
    assert {result["tests"][name] for name in ("failures", "errors", "skipped")} == {0}
    assert result["copy_gb_per_s"] > 0
    found = {case["case"]["name"]: case for part in whole.values() for case in part["cases"]}
    assert len(found) == 9
    for name, case in found.items():
        assert "failed" not in case, case
        for variant, row in case["variants"].items():
            assert row["photos_per_s"] > 0
            assert f"| {name}: {variant} | {row['photos_per_s']:,.0f}" in done.stdout
    sampled = found["sample 16 to 16, float32"]
    # Without a GPU, the CUDA twin is not measured.
    assert list(sampled["variants"]) == ["Triton"]
    assert sampled["variants"]["Triton"]["share_of_limit"] > 0
    assert set(found["augment at 16 px"]["variants"]) == {"Triton", "torchvision v2"}
    steps = found["train: test_resnet, 32 px, batch 4"]
    assert len(steps["variants"]) == 4
    assert steps["case"]["limit"]["what"] == gpu_train.COMPILED
    assert steps["variants"][gpu_train.COMPILED]["limit"]["what"] == "matrix products in bf16"
    engines = found["engine: test_resnet, 32 px, batch 4"]["variants"]
    assert len(engines) == 4
    assert max(row["distance"] for row in engines.values()) < 0.05


def test_gpu_programs_import_without_optional_packages(tmp_path: Path) -> None:
    """Import the programs without packages that a machine with torch, Triton, timm, NumPy and OpenCV may lack."""
    absent = ["polars", "pyarrow", "sklearn", "scipy", "simplejpeg", "pydicom", "safetensors", "jinja2", "click"]
    programs = "bench.gpu.suite, bench.gpu.train, bench.gpu.engine, bench.gpu.table"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {programs}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the behaviour without a GPU")
def test_without_a_gpu_it_exits_with_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu.suite", "--tests", tmp_path / "t.xml", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert "no GPU is visible" in done.stderr
    assert not list(tmp_path.iterdir())


def test_bytes_by_hand() -> None:
    """Whole photos at 512 px: 3 bytes in and 6 out per pixel. 10 megapixels: a square of 2592 px, read once."""
    inputs = gpu_suite.make_inputs("", 512, 512, 2, 512, torch.bfloat16, turned=False)
    assert (inputs.source_bytes, inputs.output_bytes) == (2 * 3 * 512 * 512, 2 * 6 * 512 * 512)
    inputs = gpu_suite.make_inputs("", 2592, 3872, 1, 512, torch.float32, turned=False)
    assert inputs.source_bytes == pytest.approx(3 * 2592 * 2592, rel=1e-5)
    assert inputs.output_bytes == 12 * 512 * 512


def test_a_wrong_case_has_no_figures_and_affects_no_other() -> None:
    def breaks() -> None:
        raise RuntimeError("out of memory")

    def job(*variants: Variant) -> dict[str, Any]:
        return gpu_part.measured("job", lambda: compare(Case("job", "", 1), list(variants), rounds=1))

    found = job(Variant("right", lambda: 1.0, True), Variant("wrong", lambda: 2.0))
    assert found == {"case": {"name": "job"}, "failed": found["failed"]}
    assert "wrong differs from right by 1" in found["failed"]
    assert job(Variant("x", breaks, True))["failed"] == "out of memory"
    kernels = {"cases": [found], "tests": {}, "gpu": None, "copy_gb_per_s": 1.0, "date": "", "commit": ""}
    assert "| job | job: wrong differs from right" in gpu_table.gpu_table({"kernels": kernels})


def test_a_stopped_part_keeps_finished_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a part from outside in the middle of a case, as `gpu_suite.sh` does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(sys, "argv", ["bench.gpu.train", "--output", str(tmp_path)])

    def measure(backbone: str, *_: Any, dry_run: bool) -> dict[str, Any]:
        if backbone == "two":
            raise RuntimeError("out of memory")
        if backbone == "three":
            raise SystemExit(143)
        return {"case": {"name": "one"}, "variants": {}}

    cases = [(name, 32, 4) for name in ("one", "two", "three", "four")]
    with pytest.raises(SystemExit):
        gpu_train.run_cases("train", measure, cases, cases[0])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("train_h200_")
    failures = [found.get("failed") for found in json.loads(path.read_text())["cases"]]
    assert failures == [None, "out of memory", "not measured: no time was left", "not measured: no time was left"]


def test_parts_of_different_runs_are_not_merged(tmp_path: Path) -> None:
    (tmp_path / "kernels_h200_202611.json").write_text("{}")
    (tmp_path / "train_h100_202610.json").write_text("{}")
    with pytest.raises(SystemExit, match="parts of different runs"):
        gpu_table.merged(tmp_path)
    with pytest.raises(SystemExit, match="contains no kernels"):
        gpu_table.merged(tmp_path / "nowhere")


def test_a_crashed_test_run_is_reported(tmp_path: Path) -> None:
    assert gpu_part.tests_of(tmp_path / "nothing.xml") == {"crashed": 1}
