"""A passing run proves that the kernels were tested, even when tests run in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TESTS = """
import pytest

@pytest.mark.kernel
def test_kernel():
    pytest.skip("no compiler")

@pytest.mark.kernel
@pytest.mark.gpu
def test_on_a_gpu():
    pytest.skip("no GPU")

def test_plain():
    pytest.skip("no photographs")
"""


@pytest.mark.parametrize(
    ("required", "processes", "named"),
    [
        pytest.param("", "0", [], marks=pytest.mark.long),
        ("FASTFUNDUS_REQUIRE_KERNELS", "1", ["test_kernel"]),
        pytest.param("FASTFUNDUS_REQUIRE_GPU", "0", ["test_kernel", "test_on_a_gpu"], marks=pytest.mark.long),
    ],
)
def test_skipped_kernel_tests_fail_the_run_that_requires_them(
    tmp_path: Path, required: str, processes: str, named: list[str]
) -> None:
    (tmp_path / "test_three.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTFUNDUS", "PYTEST"))}
    environment |= {required: "1"} if required else {}
    options = f"-p tests.conftest -c pyproject.toml -n {processes}".split()
    command = [sys.executable, "-m", "pytest", *options, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert done.returncode == (1 if named else 0), done.stdout + done.stderr
    summary = next(
        (line for line in done.stdout.splitlines() if line.startswith("FAILED: kernel tests were skipped")), ""
    )
    assert [name for name in ("test_kernel", "test_on_a_gpu", "test_plain") if name in summary] == named
