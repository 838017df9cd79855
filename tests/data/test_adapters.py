"""Adapters on small imitations of public data sets: labels, patients, splits, masks and known pitfalls."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from fastfundus.data import SourceList, list_photos
from fastfundus.data.adapters import ADAPTERS, detect_adapter
from fastfundus.data.adapters.disease import odir_labels
from fastfundus.errors import ConfigError, DataError
from fastfundus.records import SourcePhoto


def tree(root: Path, files: Iterable[str], **texts: str) -> Path:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"photo " + name.encode())
    return root


def text(root: Path, name: str, content: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def excel(root: Path, name: str, rows: list[list[Any]]) -> None:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def read(root: Path, name: str) -> tuple[dict[str, SourcePhoto], SourceList]:
    """List a folder with the named adapter, which must also be detected automatically."""
    listing = list_photos(root)
    assert any(f"looks like {ADAPTERS[name].title}, read as such" in note for note in listing.notes), listing.notes
    named = list_photos(root, adapter=name)
    assert [(photo.name, photo.columns) for photo in named.photos] == [(p.name, p.columns) for p in listing.photos]
    return {photo.name: photo for photo in listing.photos}, listing


def column(photos: dict[str, SourcePhoto], name: str) -> dict[str, Any]:
    return {path.rsplit("/", 1)[-1]: photo.columns[name] for path, photo in photos.items()}


def test_aptos2019(tmp_path: Path) -> None:
    tree(tmp_path, ["train_images/000c1434d8d7.png", "train_images/001639a390f0.png", "test_images/0005cfc8afb6.png"])
    text(tmp_path, "train.csv", "id_code,diagnosis\n000c1434d8d7,2\n001639a390f0,0\nffffffffffff,1\n")
    text(tmp_path, "test.csv", "id_code\n0005cfc8afb6\n")
    photos, listing = read(tmp_path, "aptos2019")
    grades = {"000c1434d8d7.png": 2.0, "001639a390f0.png": 0.0, "0005cfc8afb6.png": None}
    assert column(photos, "dr_grade") == grades
    assert not any(photo.patient_known for photo in photos.values())
    assert any("list 1 photos that are missing, such as ffffffffffff" in note for note in listing.notes)
    assert any("1 photos are in no table" in note for note in listing.notes)


def test_eyepacs_keeps_both_eyes_of_a_patient_and_joins_eyeq(tmp_path: Path) -> None:
    tree(tmp_path, ["train/10_left.jpeg", "train/10_right.jpeg", "test/1_left.jpeg", "test/2_left.jpeg"])
    text(tmp_path, "trainLabels.csv", "image,level\n10_left,0\n10_right,4\n")
    text(tmp_path, "retinopathy_solution.csv", "image,level,Usage\n1_left,2,Private\n2_left,1,Public\n")
    text(tmp_path, "Label_EyeQ_train.csv", ",image,quality,DR_grade\n0,10_left.jpeg,0,0\n1,10_right.jpeg,2,4\n")
    photos, _ = read(tmp_path, "eyepacs")
    assert [(p.patient, p.eye) for p in photos.values()] == [("1", "L"), ("2", "L"), ("10", "L"), ("10", "R")]
    assert column(photos, "dr_grade") == {
        "1_left.jpeg": 2.0, "2_left.jpeg": 1.0, "10_left.jpeg": 0.0, "10_right.jpeg": 4.0
    }  # fmt: skip
    assert column(photos, "quality_grade")["10_right.jpeg"] == 2.0
    assert column(photos, "quality_grade")["1_left.jpeg"] is None
    # The data set has no official training side, so folds are assigned later.
    assert column(photos, "official_split")["2_left.jpeg"] == "val"
    assert {photo.split for photo in photos.values()} == {None}


def test_messidor2_pairs_and_ungradable_rows(tmp_path: Path) -> None:
    tree(tmp_path, ["IMAGES/20051020_43808_0100_PP.png", "IMAGES/20051020_43832_0100_PP.png", "IMAGES/IM004832.JPG"])
    text(
        tmp_path,
        "messidor_data.csv",
        "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable\n"
        "20051020_43808_0100_PP.png,1.0,0.0,1\n20051020_43832_0100_PP.png,2.0,1.0,1\nIM004832.jpg,,,0\n",
    )
    text(tmp_path, "messidor-2.csv", "left;right\n20051020_43808_0100_PP.png;20051020_43832_0100_PP.png\n")
    photos, _ = read(tmp_path, "messidor2")
    assert list(column(photos, "dr_grade").values()) == [1.0, 2.0, None]
    assert list(column(photos, "gradable").values()) == [1.0, 1.0, 0.0]
    first, second, third = photos.values()
    assert first.patient == second.patient != third.patient
    assert (first.eye, second.eye, third.patient_known) == ("L", "R", False)


@pytest.mark.parametrize("escaped", [False, True], ids=["plain", "url-escaped"])
def test_idrid_numbers_restart_in_every_part(tmp_path: Path, escaped: bool) -> None:
    def place(name: str) -> str:
        return name.replace(" ", "%20") if escaped else name

    grading, segmentation = "B. Disease Grading", "A. Segmentation"
    photos = [
        f"{grading}/1. Original Images/a. Training Set/IDRiD_001.jpg",
        f"{grading}/1. Original Images/b. Testing Set/IDRiD_001.jpg",
        f"{segmentation}/1. Original Images/a. Training Set/IDRiD_01.jpg",
    ]
    masks = f"{segmentation}/2. All Segmentation Groundtruths/a. Training Set"
    tree(
        tmp_path,
        map(place, [*photos, f"{masks}/2. Haemorrhages/IDRiD_01_HE.tif", f"{masks}/5. Optic Disc/IDRiD_01_OD.tif"]),
    )
    header = "Image name,Retinopathy grade,Risk of macular edema ,,,\n"
    truths = f"{grading}/2. Groundtruths"
    text(tmp_path, place(f"{truths}/a. IDRiD_Disease Grading_Training Labels.csv"), header + "IDRiD_001,3,2,,,\n")
    text(tmp_path, place(f"{truths}/b. IDRiD_Disease Grading_Testing Labels.csv"), header + "IDRiD_001,4,0,,,\n")
    found, _ = read(tmp_path, "idrid")
    train, test, segmented = (found[place(name)] for name in photos)
    assert (train.columns["dr_grade"], train.columns["dme_grade"]) == (3.0, 2.0)
    assert (test.columns["dr_grade"], test.columns["dme_grade"]) == (4.0, 0.0)
    assert segmented.columns["dr_grade"] is None
    assert segmented.columns["has_haemorrhages"] == 1.0
    assert segmented.columns["has_soft_exudates"] == 0.0
    assert segmented.columns["mask_disc"].endswith("IDRiD_01_OD.tif")
    # Photos of other parts were not annotated for lesions, so theirs are unknown.
    assert train.columns["has_haemorrhages"] is None


def test_papila_reads_its_tables_below_two_header_rows(tmp_path: Path) -> None:
    tree(tmp_path, ["FundusImages/RET002OD.jpg", "FundusImages/RET002OS.jpg", "FundusImages/RET004OD.jpg"])
    for eye, rows in {"od": [["#002", 47, 0, 2], ["#004", 58, 1, 1]], "os": [["#002", 47, 0, 0]]}.items():
        header = [[None, "Age", "Gender", "Diagnosis"], [None, None, None, None], ["ID", None, None, None]]
        excel(tmp_path, f"ClinicalData/patient_data_{eye}.xlsx", header + rows)
    photos, listing = read(tmp_path, "papila")
    assert column(photos, "class") == {"RET002OD.jpg": "suspect", "RET002OS.jpg": "healthy", "RET004OD.jpg": "glaucoma"}
    assert column(photos, "glaucoma") == {"RET002OD.jpg": None, "RET002OS.jpg": 0.0, "RET004OD.jpg": 1.0}
    assert column(photos, "age")["RET004OD.jpg"] == 58.0
    assert [(p.patient, p.eye) for p in photos.values()] == [("002", "R"), ("002", "L"), ("004", "R")]
    assert not any("that are missing" in note for note in listing.notes)


@pytest.mark.parametrize(
    "folders",
    [("normal_control", "early_glaucoma", "advanced_glaucoma"),
     ("train/anormal_control", "val/bearly_glaucoma", "test/cadvanced_glaucoma")],
    ids=["original", "retfound"],
)  # fmt: skip
def test_glaucoma_fundus(tmp_path: Path, folders: tuple[str, ...]) -> None:
    tree(tmp_path, [f"{folder}/{n}.png" for n, folder in enumerate(folders)])
    photos, _ = read(tmp_path, "glaucoma_fundus")
    assert column(photos, "glaucoma_stage") == {"0.png": 0.0, "1.png": 1.0, "2.png": 2.0}
    assert column(photos, "glaucoma") == {"0.png": 0.0, "1.png": 1.0, "2.png": 1.0}
    if "/" in folders[0]:
        assert sorted(photo.split or "" for photo in photos.values()) == ["test", "train", "val"]


def test_jsiec_counts_classes_by_number_not_by_spelling(tmp_path: Path) -> None:
    names = ["0.0.Normal", "0.2.Large optic cup", "2.0.BRVO", "10.0.Possible glaucoma", "29.0.Blur fundus without PDR",
             "29.1.Blur fundus with suspected PDR"]  # fmt: skip
    tree(tmp_path, [f"{name}/{n}.JPG" for n, name in enumerate(names)])
    photos, _ = read(tmp_path, "jsiec")
    order = column(photos, "class_index")
    assert order["2.JPG"] < order["3.JPG"]
    assert order["5.JPG"] == 38
    assert column(photos, "abnormal") == {
        "0.JPG": 0.0, "1.JPG": None, "2.JPG": 1.0, "3.JPG": 1.0, "4.JPG": None, "5.JPG": 1.0
    }  # fmt: skip
    assert column(photos, "gradable")["4.JPG"] == 0.0
    assert len({entry["class_index"] for entry in ADAPTERS["jsiec"].classes.values()}) == 39  # type: ignore[union-attr]


def test_retina(tmp_path: Path) -> None:
    tree(tmp_path, ["1_normal/NL_001.png", "2_cataract/c.png", "2_glaucoma/g.png", "3_retina_disease/r.png"])
    photos, _ = read(tmp_path, "retina")
    assert column(photos, "class") == {
        "NL_001.png": "normal", "c.png": "cataract", "g.png": "glaucoma", "r.png": "retina_disease"
    }  # fmt: skip
    assert column(photos, "abnormal") == {"NL_001.png": 0.0, "c.png": 1.0, "g.png": 1.0, "r.png": 1.0}


ODIR = ["ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus", "Left-Diagnostic Keywords",
        "Right-Diagnostic Keywords", *"NDGCAHMO"]  # fmt: skip


def test_odir_takes_labels_of_eyes_from_their_keywords(tmp_path: Path) -> None:
    tree(tmp_path, [f"ODIR-5K_Training_Dataset/{n}_{eye}.jpg" for n in (0, 7) for eye in ("left", "right")])
    rows = [
        [0, 69, "Female", "0_left.jpg", "0_right.jpg", "cataract", "normal fundus", 0, 0, 0, 1, 0, 0, 0, 0],
        [7, 60, "Male", "7_left.jpg", "7_right.jpg", "lens dust，drusen", "low image quality", 0, 0, 0, 0, 0, 0, 0, 1],
    ]
    excel(tmp_path, "ODIR-5K_Training_Annotations(Updated)_V2.xlsx", [ODIR, *rows])
    photos, _ = read(tmp_path, "odir")
    # The patient's label C does not mark the healthy eye as having a cataract.
    assert column(photos, "abnormal") == {
        "0_left.jpg": 1.0, "0_right.jpg": 0.0, "7_left.jpg": 1.0, "7_right.jpg": None
    }  # fmt: skip
    assert column(photos, "eye_C") == {"0_left.jpg": 1.0, "0_right.jpg": 0.0, "7_left.jpg": 0.0, "7_right.jpg": None}
    assert column(photos, "eye_O")["7_left.jpg"] == 1.0
    assert column(photos, "quality_flags")["7_left.jpg"] == "lens dust"
    assert column(photos, "sex")["7_left.jpg"] == "M"
    assert [(p.patient, p.eye) for p in photos.values()] == [("0", "L"), ("0", "R"), ("7", "L"), ("7", "R")]


def test_odir_by_kaggle(tmp_path: Path) -> None:
    tree(tmp_path, ["preprocessed_images/0_left.jpg", "preprocessed_images/0_right.jpg"])
    row = "0,69,Female,0_left.jpg,0_right.jpg,cataract,normal fundus,0,0,0,1,0,0,0,0,x,['C'],[1],{}\n"
    header = ",".join([*ODIR, "filepath", "labels", "target", "filename"]) + "\n"
    text(tmp_path, "full_df.csv", header + row.format("0_left.jpg") + row.format("0_right.jpg"))
    photos, _ = read(tmp_path, "odir")
    assert column(photos, "abnormal") == {"0_left.jpg": 1.0, "0_right.jpg": 0.0}


@pytest.mark.real_data
def test_odir_keywords_against_eyes_that_were_read_by_hand(real_data: Path) -> None:
    with (real_data / "odir" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        got = odir_labels(row["keywords"])
        for name in ("eye_N", "eye_D", "eye_G", "eye_C", "eye_A", "eye_H", "eye_M", "eye_O"):
            assert got[name] == float(row[name]), (row["file"], row["keywords"], name)
        assert got["abnormal"] == 1 - float(row["normal"])
        assert (got["quality_flags"] or "") == row["quality_flags"]


@pytest.mark.parametrize("mirror", [False, True], ids=["original", "challenge"])
def test_rfmid_numbers_restart_in_each_split(tmp_path: Path, mirror: bool) -> None:
    sets = {
        False: [("1. Original Images/a. Training Set", "2. Groundtruths/a. RFMiD_Training_Labels.csv"),
                ("1. Original Images/b. Validation Set", "2. Groundtruths/b. RFMiD_Validation_Labels.csv"),
                ("1. Original Images/c. Testing Set", "2. Groundtruths/c. RFMiD_Testing_Labels.csv")],
        True: [("Training_Set/Training", "Training_Set/RFMiD_Training_Labels.csv"),
               ("Evaluation_Set/Validation", "Evaluation_Set/RFMiD_Validation_Labels.csv"),
               ("Test_Set/Test", "Test_Set/RFMiD_Testing_Labels.csv")],
    }[mirror]  # fmt: skip
    for number, (folder, table) in enumerate(sets):
        tree(tmp_path, [f"{folder}/1.png"])
        text(tmp_path, table, f"ID,Disease_Risk,DR,ARMD\n1,{number % 2},{number},0\n")
    photos, _ = read(tmp_path, "rfmid")
    by_side = {photo.split: photo.columns for photo in photos.values()}
    assert {side: columns["DR"] for side, columns in by_side.items()} == {"train": 0.0, "val": 1.0, "test": 2.0}
    assert {side: columns["abnormal"] for side, columns in by_side.items()} == {"train": 0.0, "val": 1.0, "test": 0.0}


def test_ddr_grade_5_is_quality_and_mask_folders_vary(tmp_path: Path) -> None:
    tree(tmp_path, ["DR_grading/train/a.jpg", "DR_grading/valid/a.jpg", "DR_grading/test/b.jpg"])
    tree(tmp_path, ["lesion_segmentation/train/image/x.jpg", "lesion_segmentation/train/label/EX/x.tif"])
    tree(tmp_path, ["lesion_segmentation/valid/image/y.jpg", "lesion_segmentation/valid/segmentation label/HE/y.tif"])
    text(tmp_path, "DR_grading/train.txt", "a.jpg 5\n")
    text(tmp_path, "DR_grading/valid.txt", "a.jpg 2\n")
    text(tmp_path, "DR_grading/test.txt", "b.jpg 0\n")
    photos, _ = read(tmp_path, "ddr")
    graded = {photo.split: photo.columns for name, photo in photos.items() if name.startswith("DR_grading")}
    assert (graded["train"]["dr_grade"], graded["train"]["gradable"]) == (None, 0.0)
    assert (graded["val"]["dr_grade"], graded["val"]["gradable"]) == (2.0, 1.0)
    assert (graded["test"]["dr_grade"], graded["test"]["gradable"]) == (0.0, 1.0)
    lesions = {Path(name).name: photo.columns for name, photo in photos.items() if name.startswith("lesion")}
    assert (lesions["x.jpg"]["has_hard_exudates"], lesions["x.jpg"]["has_haemorrhages"]) == (1.0, 0.0)
    assert lesions["y.jpg"]["mask_haemorrhages"].endswith("segmentation label/HE/y.tif")
    assert lesions["x.jpg"]["dr_grade"] is None


def test_refuge(tmp_path: Path) -> None:
    tree(
        tmp_path,
        ["REFUGE-Training400/Training400/Glaucoma/g0001.jpg", "REFUGE-Training400/Training400/Non-Glaucoma/n0001.jpg",
         "REFUGE-Validation400/REFUGE-Validation400/V0001.jpg", "Test400/T0001.jpg",
         "Annotation-Training400/Annotation-Training400/Disc_Cup_Masks/Glaucoma/g0001.bmp",
         "REFUGE-Test-GT/Disc_Cup_Masks/N/T0001.bmp"],
    )  # fmt: skip
    header = ["ID", "ImgName", "Label(Glaucoma=1)", "Fovea_X", "Fovea_Y"]
    excel(tmp_path, "REFUGE-Test-GT/Glaucoma_label_and_Fovea_location.xlsx", [header, [1, "T0001.jpg", 0, 800.5, 700]])
    photos, listing = read(tmp_path, "refuge")
    assert column(photos, "glaucoma") == {"g0001.jpg": 1.0, "n0001.jpg": 0.0, "V0001.jpg": None, "T0001.jpg": 0.0}
    assert column(photos, "fovea_x_px")["T0001.jpg"] == 800.5
    masks = column(photos, "mask_disc_cup")
    assert masks["g0001.jpg"].endswith("Glaucoma/g0001.bmp")
    assert masks["T0001.jpg"].endswith("N/T0001.bmp")
    assert masks["V0001.jpg"] is None
    assert any("its masks are inverted" in note for note in listing.notes)
    assert {photo.split for photo in photos.values()} == {"train", "val", "test"}


def test_adam(tmp_path: Path) -> None:
    tree(tmp_path, ["Training400/AMD/A0001.jpg", "Training400/Non-AMD/N0001.jpg"])
    photos, _ = read(tmp_path, "adam")
    assert column(photos, "amd") == {"A0001.jpg": 1.0, "N0001.jpg": 0.0}


def test_palm_from_its_twice_nested_archive(tmp_path: Path) -> None:
    tree(tmp_path, [f"PALM-Training400/PALM-Training400/{name}.jpg" for name in ("H0001", "N0001", "P0001")])
    tree(tmp_path, ["PALM-Validation400/V0001.jpg"])
    text(
        tmp_path,
        "PALM-Validation-GT/PM_Label_and_Fovea_Location.csv",
        "imgName,Label,Fovea_X,Fovea_Y\nV0001.jpg,1,5,6\n",
    )
    photos, _ = read(tmp_path, "palm")
    assert column(photos, "pathological_myopia") == {
        "H0001.jpg": 0.0,
        "N0001.jpg": 0.0,
        "P0001.jpg": 1.0,
        "V0001.jpg": 1.0,
    }
    assert column(photos, "class")["H0001.jpg"] == "high myopia"


def test_drive(tmp_path: Path) -> None:
    tree(tmp_path, ["training/images/21_training.tif", "training/1st_manual/21_manual1.gif"])
    tree(tmp_path, ["training/mask/21_training_mask.gif", "test/images/01_test.tif", "test/mask/01_test_mask.gif"])
    photos, _ = read(tmp_path, "drive")
    assert column(photos, "mask_vessels") == {
        "21_training.tif": "training/1st_manual/21_manual1.gif", "01_test.tif": None
    }  # fmt: skip
    assert column(photos, "mask_field")["01_test.tif"] == "test/mask/01_test_mask.gif"
    # With two of three sides, the column keeps them and folds are assigned later.
    assert column(photos, "official_split") == {"21_training.tif": "train", "01_test.tif": "test"}
    assert {photo.split for photo in photos.values()} == {None}


def test_stare_gzipped(tmp_path: Path) -> None:
    tree(tmp_path, ["stare-images/im0001.ppm.gz", "labels-ah/im0001.ah.ppm.gz", "labels-vk/im0001.vk.ppm"])
    photos, _ = read(tmp_path, "stare")
    assert column(photos, "mask_vessels") == {"im0001.ppm.gz": "labels-ah/im0001.ah.ppm.gz"}
    assert column(photos, "mask_vessels_second") == {"im0001.ppm.gz": "labels-vk/im0001.vk.ppm"}


def test_chase_db1_keeps_the_eyes_of_a_child_together(tmp_path: Path) -> None:
    tree(
        tmp_path,
        [f"Image_{n:02d}{eye}{end}" for n in (1, 2) for eye in "LR" for end in (".jpg", "_1stHO.png", "_2ndHO.png")],
    )
    photos, _ = read(tmp_path, "chase_db1")
    assert [(p.patient, p.eye) for p in photos.values()] == [("01", "L"), ("01", "R"), ("02", "L"), ("02", "R")]
    assert column(photos, "mask_vessels")["Image_02R.jpg"] == "Image_02R_1stHO.png"


def test_hrf_with_mixed_endings(tmp_path: Path) -> None:
    tree(
        tmp_path, ["images/01_dr.JPG", "images/01_g.jpg", "images/01_h.jpg", "manual1/01_dr.tif", "mask/01_dr_mask.tif"]
    )
    photos, _ = read(tmp_path, "hrf")
    assert column(photos, "abnormal") == {"01_dr.JPG": 1.0, "01_g.jpg": 1.0, "01_h.jpg": 0.0}
    assert column(photos, "mask_vessels") == {"01_dr.JPG": "manual1/01_dr.tif", "01_g.jpg": None, "01_h.jpg": None}


def test_fives_a_is_amd(tmp_path: Path) -> None:
    tree(
        tmp_path,
        ["train/Original/1_A.png", "train/Ground truth/1_A.png", "test/Original/1_N.png", "train/Original/Thumbs.db"],
    )
    photos, _ = read(tmp_path, "fives")
    assert column(photos, "class") == {"1_A.png": "AMD", "1_N.png": "normal"}
    assert column(photos, "abnormal") == {"1_A.png": 1.0, "1_N.png": 0.0}
    assert column(photos, "mask_vessels")["1_A.png"] == "train/Ground truth/1_A.png"


@pytest.mark.parametrize("light", ["iluminaton", "Illuminaton"])
def test_brset(tmp_path: Path, light: str) -> None:
    tree(tmp_path, ["fundus_photos/img00001.jpg", "fundus_photos/img00002.jpg"])
    text(
        tmp_path,
        "labels.csv",
        f"image_id,patient_id,camera,patient_age,patient_sex,exam_eye,optic_disc,DR_ICDR,{light},amd,quality\n"
        "img00001,1,Canon CR,48.0,1,1,1,0,1,0,Adequate\nimg00002,1,Canon CR,,2,2,bv,4,2,1,Inadequate\n",
    )
    photos, listing = read(tmp_path, "brset")
    first, second = photos.values()
    assert (first.patient, second.patient, first.eye, second.eye, first.camera) == ("1", "1", "R", "L", "Canon CR")
    assert (first.columns["sex"], second.columns["sex"], second.columns["age"]) == ("M", "F", None)
    assert (first.columns["abnormal_disc"], second.columns["abnormal_disc"]) == (0.0, None)
    assert (first.columns["abnormal_illumination"], second.columns["abnormal_illumination"]) == (0.0, 1.0)
    assert (first.columns["gradable"], second.columns["gradable"]) == (1.0, 0.0)
    assert any("labels.csv, line 3: abnormal_disc 'bv' is not one of 1, 2; set to unknown" in n for n in listing.notes)


def test_mbrset(tmp_path: Path) -> None:
    tree(tmp_path, ["images/1.1.jpg", "images/1.2.jpg"])
    text(
        tmp_path,
        "labels_mbrset.csv",
        "patient,file,laterality,age,sex,final_icdr,final_edema,final_quality,final_artifacts\n"
        "1,1.1.jpg,right,60,0,2.0,no,yes,no\n1,1.2.jpg,left,60,0,,,no,yes\n",
    )
    photos, _ = read(tmp_path, "mbrset")
    assert column(photos, "dr_grade") == {"1.1.jpg": 2.0, "1.2.jpg": None}
    assert column(photos, "sex") == {"1.1.jpg": "F", "1.2.jpg": "F"}
    assert column(photos, "gradable") == {"1.1.jpg": 1.0, "1.2.jpg": 0.0}
    assert [(p.patient, p.eye) for p in photos.values()] == [("1", "R"), ("1", "L")]


def test_every_adapter_has_a_test() -> None:
    named = Path(__file__).read_text()
    assert [name for name in ADAPTERS if f'read(tmp_path, "{name}")' not in named] == []
    assert len(ADAPTERS) == 21


def test_contradictions_and_odd_values_are_noted_as_unknown(tmp_path: Path) -> None:
    tree(tmp_path, ["train/10_left.jpeg", "train/11_left.jpeg"])
    text(tmp_path, "trainLabels.csv", "image,level\n10_left,0\n11_left,7\n")
    text(tmp_path, "testLabels.csv", "image,level\n10_left,3\n")
    photos, listing = read(tmp_path, "eyepacs")
    assert column(photos, "dr_grade") == {"10_left.jpeg": None, "11_left.jpeg": None}
    assert any("dr_grade '7' is not one of 0, 1, 2, 3, 4; set to unknown" in note for note in listing.notes)
    assert any("conflicting dr_grade values for 10_left; set to unknown" in note for note in listing.notes)


def test_pictures_elsewhere_in_the_set_are_named_not_lost(tmp_path: Path) -> None:
    tree(tmp_path, ["training/images/21_training.tif", "extra/scan1.png", "extra/scan2.png"])
    _, listing = read(tmp_path, "drive")
    assert any("2 images in extra are not photos of the data set; skipped" in note for note in listing.notes)


def test_plain_folders_are_not_taken_for_a_set(tmp_path: Path) -> None:
    tree(tmp_path, ["a.jpg", "images/1_left.jpg", "images/x.png"])
    listing = list_photos(tmp_path)
    assert len(listing.photos) == 3
    assert not any("looks like" in note for note in listing.notes)
    assert detect_adapter(["a.jpg"], ADAPTERS.values()) == []


def test_two_sets_in_one_folder_are_left_to_the_user(tmp_path: Path) -> None:
    tree(tmp_path, ["training/images/21_training.tif", "Image_01L.jpg", "Image_01L_1stHO.png"])
    listing = list_photos(tmp_path)
    assert any("--adapter drive" in note and "--adapter chase_db1" in note for note in listing.notes)
    assert len(list_photos(tmp_path, adapter="chase_db1").photos) == 1


def test_wrong_names_and_places(tmp_path: Path) -> None:
    tree(tmp_path, ["a.jpg"])
    with pytest.raises(ConfigError, match="adapter 'drives' is unknown; did you mean 'drive'"):
        list_photos(tmp_path, adapter="drives")
    with pytest.raises(DataError, match="no photo lies where DRIVE keeps its photos"):
        list_photos(tmp_path, adapter="drive")
    with pytest.raises(DataError, match="reads a single folder with its own label files"):
        list_photos([tmp_path / "a.jpg"], adapter="drive")


@pytest.mark.real_data
def test_a_real_tree(real_data: Path) -> None:
    listing = list_photos(real_data / "hrf", adapter="hrf")
    assert {photo.columns["class"] for photo in listing.photos} == {"healthy", "glaucoma", "diabetic retinopathy"}
