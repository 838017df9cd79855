"""Patients and eyes: from names, folders and columns; what is the same for everybody is nobody's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastfundus.data import list_photos
from fastfundus.data.people import people_from_names
from fastfundus.identifiers import is_placeholder, normal_eye, parse_eye_codes, read_eye_name
from fastfundus.records import PhotoFacts, SourcePhoto, identity


@pytest.mark.parametrize(
    ("name", "patient", "eye"),
    [
        ("10_left.jpg", "10", "L"),
        ("P001/OD.jpg", "P001", "R"),
        ("P001/left.png", "P001", "L"),
        ("P001/OS_2.jpg", "P001", "L"),
        ("P001/Right Eye.jpg", "P001", "R"),
        ("P001/right/IMG_0001.jpg", "P001", "R"),
        ("site/P001/OD/a.jpg", "site/P001", "R"),
        ("RET002OD.jpg", "RET002", "R"),
        ("Smith_LE.jpg", "Smith", "L"),
        ("patient_12/a.jpg", "patient_12", None),
        ("12_left_right.jpg", None, None),
        ("photo de le jardin.jpg", None, None),
        ("plain.jpg", None, None),
        ("blurred.jpg", None, None),
        ("1_L.ppm.gz", "1", "L"),
        ("P001/baseline/OD.jpg", "P001", "R"),
        ("P001/month12/OD.jpg", "P001", "R"),
        ("P001/2020-03-01/OD/1.jpg", "P001", "R"),
        ("P001_V1_OD.jpg", "P001", "R"),
        ("P001_month_6_OD.jpg", "P001", "R"),
        ("51152/V2/OD.jpg", "51152", "R"),
        ("RET002_20200301_OD.jpg", "RET002", "R"),
        ("site1/m01/OD.jpg", "site1/m01", "R"),
        ("site1_m01_OD.jpg", "site1_m01", "R"),
        ("study12/V12/OD.jpg", "study12/V12", "R"),
        ("2023/V001/OD.jpg", "2023/V001", "R"),
        ("site1_20200301_OD.jpg", "site1_20200301", "R"),
        ("P001_20200301_OD.jpg", "P001", "R"),
        ("Doe_John_19600101_OD.jpg", "Doe_John_19600101", "R"),
        ("Visit2_OD.jpg", "Visit2", "R"),
    ],
)
def test_names_that_tell_patient_and_eye(name: str, patient: str | None, eye: str | None) -> None:
    found = read_eye_name(name)
    assert (found.patient, found.eye) == (patient, eye)


def people(*names: str) -> list[tuple[str | None, str | None]]:
    found, _ = people_from_names({name: name for name in names})
    return [(found[name].patient, found[name].eye) for name in names]


def test_a_constant_prefix_is_no_patient() -> None:
    assert people("IMG_L_0001.jpg", "IMG_R_0002.jpg") == [(None, "L"), (None, "R")]
    assert people("Clinic_L_01.jpg", "Clinic_R_02.jpg") == [(None, "L"), (None, "R")]
    many = [f"study2024_{eye}_{number:03d}.jpg" for number in range(10) for eye in "LR"]
    assert {patient for patient, _ in people(*many)} == {None}
    _, notes = people_from_names({"a": "IMG_L_0001.jpg", "b": "IMG_R_0002.jpg"})
    assert "'IMG' in the names of 2 photos may stand for different people" in notes[0]


@pytest.mark.parametrize(
    "names",
    [
        ("NW400_R_0001.jpg", "NW400_L_0002.jpg"),
        ("SITE1_R_0001.jpg", "SITE1_L_0002.jpg", "SITE2_R_0003.jpg"),
        ("20200101_L_1.jpg", "20200101_R_2.jpg"),
        ("20200101_L_1.jpg", "20200101_R_1.jpg"),
        ("IMG_L_anna.jpg", "IMG_R_ben.jpg"),
        ("clinic_OD_Smith.jpg", "clinic_OS_Jones.jpg"),
        ("normal/left/anna.jpg", "normal/right/ben.jpg"),
        ("siteA/OD/101.jpg", "siteA/OS/102.jpg"),
        ("2020/OD/101.jpg", "2020/OS/102.jpg"),
        ("2023-01-05/OD1.jpg", "2023-01-05/OS1.jpg"),
    ],
)
def test_cameras_sites_and_dates_are_no_patients(names: tuple[str, ...]) -> None:
    found = people(*names)
    assert {patient for patient, _ in found} == {None}
    assert None not in {eye for _, eye in found}


def test_a_patient_is_the_same_at_the_next_visit_and_in_the_folder_of_either_eye() -> None:
    assert people("P12_20200101_L.jpg", "P12_20210101_R.jpg") == [("P12", "L"), ("P12", "R")]
    assert people("left/P001/1.jpg", "right/P001/1.jpg") == [("P001", "L"), ("P001", "R")]


def test_folders_of_classes_are_no_part_of_a_patient_even_with_a_table(tmp_path: Path) -> None:
    for name in ("normal/P001_OD.jpg", "glaucoma/P001_OS.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("file,abnormal\nnormal/P001_OD.jpg,0\nglaucoma/P001_OS.jpg,1\n")
    photos = list_photos(tmp_path, labels=tmp_path / "labels.csv").photos
    assert [(photo.patient, photo.columns) for photo in photos] == [
        ("P001", {"abnormal": 1.0}),
        ("P001", {"abnormal": 0.0}),
    ]


def test_several_shots_of_a_patient_stay_together() -> None:
    assert people("17_OD_1.jpg", "17_OD_2.jpg", "18_OS_1.jpg") == [("17", "R"), ("17", "R"), ("18", "L")]
    assert people("7_L_1.jpg", "7_R_1.jpg", "7_R_2.jpg") == [("7", "L"), ("7", "R"), ("7", "R")]
    assert people("Anna_L_1.jpg", "Ben_L_1.jpg") == [("Anna", "L"), ("Ben", "L")]


def test_a_number_after_the_eye_is_a_patient_only_if_it_has_both_eyes() -> None:
    assert people("left_12.jpg", "right_12.jpg", "left_13.jpg") == [("12", "L"), ("12", "R"), (None, "L")]
    assert people("left/12.jpg", "right/12.jpg") == [("12", "L"), ("12", "R")]


@pytest.mark.parametrize(
    "name",
    [
        "ANONYMIZED",
        "anonymous",
        "Unknown",
        "N/A",
        "None",
        "XXXX",
        "DE-IDENTIFIED",
        "No Name",
        "test",
        "-",
        "UNK",
        "N.N.",
        "anonym",
        "nobody",
        "Undefined",
        "no value",
        "ANONYM^^",
    ],
)
def test_placeholders(name: str) -> None:
    assert is_placeholder(name)


@pytest.mark.parametrize("name", ["ANON0017", "X", "0", "12", "Noneman", "p1"])
def test_identifiers_that_are_no_placeholders(name: str) -> None:
    assert not is_placeholder(name)
    assert is_placeholder("0000", zeros=True)
    assert is_placeholder("ANONYMOUS1", zeros=True)
    assert not is_placeholder(name if name != "0" else "1", zeros=True)


@pytest.mark.parametrize(
    ("column", "left", "right"),
    [("eye", "L", "R"), ("laterality", "OS", "OD"), ("Laterality", "Left", "Right"), ("eye_side", "LE", "RE"),
     ("side", "left eye", "right eye"), ("Eye", "os", "od")],
)  # fmt: skip
@pytest.mark.parametrize("who", ["patient", "patient_id", "PatientID", "Subject ID", "participant"])
def test_columns_under_the_names_that_people_use(tmp_path: Path, column: str, left: str, right: str, who: str) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    labels = tmp_path / "labels.csv"
    labels.write_text(f"image,{who},{column}\na.jpg,P1,{left}\nb.jpg,P1,{right}\n")
    listing = list_photos(tmp_path, labels=labels)
    assert [(photo.patient, photo.eye, photo.columns) for photo in listing.photos] == [("P1", "L", {}), ("P1", "R", {})]
    assert who in listing.origins["patient"]


def test_eyes_coded_by_numbers_are_unknown_until_declared(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    labels = tmp_path / "labels.csv"
    labels.write_text("file,laterality\na.jpg,1\n")
    listing = list_photos(tmp_path, labels=labels)
    assert listing.photos[0].eye is None
    assert any("--eye-codes 1=R,2=L" in note for note in listing.notes)
    declared = list_photos(tmp_path, labels=labels, eye_codes=parse_eye_codes("1=R, 2=L"))
    assert declared.photos[0].eye == "R"
    for wrong in ("1=R", "1=R,2=R", "1=R,1=L", "R,L", "1=up,2=L"):
        with pytest.raises(ValueError, match=r"CODE=EYE|one eye only"):
            parse_eye_codes(wrong)


def test_placeholders_in_a_patient_column_are_unknown(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    labels = tmp_path / "labels.csv"
    labels.write_text("file,patient\na.jpg,ANONYMIZED\nb.jpg,ANONYMIZED\n")
    listing = list_photos(tmp_path, labels=labels)
    assert [photo.patient_known for photo in listing.photos] == [False, False]
    assert any("'ANONYMIZED' in 2 rows is a placeholder" in note for note in listing.notes)


@pytest.mark.parametrize("odd", ["Unknown", "OU", "both", ""])
def test_one_odd_cell_does_not_cost_the_column(tmp_path: Path, odd: str) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text(f"image,Pat ID,laterality\na.jpg,p1,O.D.\nb.jpg,P1,L\nc.jpg,7.0,{odd}\n")
    listing = list_photos(tmp_path, labels=tmp_path / "labels.csv")
    assert [(photo.patient, photo.eye) for photo in listing.photos] == [("p1", "R"), ("p1", "L"), ("7", None)]


def test_a_patient_column_that_is_the_same_everywhere_is_no_patient(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    rows = "".join(f"{number}.jpg,STUDY1\n" for number in range(8))
    (tmp_path / "labels.csv").write_text("file,patient\n" + rows)
    listing = list_photos(tmp_path, labels=tmp_path / "labels.csv")
    assert not any(photo.patient_known for photo in listing.photos)
    assert any("'STUDY1' in all rows" in note for note in listing.notes)


def test_contradictory_eyes_and_columns_that_look_like_patients_are_noted(tmp_path: Path) -> None:
    (tmp_path / "10_left.jpg").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("file,eye,Study No\n10_left.jpg,R,s1\n")
    listing = list_photos(tmp_path, labels=tmp_path / "labels.csv")
    assert listing.photos[0].eye == "R"
    assert any("contradicts the eye in the names of 1 photos, such as 10_left.jpg" in note for note in listing.notes)
    assert any("column 'Study No' looks like the patient" in note for note in listing.notes)


def test_a_column_called_side_with_other_values_is_a_label(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("file,side,set\na.jpg,nasal,blue\n")
    photo = list_photos(tmp_path, labels=tmp_path / "labels.csv").photos[0]
    assert photo.columns == {"side": "nasal", "set": "blue"}


def test_spellings_of_eyes() -> None:
    assert [normal_eye(text) for text in ("OD", "left-eye", "R.", "both", "", None)] == [
        "R",
        "L",
        "R",
        None,
        None,
        None,
    ]


def test_the_same_name_in_several_folders_is_noted() -> None:
    names = ("north/P001_L.jpg", "north/P001_R.jpg", "south/P001_L.jpg", "south/P002_L.jpg", "south/P002_R.jpg")
    _, notes = people_from_names({name: name for name in names})
    assert notes == [
        "1 names such as 'P001' occur in several folders, and are taken for different people; if they are the same "
        "ones, name them in a column 'patient' of a table"
    ]
    _, notes = people_from_names({name: name for name in names if "south/P001" not in name})
    assert notes == []


def test_a_table_with_patients_is_not_completed_by_names(tmp_path: Path) -> None:
    """Cells that were merged in a spreadsheet are empty but for the first: 10_right would become a second person."""
    for name in ("10_left.jpg", "10_right.jpg", "11_left.jpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("image,patient\n10_left.jpg,A\n10_right.jpg,\n11_left.jpg,B\n")
    listing = list_photos(tmp_path, labels=tmp_path / "labels.csv")
    assert [(photo.patient, photo.patient_known) for photo in listing.photos] == [
        ("A", True),
        ("10_right.jpg", False),
        ("B", True),
    ]
    assert any("no patient in 1 rows, such as line 3" in note for note in listing.notes)


def test_what_dicom_says_of_people_goes_before_names() -> None:
    by_name = SourcePhoto(Path("x"), "exam1_OD.dcm", "exam1", True, "R", patient_by_name=True, eye_by_name=True)
    assert identity(by_name, PhotoFacts(patient="A", eye="R")) == ("A", True, "R")
    assert identity(by_name, PhotoFacts(patient="A", eye="L")) == ("A", True, None)
    assert identity(by_name, PhotoFacts()) == ("exam1", True, "R")
    by_table = SourcePhoto(Path("x"), "exam1_OD.dcm", "T7", True, "R")
    assert identity(by_table, PhotoFacts(patient="A", eye="L")) == ("T7", True, "R")
