"""Tests that compile all Triton tilings and csrc without a GPU and check for spills and changed resource usage."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).parent / "compiled.json"
"""Resource usage of each variant; `python -m tests.kernels.compile_triton tests/kernels/compiled.json` updates it."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("compiled") / "compiled.json"
    surroundings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_triton", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_every_variant_compiles_without_spills(compiled: dict[str, Any]) -> None:
    assert {name for name, used in compiled["variants"].items() if used["spilled_bytes"]} == set()
    # A multiprocessor has 65,536 registers: 128 per thread allow 512 threads with eight pixels each. With two pixels
    # per thread, 64 are enough.
    most = {"BLOCK=256": 64, "BLOCK=512": 80, "BLOCK=1024": 128}
    for name, used in compiled["variants"].items():
        (block,) = (part for part in name.split() if part.startswith("BLOCK="))
        assert used["registers"] <= most[block], name


def test_the_record_is_kept(compiled: dict[str, Any]) -> None:
    record = json.loads(RECORD.read_text())
    assert set(compiled["variants"]) == set(record["variants"])
    if compiled["triton"] == record["triton"]:
        assert compiled["variants"] == record["variants"]
    for name, used in compiled["variants"].items():
        # Another compiler version may allocate registers differently, but by no more than a third.
        assert used["registers"] <= record["variants"][name]["registers"] * 4 / 3, name


@pytest.fixture(scope="module")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the fatbin and the library, and the output of the compiler."""
    assert shutil.which("nvcc"), "nvcc is needed to compile csrc: install the CUDA toolkit"
    folder = tmp_path_factory.mktemp("csrc")
    command = ["make", "-C", str(ROOT / "csrc"), f"BUILD={folder}", "fatbin", "library"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_csrc_compiles_without_warnings_or_spills(cuda_build: tuple[Path, str]) -> None:
    _, said = cuda_build
    # The echoed command line contains all-warnings and warn-spills, which are options and not warnings.
    assert not re.search(r"warning\b.*:|: warning", said.replace("warn-spills", ""), re.IGNORECASE)
    kernels = re.findall(r"Function properties for (fastfundus_sample_\w+)\n\s+(.*)\n", said)
    assert len(kernels) == 2 * 3 * 12
    assert {spills for _, spills in kernels} == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
    assert max(int(registers) for registers in re.findall(r"Used (\d+) registers", said)) <= 48


def dumped(*arguments: str | Path) -> str:
    """Return the output of cuobjdump, which Triton's wheel contains together with nvdisasm, which it calls."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    surroundings = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [tools / "cuobjdump", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=surroundings).stdout


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_csrc_writes_16_bytes_at_once(cuda_build: tuple[Path, str], architecture: str) -> None:
    folder, _ = cuda_build
    text = dumped("--dump-sass", "--gpu-architecture", architecture, folder / "sample.fatbin")
    functions = dict(re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", text, re.DOTALL))
    assert len(functions) == 12
    for name, code in functions.items():
        # Loads from shared memory and stores to the output are 16 bytes wide; other sizes are stored value by value.
        assert re.search(r"\bLDS\.128\b", code), name
        assert re.search(r"\bSTG\.E\.128\b", code), name
        assert re.search(r"\bSTG\.E(\.U16|\.U8)? ", code), name
        # Accesses to local memory would mean that registers are spilled.
        assert not re.search(r"\b(STL|LDL)\b", code), name


def test_the_fatbin_holds_code_for_later_gpus(cuda_build: tuple[Path, str]) -> None:
    folder, _ = cuda_build
    listed = dumped("--list-elf", "--list-ptx", folder / "sample.fatbin")
    assert {"sm_80.cubin", "sm_90.cubin", "sm_100.cubin", "sm_100.ptx"} <= set(re.findall(r"sm_\d+\.\w+", listed))


def test_cmake_builds_the_same(tmp_path: Path) -> None:
    # Prefer the cmake of the extra `dev`, installed next to the interpreter.
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake, "cmake is needed to build csrc: pip install 'fastfundus[dev]'"
    for command in ([cmake, "-S", str(ROOT / "csrc"), "-B", str(tmp_path)], [cmake, "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "libfastfundus_sample.so").is_file()
    assert (tmp_path / "libfastfundus_sample_host.so").is_file()
