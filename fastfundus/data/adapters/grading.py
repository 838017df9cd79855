"""Adapters for data sets graded for diabetic retinopathy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastfundus.data.adapters.entry import Adapter, Column, Groups, Table, stem

__all__ = ["GRADING"]

_ICDR: Mapping[str, float | str | None] = {str(grade): float(grade) for grade in range(5)}
"""International Clinical Diabetic Retinopathy scale: 0 none, 1 mild, 2 moderate, 3 severe, 4 proliferative."""
_BINARY: Mapping[str, float | str | None] = {"0": 0.0, "1": 1.0, "no": 0.0, "yes": 1.0}
_ANATOMY: Mapping[str, float | str | None] = {"1": 0.0, "2": 1.0}
"""Coding of anatomy and quality in BRSET: 1 = normal, 2 = abnormal."""


def _by_side(text: str, groups: Groups) -> str:
    return f"{groups['side'].lower()}/{stem(text, groups)}"


def _ddr(columns: dict[str, Any]) -> dict[str, Any]:
    """Convert grade 5, which means that the photo cannot be graded, from a disease grade to a quality label."""
    grade = columns.pop("grade", None)
    if grade is None:
        return columns
    return columns | {"dr_grade": None if grade == 5 else grade, "gradable": float(grade != 5)}


def _messidor_pair(cells: Mapping[str, str], groups: Groups) -> list[tuple[str, dict[str, Any]]]:
    names = [text.strip() for text in cells.values() if text.strip()]
    if len(names) != 2 or names[0].lower() in ("left", "image left"):
        return []
    patient = f"exam {stem(names[0], groups)}"
    return [
        (stem(names[0], groups), {"patient": patient, "eye": "L"}),
        (stem(names[1], groups), {"patient": patient, "eye": "R"}),
    ]


GRADING = (
    Adapter(
        name="aptos2019",
        title="APTOS 2019",
        photos=(r"(?:train_images|test_images|train|test)/(?P<id>[0-9a-f]{12})\.png",),
        marks=(r"(?:train_images|train)/[0-9a-f]{12}\.png", r"train\.csv"),
        tables=(
            Table(
                file=r"train\.csv",
                key=("id_code",),
                columns=(Column(name="dr_grade", headers=("diagnosis",), values=_ICDR),),
            ),
        ),
        traps=(
            "patients are unknown, and some photos occur twice, occasionally with different grades: see `cache audit`",
            "the photos in test_images have no labels",
        ),
    ),
    Adapter(
        name="eyepacs",
        title="EyePACS (Kaggle 2015)",
        photos=(r"(?P<folder>train|test)(?:/images)?/(?P<id>(?P<patient>\d+)_(?P<eye>left|right))\.jpe?g",),
        marks=(
            r"(?:train|test)(?:/images)?/\d+_(?:left|right)\.jpe?g",
            r"(?:trainLabels|retinopathy_solution|testLabels|Label_EyeQ_train|Label_EyeQ_test)\.csv",
        ),
        tables=(
            Table(
                file=r"(?:trainLabels|testLabels)\.csv",
                key=("image",),
                key_of=stem,
                columns=(Column(name="dr_grade", headers=("level",), values=_ICDR),),
            ),
            Table(
                file=r"retinopathy_solution\.csv",
                key=("image",),
                key_of=stem,
                columns=(
                    Column(name="dr_grade", headers=("level",), values=_ICDR),
                    Column(name="official_split", headers=("usage",), values={"public": "val", "private": "test"}),
                ),
            ),
            Table(
                file=r"Label_EyeQ_(?:train|test)\.csv",
                key=("image",),
                key_of=stem,
                columns=(Column(name="quality_grade", headers=("quality",), values={"0": 0.0, "1": 1.0, "2": 2.0}),),
            ),
        ),
        traps=("labels are noisy, ungradable photos are included; quality_grade (EyeQ): 0 good, 1 usable, 2 reject",),
    ),
    Adapter(
        name="messidor2",
        title="Messidor-2",
        photos=(r"IMAGES/(?P<id>(?:\d{8}_\d+_\d+_PP|IM\d+))\.(?:png|jpg|tif)",),
        marks=(r"IMAGES/(?:\d{8}_\d+_\d+_PP|IM\d+)\.(?:png|jpg|tif)",),
        tables=(
            Table(
                file=r"messidor_data\.csv",
                key=("image_id", "image"),
                key_of=stem,
                columns=(
                    Column(name="dr_grade", headers=("adjudicated_dr_grade", "diagnosis"), values=_ICDR),
                    Column(name="dme", headers=("adjudicated_dme",), values=_BINARY),
                    Column(name="gradable", headers=("adjudicated_gradable",), values=_BINARY),
                ),
            ),
            Table(file=r"messidor-2\.csv", delimiter=";", header=("left", "right"), rows_of=_messidor_pair),
        ),
        traps=("only the list of pairs (messidor-2.csv) shows which photos are of the same patient",),
    ),
    Adapter(
        name="idrid",
        title="IDRiD",
        photos=(
            r"(?P<part>[BC])\. (?:Disease Grading|Localization)/1\. Original Images"
            r"/(?P<side>a\. Training Set|b\. Testing Set)/(?P<id>IDRiD_\d+)\.jpg",
            # Only the photos of this part were annotated for lesions: the group `lesions` restricts masks to them.
            r"(?P<part>(?P<lesions>A))\. Segmentation/1\. Original Images"
            r"/(?P<side>a\. Training Set|b\. Testing Set)/(?P<id>IDRiD_\d+)\.jpg",
        ),
        marks=(r"[ABC]\. (?:Disease Grading|Segmentation|Localization)/1\. Original Images/.*/IDRiD_\d+\.jpg",),
        key=lambda groups: f"{groups['part']}/{groups['side'][0]}/{groups['id']}",
        sides={"a. training set": "train", "b. testing set": "test"},
        tables=(
            Table(
                file=r"(?P<part>B)\. Disease Grading/2\. Groundtruths/(?P<side>[ab])\. IDRiD_Disease Grading_.*\.csv",
                key=("Image name",),
                key_of=lambda text, groups: f"{groups['part']}/{groups['side']}/{text}",
                columns=(
                    Column(name="dr_grade", headers=("Retinopathy grade",), values=_ICDR),
                    Column(name="dme_grade", headers=("Risk of macular edema",), values={"0": 0.0, "1": 1.0, "2": 2.0}),
                ),
            ),
        ),
        masks={
            name: "{lesions}. Segmentation/2. All Segmentation Groundtruths/{side}/"
            f"{number}. {folder}/{{id}}_{short}.tif"
            for name, number, folder, short in (
                ("microaneurysms", 1, "Microaneurysms", "MA"),
                ("haemorrhages", 2, "Haemorrhages", "HE"),
                ("hard_exudates", 3, "Hard Exudates", "EX"),
                ("soft_exudates", 4, "Soft Exudates", "SE"),
                ("disc", 5, "Optic Disc", "OD"),
            )
        },
        absent_masks=True,
        traps=(
            "each part numbers its photos from 1, and so does the test set of each part",
            "a lesion without a mask file is absent from that photo",
        ),
    ),
    Adapter(
        name="ddr",
        title="DDR",
        photos=(
            r"DR_grading/(?P<side>train|valid|test)/(?P<id>[^/]+)\.jpe?g",
            r"lesion_segmentation/(?P<part>train|valid|test)/image/(?P<id>[^/]+)\.jpe?g",
        ),
        marks=(r"(?:DR_grading/(?:train|valid|test)|lesion_segmentation/(?:train|valid|test)/image)/[^/]+\.jpe?g",),
        key=lambda groups: f"{groups.get('side', '').lower()}/{groups['id']}",
        sides={"train": "train", "valid": "val", "test": "test"},
        tables=(
            Table(
                file=r"DR_grading/(?P<side>train|valid|test)\.txt",
                delimiter=" ",
                header=("image", "grade"),
                key=("image",),
                key_of=_by_side,
                columns=(Column(name="grade", headers=("grade",), values={str(n): float(n) for n in range(6)}),),
            ),
        ),
        masks={
            name: f"lesion_segmentation/{{part}}/label/{short}/{{id}}.tif"
            f"|lesion_segmentation/{{part}}/segmentation label/{short}/{{id}}.tif"
            for name, short in (
                ("hard_exudates", "EX"), ("haemorrhages", "HE"), ("microaneurysms", "MA"), ("soft_exudates", "SE")
            )
        },
        absent_masks=True,
        finish=_ddr,
        traps=("grade 5 means that a photo cannot be graded: it is stored as gradable = 0 without a grade",),
    ),
    Adapter(
        name="brset",
        title="BRSET",
        photos=(r"fundus_photos/(?P<id>img\d+)\.jpe?g",),
        marks=(r"fundus_photos/img\d+\.jpe?g", r"labels(?:_brset)?\.csv"),
        tables=(
            Table(
                file=r"labels(?:_brset)?\.csv",
                key=("image_id",),
                key_of=stem,
                columns=(
                    Column(name="patient", headers=("patient_id",)),
                    Column(name="camera", headers=("camera",)),
                    Column(name="age", headers=("patient_age",)),
                    Column(name="sex", headers=("patient_sex",), values={"1": "M", "2": "F"}),
                    Column(name="eye", headers=("exam_eye",), values={"1": "R", "2": "L"}),
                    Column(name="dr_grade", headers=("DR_ICDR",), values=_ICDR),
                    Column(name="dr_grade_sdrg", headers=("DR_SDRG",), values=_ICDR),
                    *(
                        Column(name=f"abnormal_{name}", headers=headers, values=_ANATOMY)
                        for name, headers in {
                            "disc": ("optic_disc",), "vessels": ("vessels",), "macula": ("macula",),
                            "focus": ("focus",), "illumination": ("iluminaton", "illuminaton", "illumination"),
                            "image_field": ("image_field",), "artifacts": ("artifacts",),
                        }.items()
                    ),
                    *(
                        Column(name=name, headers=(name,), values=_BINARY)
                        for name in (
                            "diabetic_retinopathy", "macular_edema", "scar", "nevus", "amd", "vascular_occlusion",
                            "hypertensive_retinopathy", "drusens", "hemorrhage", "retinal_detachment", "myopic_fundus",
                            "increased_cup_disc", "other",
                        )
                    ),
                    Column(name="gradable", headers=("quality",), values={"adequate": 1.0, "inadequate": 0.0}),
                ),
            ),
        ),
        traps=("column headers are spelt differently between releases", "age is missing for a third of the patients"),
    ),
    Adapter(
        name="mbrset",
        title="mBRSET",
        photos=(r"images/(?P<id>(?P<patient>\d+)\.\d+)\.jpe?g",),
        marks=(r"images/\d+\.\d+\.jpe?g", r"labels_mbrset\.csv"),
        tables=(
            Table(
                file=r"labels_mbrset\.csv",
                key=("file",),
                key_of=stem,
                columns=(
                    Column(name="patient", headers=("patient",)),
                    Column(name="eye", headers=("laterality",), values={"left": "L", "right": "R", "l": "L", "r": "R"}),
                    Column(name="age", headers=("age",)),
                    # Coded as 0 and 1, unlike BRSET.
                    Column(name="sex", headers=("sex",), values={"0": "F", "1": "M"}),
                    Column(name="dr_grade", headers=("final_icdr",), values=_ICDR),
                    Column(name="macular_edema", headers=("final_edema",), values=_BINARY),
                    Column(name="gradable", headers=("final_quality",), values=_BINARY),
                    Column(name="artifacts", headers=("final_artifacts",), values=_BINARY),
                ),
            ),
        ),
        traps=("photos are from a handheld camera; a missing grade means that the photo could not be graded",),
    ),
)  # fmt: skip
