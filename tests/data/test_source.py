"""Listing of sources and reading of labels: every fault is reported and every input is listed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastfundus.data import list_photos
from fastfundus.data.labels import read_labels
from fastfundus.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def table(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text)
    return path


def test_a_folder_is_searched_and_sorted(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.PNG", "a.jpg", "b/1.tiff", "notes.txt", ".thumbs/a.jpg", "b/.hidden.jpg")
    listing = list_photos(tmp_path)
    assert [photo.name for photo in listing.photos] == ["a.jpg", "b/1.tiff", "b/2.PNG"]
    assert "1 .txt" in listing.notes[0]


def test_patient_and_eye_from_names(tmp_path: Path) -> None:
    names = ["10_left.jpg", "10_right.jpg", "Patient007_R.jpg", "0017_OD_f_1.jpg", "x-OS.png", "plain.jpg"]
    photos = {photo.name: photo for photo in list_photos(touch(tmp_path, *names)).photos}
    assert {name: (photo.patient, photo.eye) for name, photo in photos.items()} == {
        "10_left.jpg": ("10", "L"),
        "10_right.jpg": ("10", "R"),
        "Patient007_R.jpg": ("Patient007", "R"),
        "0017_OD_f_1.jpg": ("0017", "R"),
        "x-OS.png": ("x", "L"),
        "plain.jpg": ("plain.jpg", None),
    }
    assert not photos["plain.jpg"].patient_known


def test_restarted_numbering_keeps_patients_apart(tmp_path: Path) -> None:
    listing = list_photos(touch(tmp_path, "north/1_left.jpg", "south/1_left.jpg", "south/1_right.jpg"))
    assert [photo.patient for photo in listing.photos] == ["north/1", "south/1", "south/1"]


def test_one_folder_of_images_adds_nothing_to_the_patient(tmp_path: Path) -> None:
    assert [photo.patient for photo in list_photos(touch(tmp_path, "images/1_left.jpg")).photos] == ["1"]


def test_named_files_are_inputs_whatever_their_ending_and_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.dat", "b.jpg")
    listing = list_photos([tmp_path / "a.dat", tmp_path / "b.jpg", tmp_path, tmp_path / "b.jpg"])
    assert [photo.name for photo in listing.photos] == ["a.dat", "b.jpg"]
    assert sum("given twice" in note for note in listing.notes) == 2


def test_classes_are_recognised_by_a_normal_folder(tmp_path: Path) -> None:
    touch(tmp_path, "normal/1_left.jpg", "glaucoma/1_right.jpg", "drusen/2_left.jpg")
    photos = list_photos(tmp_path).photos
    assert [(photo.columns["class"], photo.columns["abnormal"]) for photo in photos] == [
        ("drusen", 1.0),
        ("glaucoma", 1.0),
        ("normal", 0.0),
    ]
    # A patient with one eye in each of two folders remains one patient.
    assert [photo.patient for photo in photos] == ["2", "1", "1"]
    assert list_photos(tmp_path, adapter="folder").photos[0].columns == {}


def test_labels_join_by_path_or_by_unique_name(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.jpg", "other/c.jpg")
    labels = table(tmp_path, "file,abnormal,age\nimages/a.jpg,1,60\nb.jpg,0,\n")
    listing = list_photos(tmp_path, labels=labels)
    columns = {photo.name: photo.columns for photo in listing.photos}
    assert columns["images/a.jpg"] == {"abnormal": 1.0, "age": 60.0}
    assert columns["images/b.jpg"] == {"abnormal": 0.0, "age": None}
    assert columns["other/c.jpg"] == {}
    assert any("has no row for 1 of the photos" in note for note in listing.notes)


def test_a_csv_alone_is_a_source(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "x/unnamed.jpg")
    listing = list_photos(table(tmp_path, "file,patient\nx/a.jpg,p7\n"))
    assert [(photo.name, photo.patient) for photo in listing.photos] == [("x/a.jpg", "p7")]


def test_a_named_photo_that_is_not_there_becomes_an_input(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    listing = list_photos(tmp_path, labels=table(tmp_path, "file,abnormal\na.jpg,0\ngone.jpg,1\n"))
    gone = listing.photos[1]
    assert gone.name == "gone.jpg"
    assert gone.issue is not None
    assert "labels.csv, line 3" in gone.issue


def test_identical_rows_are_merged_and_contradictory_ones_refused(tmp_path: Path) -> None:
    labels = read_labels(table(tmp_path, "file,abnormal\na.jpg,1\nb.jpg,0\na.jpg,1\n"))
    assert [(row.file, row.columns["abnormal"]) for row in labels.rows] == [("a.jpg", 1.0), ("b.jpg", 0.0)]
    assert "line 4: a.jpg is already listed in line 2; duplicate row ignored" in labels.notes[0]
    message = r"lines 2 \(a.jpg\) and 4 \(a.jpg\) describe the same photo with different abnormal \(1.0 and 0.0\)"
    with pytest.raises(DataError, match=message):
        read_labels(table(tmp_path, "file,abnormal\na.jpg,1\nb.jpg,0\na.jpg,0\n"))


@pytest.mark.parametrize("unknown", ["", "NaN", "nan", "NA", "null", "?", "1e999"])
def test_unknown_labels_stay_unknown(tmp_path: Path, unknown: str) -> None:
    labels = read_labels(table(tmp_path, f"file,abnormal\na.jpg,{unknown}\nb.jpg,1\nc.jpg,0\n"))
    assert [row.columns["abnormal"] for row in labels.rows] == [None, 1.0, 0.0]
    assert "label 'abnormal' is unknown for a.jpg (line 2)" in labels.notes[0]


def test_a_patient_in_two_splits_is_taken_out_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    text = "file,patient,split\na.jpg,p1,train\nb.jpg,p1,test\nc.jpg,p2,validation\n"
    listing = list_photos(tmp_path, labels=table(tmp_path, text))
    assert [photo.split for photo in listing.photos] == ["excluded", "excluded", "val"]
    assert any("patient p1 is in test and train (a.jpg, b.jpg)" in note for note in listing.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no header"),
        ("who,abnormal\na,1\n", "no column that identifies the photos; columns: who, abnormal"),
        ("file,abnormal\na.jpg,1,0\n", "line 2: has 3 cells but the header has 2"),
        ("file,abnormal,abnormal\na.jpg,1,0\n", "has the column 'abnormal' twice"),
    ],
)
def test_a_wrong_label_file_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(table(tmp_path, text))


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("file,abnormal\na.jpg,1\n", encoding="utf-8-sig")
    assert read_labels(path).rows[0].file == "a.jpg"


def test_nothing_and_nowhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no photos"):
        list_photos(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        list_photos(tmp_path / "gone")
    with pytest.raises(DataError, match="needs a label file"):
        list_photos(touch(tmp_path, "a.jpg"), adapter="csv")


@pytest.mark.usefixtures("shut_folders")
def test_a_folder_that_cannot_be_searched_is_lost_and_reported(tmp_path: Path) -> None:
    touch(tmp_path, "open/a.jpg", "shut/b.jpg")
    listing = list_photos(tmp_path)
    assert [photo.name for photo in listing.photos] == ["open/a.jpg"]
    assert "shut: cannot be searched" in listing.lost[0]


def test_links_to_folders_are_reported_but_not_followed(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.jpg", "elsewhere/b.jpg")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    listing = list_photos(tmp_path / "photos")
    assert [photo.name for photo in listing.photos] == ["a.jpg"]
    assert sum("photos/link: links to folders are not followed" in note for note in listing.notes) == 1


def test_dicom_files_without_an_ending_are_photos(tmp_path: Path) -> None:
    """Cameras write disks with files such as IM000001 next to a DICOMDIR."""
    touch(tmp_path, "notes", "STUDY/README")
    for name in ("STUDY/IM000001", "DICOMDIR"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(100))
    assert [photo.name for photo in list_photos(tmp_path).photos] == ["STUDY/IM000001"]


def test_dicom_files_named_by_their_identifier_are_photos(tmp_path: Path) -> None:
    (tmp_path / "1.2.840.113619.2").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "scan.001").write_bytes(b"no DICOM")
    assert [photo.name for photo in list_photos(tmp_path).photos] == ["1.2.840.113619.2"]


def test_a_list_names_photos_and_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a/1_left.jpg", "a/2.jpg", "b/3.png", "c/4.jpg")
    chosen = tmp_path / "list.txt"
    chosen.write_text(f"# of the day\na/1_left.jpg\n\n{tmp_path / 'b'}\nc/gone.jpg\n")
    listing = list_photos(chosen)
    assert [photo.name for photo in listing.photos] == ["a/1_left.jpg", "b/3.png", "c/gone.jpg"]
    chosen.write_text("# nothing\n")
    with pytest.raises(DataError, match="names no photo"):
        list_photos(chosen)
