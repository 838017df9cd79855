"""The GPU suite's logic, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_suite, gpu_table, gpu_train

ROOT = Path(__file__).parents[2]


def suite(*arguments: str | Path, **surroundings: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "bench" / "gpu_suite.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, **surroundings}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_dry_run_tests_measures_and_writes(tmp_path: Path) -> None:
    done = suite("--dry-run", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("gpu_dry_run_")
    whole = json.loads(path.read_text())
    result = whole["kernels"]
    assert done.stdout.count("\n| triton: ") == 6
    assert "not measured" not in done.stdout
    assert result["dry_run"] is True
    assert result["tests"]["tests"] > 20
    assert {result["tests"][name] for name in ("failures", "errors", "skipped")} == {0}
    assert result["copy_gb_per_s"] > 0
    assert len(result["triton"]) == 6
    for name, row in result["triton"].items():
        assert "failed" not in row, name
        assert row["ms"] > 0
        assert row["share_of_copy"] > 0
    # No GPU, no claim about the twin.
    assert result["cuda"] == {}
    assert result["peers"]["torchvision v2"]["photos_per_s"] > 0
    assert result["dali"]["hw_decoder_load 0.0"]["photos_per_s"] > 0
    (part,) = whole["train"]["parts"]
    assert len(part["images_per_s"]) == 4
    assert all(rate > 0 for rate in part["images_per_s"].values())
    rates = part["images_per_s"]
    assert part["overlap"][gpu_train.PINNED] == rates[gpu_train.PINNED] / rates[gpu_train.COMPILED]
    (part,) = whole["engine"]["parts"]
    assert len(part["images_per_s"]) == 4
    assert max(part["largest_difference"].values()) < 0.05


def test_what_runs_on_a_bare_gpu_machine_needs_no_tables(tmp_path: Path) -> None:
    """torch, Triton, timm, NumPy, OpenCV and pytest are all that there is."""
    absent = ["polars", "pyarrow", "sklearn", "scipy", "simplejpeg", "pydicom", "safetensors", "jinja2", "click"]
    programs = "bench.gpu_suite, bench.gpu_train, bench.gpu_engine, bench.gpu_table"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {programs}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu_suite", "--tests", tmp_path / "t.xml", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert "no GPU is visible" in done.stderr
    assert not list(tmp_path.iterdir())


def test_bytes_by_hand() -> None:
    """512 px to 512 px, whole: 3 bytes in and 6 out a pixel. 10 megapixels: a square of 2592 px, read once."""
    case = gpu_suite.make_case("", 512, 512, 2, 512, torch.bfloat16, turned=False)
    assert (case.source_bytes, case.output_bytes) == (2 * 3 * 512 * 512, 2 * 6 * 512 * 512)
    case = gpu_suite.make_case("", 2592, 3872, 1, 512, torch.float32, turned=False)
    assert case.source_bytes == pytest.approx(3 * 2592 * 2592, rel=1e-5)
    assert case.output_bytes == 12 * 512 * 512


def test_a_wrong_result_has_no_time() -> None:
    case = gpu_suite.make_case("", 16, 16, 2, 16, torch.float32, turned=True)
    row = gpu_suite.report(case, {"ms": 1.0}, wrong=0.5, copy=100.0)
    assert row["failed"].startswith("differs from the reference by 0.5")
    assert "ms" not in row
    assert "failed" in gpu_suite.report(case, {"ms": 1.0}, wrong=float("nan"), copy=100.0)
    right = gpu_suite.report(case, {"ms": 1.0}, wrong=0.0, copy=100.0)
    assert right["gb_per_s"] == pytest.approx((case.source_bytes + case.output_bytes) / 1e6)
    assert right["share_of_copy"] == pytest.approx(right["limit_ms"])


def test_parts_of_different_runs_are_not_taken_together(tmp_path: Path) -> None:
    (tmp_path / "kernels_h200_202611.json").write_text("{}")
    (tmp_path / "train_h100_202610.json").write_text("{}")
    with pytest.raises(SystemExit, match="parts of different runs"):
        gpu_table.merged(tmp_path)
    with pytest.raises(SystemExit, match="holds no kernels"):
        gpu_table.merged(tmp_path / "nowhere")


def test_a_crashed_test_run_is_no_success(tmp_path: Path) -> None:
    assert gpu_suite.tests_of(tmp_path / "nothing.xml") == {"crashed": 1}
