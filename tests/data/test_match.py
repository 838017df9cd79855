"""Names in tables and lists: each denotes one photo or none, and nobody gets the labels of someone else."""

from __future__ import annotations

import time
import unicodedata
from pathlib import Path

import pytest

from fastfundus.data import list_photos
from fastfundus.data.match import without_photo_suffix
from fastfundus.errors import DataError


def join(folder: Path, photos: list[str], rows: str, source: str = ".") -> dict[str, str | None]:
    """Return the patient that each photo got from a table; photos without a row are absent."""
    for name in photos:
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(b"x")
    table = folder / "labels.csv"
    table.write_text("file,patient\n" + rows)
    listing = list_photos(folder / "photos" / source, labels=table)
    return {photo.name: photo.patient for photo in listing.photos if photo.patient_known}


def test_a_row_of_a_missing_photo_takes_no_other_photo_of_the_same_name(tmp_path: Path) -> None:
    rows = "siteA/1.jpg,Anna\nsiteA/2.jpg,Ben\nsiteB/1.jpg,Carla\n"
    assert join(tmp_path, ["siteA/1.jpg", "siteA/2.jpg"], rows) == {
        "siteA/1.jpg": "Anna",
        "siteA/2.jpg": "Ben",
        "siteB/1.jpg": "Carla",
    }
    table = tmp_path / "labels.csv"
    missing = [photo for photo in list_photos(tmp_path / "photos", labels=table).photos if photo.issue]
    assert [photo.name for photo in missing] == ["siteB/1.jpg"]
    assert "line 4" in str(missing[0].issue)


def test_the_folder_of_a_source_tells_names_apart(tmp_path: Path) -> None:
    found = join(tmp_path, ["siteA/1.jpg", "siteA/2.jpg"], "siteA/1.jpg,Anna\nsiteB/1.jpg,Carla\n", source="siteA")
    assert found["1.jpg"] == "Anna"
    assert "Carla" not in {found.get("1.jpg"), found.get("2.jpg")}


@pytest.mark.parametrize(
    ("photo", "name"),
    [
        ("a.JPG", "a.jpg"),
        ("Left Eye/A.jpeg", "left eye/a.jpeg"),
        (unicodedata.normalize("NFD", "Müller.jpg"), unicodedata.normalize("NFC", "Müller.jpg")),
        ("10_left.jpeg", "10_left"),
        ("x/10_left.jpeg", "10_left.png"),
        ("x/y/a.jpg", "y/a.jpg"),
        ("x/y/a.jpg", "y\\a.jpg"),
        ("a.jpg", "C:\\Users\\me\\data\\a.jpg"),
        ("a.jpg", "/home/me/data/a.jpg"),
        ("a.jpg", "./a.jpg"),
        ("im0001.ppm.gz", "im0001"),
        ("1.2.840.113619.2.5.dcm", "1.2.840.113619.2.5"),
    ],
)
def test_a_name_denotes_its_photo_whatever_the_spelling(tmp_path: Path, photo: str, name: str) -> None:
    found = join(tmp_path, [photo, "other.jpg"], f"{name},Anna\n")
    assert found == {photo: "Anna"}


@pytest.mark.parametrize(
    ("photos", "rows", "message"),
    [
        (["x/1.jpg", "y/1.jpg"], "1.jpg,Anna\n", "line 2: 1.jpg fits 2 photos"),
        (["1.jpg", "1.png"], "1,Anna\n", "line 2: 1 fits 2 photos"),
        (["a.jpg"], "a.jpg,Anna\nA.jpg,Ben\n", r"lines 2 \(a.jpg\) and 3 \(A.jpg\) name the same photo"),
        (["1.jpg"], "/x/siteA/1.jpg,Anna\n/x/siteB/1.jpg,Ben\n", r"lines 2 \(/x/siteA/1.jpg\) and 3 \(/x/siteB/"),
        (["x/1.jpg"], "x/1.jpg,Anna\n1.jpg,Ben\n", r"lines 2 \(x/1.jpg\) and 3 \(1.jpg\)"),
        (["a.jpg"], "a.jpg,Anna\na.jpg,Ben\n", r"lines 2 \(a.jpg\) and 3 \(a.jpg\) name the same photo"),
    ],
)
def test_ambiguous_and_double_names_are_refused_with_both_rows(
    tmp_path: Path, photos: list[str], rows: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        join(tmp_path, photos, rows)


def test_exact_spelling_wins_over_folded_spelling(tmp_path: Path) -> None:
    assert join(tmp_path, ["a.jpg", "A.jpg"], "a.jpg,Anna\nA.jpg,Ben\n") == {"a.jpg": "Anna", "A.jpg": "Ben"}


def test_paths_of_another_machine_match_by_file_name_and_are_noted(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("file,patient\n/mnt/train/1.jpg,Anna\n/mnt/test/2.jpg,Ben\n")
    listing = list_photos(tmp_path / "photos", labels=tmp_path / "labels.csv")
    assert [photo.patient for photo in listing.photos] == ["Anna", "Ben"]
    assert any("2 names were matched by the end of their paths" in note for note in listing.notes)


@pytest.mark.parametrize(
    ("photos", "rows", "expected"),
    [
        (["siteA/1.jpg", "siteA/2.jpg"], "siteB/1.jpg,Carla\nsiteB/2.jpg,Dora\n", {}),
        (["siteA/1.jpg", "siteB/2.jpg"], "siteB/1.jpg,Carla\n", {}),
        (["siteA/1.jpg", "siteB/2.jpg"], "/x/siteB/1.jpg,Carla\n/x/siteB/2.jpg,Dora\n", {"siteB/2.jpg": "Dora"}),
        (
            ["siteA/1.jpg", "siteB/1.jpg"],
            "C:\\x\\siteA\\1.jpg,Anna\nC:\\x\\siteB\\1.jpg,Ben\n",
            {"siteA/1.jpg": "Anna", "siteB/1.jpg": "Ben"},
        ),
    ],
)
def test_a_photo_of_another_folder_is_another_photo(
    tmp_path: Path, photos: list[str], rows: str, expected: dict[str, str]
) -> None:
    found = join(tmp_path, photos, rows)
    assert {name: patient for name, patient in found.items() if name in photos} == expected


def test_the_photo_found_wins_over_a_file_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"x")
    assert join(tmp_path, ["siteA/1.jpg"], "1.jpg,Anna\n") == {"siteA/1.jpg": "Anna"}


def test_a_list_does_not_take_another_format_for_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("1.jpg\n1.png\n")
    assert [photo.name for photo in list_photos(tmp_path / "list.txt").photos] == ["1.jpg", "1.png"]


def test_lists_and_tables_find_files_that_differ_by_case_or_extension(tmp_path: Path) -> None:
    for name in ("a.JPG", "10_left.jpeg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.jpg\r\n10_left\r\n")
    (tmp_path / "list.csv").write_text("image,level\na.jpg,0\n10_left,1\n")
    for source in ("list.txt", "list.csv"):
        assert [photo.name for photo in list_photos(tmp_path / source).photos] == ["10_left.jpeg", "a.JPG"]


def test_a_table_among_the_sources_is_no_skipped_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "list.csv").write_text("file,abnormal\na.jpg,0\n")
    listing = list_photos([tmp_path, tmp_path / "list.csv"])
    assert [photo.columns for photo in listing.photos] == [{"abnormal": 0.0}]
    assert not any("skipped" in note for note in listing.notes)


def test_numbers_in_dicom_identifiers_are_no_extension() -> None:
    names = ("1.2.840.1", "a.jpg", "a.b.JPEG", "im.ppm.gz", "plain")
    assert [without_photo_suffix(name) for name in names] == ["1.2.840.1", "a", "a.b", "im", "plain"]


@pytest.mark.parametrize(
    "written",
    [
        "left%20eye/%C3%A9toile.jpg",
        "%C3%A9toile.jpg",
        "file:///C:/study/left%20eye/%C3%A9toile.jpg",
        "https://host:8080/media/left%20eye/%C3%A9toile.jpg?size=full",
        "/data/local-files/?d=left%20eye/%C3%A9toile.jpg",
    ],
)
def test_urls_and_escaped_names(tmp_path: Path, written: str) -> None:
    found = join(tmp_path, ["left eye/\u00e9toile.jpg", "left eye/b.jpg"], f"{written},Anna\n")
    assert found == {"left eye/\u00e9toile.jpg": "Anna"}


def test_a_percent_sign_in_a_name_is_one(tmp_path: Path) -> None:
    photos = ["50%20a.jpg", "50 a.jpg", "100%.jpg"]
    rows = "50%20a.jpg,Anna\n50 a.jpg,Ben\n100%.jpg,Carla\n"
    assert join(tmp_path, photos, rows) == {"50%20a.jpg": "Anna", "50 a.jpg": "Ben", "100%.jpg": "Carla"}


def test_an_escaped_name_of_a_missing_photo_takes_no_other(tmp_path: Path) -> None:
    found = join(tmp_path, ["site A/1.jpg"], "site%20B/1.jpg,Carla\n")
    assert found == {"site%20B/1.jpg": "Carla"}


@pytest.mark.parametrize("text", ["image,patient\na.jpg,Anna\n", "Export\nimage\tpatient\na\tAnna\n"])
def test_a_text_file_with_a_header_is_a_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "list.txt").write_text(text)
    (photo,) = list_photos(tmp_path / "list.txt").photos
    assert (photo.name, photo.patient, photo.issue) == ("a.jpg", "Anna", None)


def test_a_list_of_names_with_commas_is_a_list(tmp_path: Path) -> None:
    for name in ("image, left.jpg", "id;1.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text("image, left.jpg\nid;1.jpg\n")
    assert [photo.name for photo in list_photos(tmp_path / "list.txt").photos] == ["id;1.jpg", "image, left.jpg"]


@pytest.mark.parametrize(
    ("photos", "rows"),
    [
        (["P1/1.jpg", "P3/2.jpg"], "1.jpg,P2\n2.jpg,P3\n"),
        (["P1/OS.jpg"], "OS.jpg,P2\n"),
        (["Anna/1.jpg", "Ben/2.jpg"], "1.jpg,Anna\n2.jpg,Carla\n"),
    ],
)
def test_a_name_without_a_folder_takes_no_photo_from_the_folder_of_another_patient(
    tmp_path: Path, photos: list[str], rows: str
) -> None:
    with pytest.raises(DataError, match="in the folder of another patient"):
        join(tmp_path, photos, rows)


def test_folders_that_are_no_patients_contradict_nobody(tmp_path: Path) -> None:
    photos = ["2023/1.jpg", "2024/2.jpg"]
    assert join(tmp_path, photos, "1.jpg,12\n2.jpg,13\n") == {"2023/1.jpg": "12", "2024/2.jpg": "13"}


def test_patient_and_split_tell_names_that_restart_apart(tmp_path: Path) -> None:
    assert join(tmp_path, ["P1/1.jpg", "P2/1.jpg"], "1.jpg,P2\n1.jpg,P1\n") == {"P1/1.jpg": "P1", "P2/1.jpg": "P2"}
    for name in ("train/1.jpg", "test/1.jpg"):
        (tmp_path / "split" / name).parent.mkdir(parents=True)
        (tmp_path / "split" / name).write_bytes(b"x")
    table = tmp_path / "split.csv"
    table.write_text("split,image,level\ntest,1.jpg,4\ntrain,1.jpg,0\n")
    photos = list_photos(tmp_path / "split", labels=table).photos
    assert [(photo.name, photo.split, photo.columns["level"]) for photo in photos] == [
        ("test/1.jpg", "test", 4.0),
        ("train/1.jpg", "train", 0.0),
    ]


def test_a_split_that_contradicts_the_folder_is_noted(tmp_path: Path) -> None:
    (tmp_path / "photos/train").mkdir(parents=True)
    (tmp_path / "photos/train/1.jpg").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("file,split\n1.jpg,test\n")
    listing = list_photos(tmp_path / "photos", labels=tmp_path / "labels.csv")
    assert [photo.split for photo in listing.photos] == ["test"]
    assert any("another split than the folder of their photo, such as line 2" in note for note in listing.notes)


def test_an_extension_that_a_program_added_is_preferred(tmp_path: Path) -> None:
    assert join(tmp_path, ["a.tif.jpg", "a.jpg"], "a.tif,Anna\n") == {"a.tif.jpg": "Anna"}
    assert join(tmp_path, ["b.jpg"], "b.tif,Anna\n") == {"b.jpg": "Anna"}


def test_paths_of_another_machine_have_one_root(tmp_path: Path) -> None:
    """siteB is missing here; the photo beside the folders is nobody's of it."""
    rows = "/mnt/x/siteA/2.jpg,Anna\n/mnt/x/siteB/1.jpg,Carla\n"
    found = join(tmp_path, ["siteA/2.jpg", "1.jpg"], rows)
    assert found.pop("siteA/2.jpg") == "Anna"
    assert "1.jpg" not in found
    assert list(found.values()) == ["Carla"]


def test_photos_that_were_copied_into_one_folder_keep_their_rows(tmp_path: Path) -> None:
    """Every row has a root of its own; comparing all of them with each other would take hours for a million."""
    photos = [f"{number}.jpg" for number in range(2000)]
    began = time.perf_counter()
    found = join(tmp_path, photos, "".join(f"/mnt/x/folder{n}/{n}.jpg,P{n}\n" for n in range(2000)))
    assert found == {f"{number}.jpg": f"P{number}" for number in range(2000)}
    assert time.perf_counter() - began < 10  # a quarter of a second; pairs of roots took a second for 2,000, hours here


def test_backslashes_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for name in ("p/10_left.jpg", "odd\\name.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text("p\\10_left.jpg\nodd\\name.jpg\n")
    assert [photo.name for photo in list_photos(tmp_path / "list.txt").photos] == ["odd\\name.jpg", "p/10_left.jpg"]
