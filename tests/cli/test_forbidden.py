"""Tests with files and folders that the operating system refuses to open."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.conftest import Trained


@pytest.fixture
def unprivileged() -> list[str]:
    """Return a command prefix that makes chmod effective even for the superuser."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("the superuser can read every file, and setpriv (util-linux), which prevents that, is missing")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


def test_forbidden_files_get_rows_and_folders_fail_the_run(
    trained: Trained, broken_photos: Path, tmp_path: Path, unprivileged: list[str]
) -> None:
    def screen(output: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastfundus", "screen", str(trained.bundle.path), str(broken_photos)]
        return subprocess.run(
            [*unprivileged, *command, "--output", str(output)], capture_output=True, text=True, timeout=120
        )

    (broken_photos / "good.jpg").chmod(0)
    done = screen(tmp_path / "first")
    assert done.returncode == 0, done.stderr
    rows = {row["path"]: row for row in pl.read_csv(tmp_path / "first" / "results.csv").iter_rows(named=True)}
    assert len(rows) == 10
    assert rows["good.jpg"]["status"] == "unreadable"
    assert "chmod" in rows["good.jpg"]["reason"]

    (broken_photos / "shut").mkdir(mode=0)
    try:
        done = screen(tmp_path / "second")
    finally:
        (broken_photos / "shut").chmod(0o755)
    assert done.returncode == 1
    assert "shut: cannot be searched (Permission denied)" in done.stderr
    assert len(pl.read_csv(tmp_path / "second" / "results.csv")) == 10
