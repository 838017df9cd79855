"""The Python API for screening."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

import fastfundus
from fastfundus.data import list_photos
from fastfundus.errors import DataError
from fastfundus.records import SourcePhoto
from fastfundus.screening.output import _pack, _unpack
from fastfundus.screening.run import screen_to_folder
from tests.conftest import Trained
from tests.photo.test_dicom import dicom


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


def test_dicom_tells_people_apart_that_names_do_not(trained: Trained, photo_folder: Path, tmp_path: Path) -> None:
    """Two people were examined first, and the names say nothing else."""
    with Image.open(sorted((photo_folder / "images").glob("*.jpg"))[0]) as photo:
        rgb = np.array(photo.convert("RGB"))
    folder = tmp_path / "dicom"
    folder.mkdir()
    for name, patient, eye in (("exam1_OD", "A", "R"), ("exam1_OS", "B", "L"), ("exam2_OD", "A", "L")):
        size = {"Rows": rgb.shape[0], "Columns": rgb.shape[1]}
        (folder / f"{name}.dcm").write_bytes(dicom(rgb.tobytes(), PatientID=patient, ImageLaterality=eye, **size))
    listing = list_photos(folder)
    screen_to_folder(listing, trained.bundle, tmp_path / "out", sources=[folder])
    rows = pl.read_parquet(tmp_path / "out" / "results.parquet")
    assert dict(zip(rows["path"], zip(rows["patient"], rows["eye"], strict=True), strict=True)) == {
        "exam1_OD.dcm": ("A", "R"),
        "exam1_OS.dcm": ("B", "L"),
        "exam2_OD.dcm": ("A", None),
    }
    assert pl.read_csv(tmp_path / "out" / "patients.csv")["patient"].to_list() == ["A", "B"]


def test_the_stored_inputs_keep_what_only_names_say(tmp_path: Path) -> None:
    """A resumed run reads them; runs of earlier versions lack these columns."""
    photo = SourcePhoto(
        tmp_path / "10_left.jpg", "10_left.jpg", "10", True, "L", patient_by_name=True, eye_by_name=True
    )
    table = _pack([photo])
    (again,) = _unpack(table)
    assert (again.patient_by_name, again.eye_by_name, again.eye) == (True, True, "L")
    (earlier,) = _unpack(table.drop("patient_by_name", "eye_by_name"))
    assert (earlier.patient_by_name, earlier.eye_by_name, earlier.patient) == (False, False, "10")
    mixed = pl.concat([table.drop("patient_by_name", "eye_by_name"), table], how="diagonal")
    assert [bool(entry.eye_by_name) for entry in _unpack(mixed)] == [False, True]
