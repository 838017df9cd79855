"""The Python API for screening."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastfundus
from fastfundus.data import list_photos
from fastfundus.errors import DataError
from fastfundus.screening.run import screen_to_folder
from tests.conftest import Trained


def test_records_are_the_rows_of_a_run(trained: Trained, broken_photos: Path, tmp_path: Path) -> None:
    run = screen_to_folder(list_photos(broken_photos), trained.bundle, tmp_path / "out", sources=[broken_photos])
    rows = list(fastfundus.screen(broken_photos, trained.bundle.path))
    assert rows == run.results.to_dicts()
    one = next(fastfundus.screen([str(broken_photos / "good.jpg")], trained.bundle))
    assert (one["path"], one["decision"]) == (
        "good.jpg",
        next(row for row in rows if row["path"] == "good.jpg")["decision"],
    )


def test_import_order_does_not_matter(trained: Trained, broken_photos: Path) -> None:
    calls = f"print(len(list(fastfundus.screen({str(broken_photos)!r}, {str(trained.bundle.path)!r}))))"
    for first in (
        "import fastfundus",
        "import fastfundus, fastfundus.screening.policy",
        "from fastfundus import screen; import fastfundus",
    ):
        done = subprocess.run([sys.executable, "-c", f"{first}; {calls}"], capture_output=True, text=True, timeout=60)
        assert done.stdout == "10\n", done.stderr


@pytest.mark.usefixtures("shut_folders")
def test_unlistable_folders_are_an_error(trained: Trained, broken_photos: Path) -> None:
    (broken_photos / "shut").mkdir()
    with pytest.raises(DataError, match="some inputs could not be listed"):
        fastfundus.screen(broken_photos, trained.bundle)
