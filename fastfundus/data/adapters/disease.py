"""Adapters for data sets labelled for one or more diseases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastfundus.data.adapters.entry import Adapter, Column, Groups, Table, stem

__all__ = ["DISEASE", "odir_labels"]

_ODIR_QUALITY = frozenset(
    {"lens dust", "low image quality", "no fundus image", "image offset", "anterior segment image",
     "optic disk photographically invisible"}
)  # fmt: skip
_ODIR_KINDS = {
    "eye_D": r"diabetic retinopathy|non ?proliferative retinopathy",
    "eye_G": r"glaucoma",
    "eye_C": r"cataract",
    "eye_A": r"age-related macular degeneration",
    "eye_H": r"hypertensive retinopathy",
    "eye_M": r"myopi",
}
_RFMID_SIDE = {
    "a. training set": "train", "b. validation set": "val", "c. testing set": "test",
    "training": "train", "validation": "val", "test": "test",
}  # fmt: skip


def odir_labels(keywords: str) -> dict[str, Any]:
    """Derive the labels of one eye of ODIR from its diagnostic keywords.

    Args:
        keywords: keywords separated by full-width or plain commas or semicolons.

    Returns:
        `abnormal`, `eye_N` ... `eye_O` as 0 or 1, and `quality_flags` as text; labels are unknown if the keywords
        describe quality only.
    """
    words = [word.strip().lower() for word in re.split("[，,;；]", keywords) if word.strip()]
    flags = [word for word in words if word in _ODIR_QUALITY]
    findings = [word for word in words if word not in _ODIR_QUALITY]
    names = ("eye_N", *_ODIR_KINDS, "eye_O")
    if not findings:
        return {"abnormal": None, **dict.fromkeys(names), "quality_flags": "; ".join(flags) or None}
    labels = dict.fromkeys(names, 0.0)
    for word in findings:
        kinds = [name for name, pattern in _ODIR_KINDS.items() if re.search(pattern, word)]
        kinds = kinds or (["eye_N"] if word == "normal fundus" else ["eye_O"])
        labels |= dict.fromkeys(kinds, 1.0)
    abnormal = float(any(value for name, value in labels.items() if name != "eye_N"))
    return {"abnormal": abnormal, **labels, "quality_flags": "; ".join(flags) or None}


def _odir_eyes(cells: Mapping[str, str], groups: Groups) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split a row, which describes a patient, into its eyes: labels N to O are per patient, keywords per eye."""
    row = {name.strip().lower(): text.strip() for name, text in cells.items()}
    patient = {"patient": row.get("id"), "age": float(row["patient age"]) if row.get("patient age") else None}
    patient["sex"] = {"male": "M", "female": "F"}.get(row.get("patient sex", "").lower())
    for eye, letter in (("left", "L"), ("right", "R")):
        file = row.get(f"{eye}-fundus", "")
        if file:
            keywords = row.get(f"{eye}-diagnostic keywords", "")
            yield file.rsplit(".", 1)[0], {**patient, "eye": letter, "keywords": keywords, **odir_labels(keywords)}


def _jsiec_classes() -> dict[str, dict[str, float | str | None]]:
    names = (
        "0.0.Normal", "0.1.Tessellated fundus", "0.2.Large optic cup", "0.3.DR1", "1.0.DR2", "1.1.DR3",
        "2.0.BRVO", "2.1.CRVO", "3.RAO", "4.Rhegmatogenous RD", "5.0.CSCR", "5.1.VKH disease", "6.Maculopathy", "7.ERM",
        "8.MH", "9.Pathological myopia", "10.0.Possible glaucoma", "10.1.Optic atrophy",
        "11.Severe hypertensive retinopathy", "12.Disc swelling and elevation", "13.Dragged Disc",
        "14.Congenital disc abnormality", "15.0.Retinitis pigmentosa", "15.1.Bietti crystalline dystrophy",
        "16.Peripheral retinal degeneration and break", "17.Myelinated nerve fiber", "18.Vitreous particles",
        "19.Fundus neoplasm", "20.Massive hard exudates", "21.Yellow-white spots-flecks", "22.Cotton-wool spots",
        "23.Vessel tortuosity", "24.Chorioretinal atrophy-coloboma", "25.Preretinal hemorrhage", "26.Fibrosis",
        "27.Laser Spots", "28.Silicon oil in eye", "29.0.Blur fundus without PDR",
        "29.1.Blur fundus with suspected PDR",
    )  # fmt: skip
    classes: dict[str, dict[str, float | str | None]] = {}
    for index, name in enumerate(names):
        # Normal variants and photos too blurred to assess are neither normal nor abnormal.
        unsure = name.startswith(("0.1.", "0.2.", "29.0."))
        abnormal = None if unsure else float(not name.startswith("0.0."))
        gradable = float(not name.startswith("29."))
        classes[name.lower()] = {
            "class": name, "class_index": float(index), "abnormal": abnormal, "gradable": gradable
        }  # fmt: skip
    return classes


def _papila_key(text: str, groups: Groups) -> str:
    number = re.fullmatch(r"#?(\d+)", text)
    return f"{int(number[1]):03d}{groups['eye']}" if number else ""


_FOVEA = (Column(name="fovea_x_px", headers=("Fovea_X",)), Column(name="fovea_y_px", headers=("Fovea_Y",)))
_STAGES = {"normal_control": 0, "early_glaucoma": 1, "advanced_glaucoma": 2}
_RETINA = {"normal": 0, "cataract": 1, "glaucoma": 2, "retina_disease": 3}

DISEASE = (
    Adapter(
        name="odir",
        title="ODIR-5K",
        photos=(
            r"(?:ODIR-5K_Training_Dataset|Training Images|preprocessed_images|ODIR-5K_Testing_(?:Images|Dataset))"
            r"/(?P<id>(?P<patient>\d+)_(?P<eye>left|right))\.jpg",
        ),
        marks=(r"(?:ODIR-5K_Training_(?:Annotations|Dataset).*\.xlsx|full_df\.csv|data\.xlsx)",),
        tables=(
            Table(
                file=r"(?:ODIR-5K_Training_Annotations.*\.xlsx|full_df\.csv|data\.xlsx)",
                key=("ID",),
                rows_of=_odir_eyes,
            ),
        ),
        traps=(
            "the labels N to O of its table are per patient: labels of eyes are derived from the keywords per eye",
            "keywords such as 'lens dust' are quality flags, not findings",
        ),
    ),
    Adapter(
        name="rfmid",
        title="RFMiD",
        photos=(
            r"(?:1\. Original Images/)?(?P<side>a\. Training Set|b\. Validation Set|c\. Testing Set)/(?P<id>\d+)\.png",
            r"(?:Training_Set|Evaluation_Set|Test_Set)/(?P<side>Training|Validation|Test)/(?P<id>\d+)\.png",
        ),
        marks=(r"(?:.*)RFMiD_(?:Training|Validation|Testing)_Labels\.csv",),
        key=lambda groups: f"{_RFMID_SIDE[groups['side'].lower()]}/{groups['id']}",
        sides=_RFMID_SIDE,
        tables=(
            Table(
                file=r"(?:[abc]\. )?RFMiD_(?P<side>Training|Validation|Testing)_Labels\.csv",
                key=("ID",),
                key_of=lambda text, groups: (
                    f"{ {'training': 'train', 'validation': 'val', 'testing': 'test'}[groups['side'].lower()] }/{text}"
                ),
                columns=(Column(name="abnormal", headers=("Disease_Risk",), values={"0": 0.0, "1": 1.0}),),
                rest=True,
            ),
        ),
        traps=("file numbers restart at 1 in each split", "some of its 45 labels have few or no positives"),
    ),
    Adapter(
        name="jsiec",
        title="JSIEC (1000 images, 39 classes)",
        photos=(r"(?P<class>\d{1,2}\.(?:\d\.)?[A-Za-z][^/]*)/(?P<id>[^/]+)\.jpe?g",),
        marks=(r"0\.0\.Normal/[^/]+\.jpe?g", r"29\.1\.Blur fundus with suspected PDR/[^/]+\.jpe?g"),
        classes=_jsiec_classes(),
        traps=(
            "class_index follows the folder numbers; elsewhere folders are sorted as text (10.0 before 2.0)",
            "patients are unknown",
        ),
    ),
    Adapter(
        name="retina",
        title="Retina (Kaggle cataract dataset)",
        photos=(
            r"(?P<class>1_normal|2_cataract|2_glaucoma|3_retina_disease)/(?P<id>[^/]+)\.png",
            r"(?P<side>train|val|test)/(?P<class>anormal|bcataract|cglaucoma|ddretina_disease)/(?P<id>[^/]+)\.png",
        ),
        marks=(r"(?:3_retina_disease|ddretina_disease)/[^/]+\.png",),
        sides={"train": "train", "val": "val", "test": "test"},
        classes={
            folder: {"class": name, "class_index": float(index), "abnormal": float(index > 0)}
            for name, index in _RETINA.items()
            for folder in (
                {"normal": "1_", "cataract": "2_", "glaucoma": "2_", "retina_disease": "3_"}[name] + name,
                {"normal": "a", "cataract": "b", "glaucoma": "c", "retina_disease": "dd"}[name] + name,
            )
        },
        traps=("patients are unknown", "'retina disease' is a mixed class"),
    ),
    Adapter(
        name="glaucoma_fundus",
        title="Glaucoma Fundus",
        photos=(
            r"(?:(?P<side>train|val|test)/)?(?P<class>a?normal_control|b?early_glaucoma|c?advanced_glaucoma)"
            r"/(?P<id>[^/]+)\.(?:png|jpe?g)",
        ),
        marks=(r"c?advanced_glaucoma/[^/]+\.(?:png|jpe?g)", r"b?early_glaucoma/[^/]+\.(?:png|jpe?g)"),
        sides={"train": "train", "val": "val", "test": "test"},
        classes={
            prefix + name: {"class": name, "glaucoma_stage": float(stage), "glaucoma": float(stage > 0)}
            for (name, stage), letter in zip(_STAGES.items(), "abc", strict=True)
            for prefix in ("", letter)
        },
        traps=("patients are unknown",),
    ),
    Adapter(
        name="papila",
        title="PAPILA",
        photos=(r"FundusImages/RET(?P<id>(?P<patient>\d{3})(?P<eye>OD|OS))\.jpe?g",),
        marks=(r"FundusImages/RET\d{3}(?:OD|OS)\.jpe?g",),
        tables=(
            Table(
                file=r"ClinicalData/patient_data_(?P<eye>od|os)\.xlsx",
                # The first header cell is empty; its column contains patient numbers such as #002.
                key=("ID", ""),
                key_of=_papila_key,
                columns=(
                    Column(name="age", headers=("Age",)),
                    Column(name="sex", headers=("Gender",), values={"0": "M", "1": "F"}),
                    Column(
                        name="class", headers=("Diagnosis",), values={"0": "healthy", "1": "glaucoma", "2": "suspect"}
                    ),
                ),
            ),
        ),
        finish=lambda columns: columns
        | {"glaucoma": {"healthy": 0.0, "glaucoma": 1.0}.get(str(columns.get("class")))},
        traps=("suspect eyes have no glaucoma label", "other releases order the classes differently"),
    ),
    Adapter(
        name="refuge",
        title="REFUGE",
        photos=(
            r"(?:REFUGE-)?(?P<side>Training)400/(?:Training400/)?(?P<class>Glaucoma|Non-Glaucoma)/(?P<id>[gn]\d+)\.jpg",
            r"(?:REFUGE-)?(?P<side>Validation|Test)400/(?:(?:REFUGE-)?(?:Validation|Test)400/|images/)?(?P<id>[VT]\d+)\.jpg",
        ),
        marks=(r"(?:REFUGE-.*|(?:REFUGE-)?Training400/(?:Training400/)?Glaucoma/g\d+\.jpg)",),
        sides={"training": "train", "validation": "val", "test": "test"},
        classes={"glaucoma": {"glaucoma": 1.0}, "non-glaucoma": {"glaucoma": 0.0}},
        tables=(
            Table(
                file=r"(?:.*/)?(?:Glaucoma_label_and_Fovea_location|Fovea_locations?|Fovea_location)\.xlsx",
                key=("ImgName", "Img"),
                key_of=stem,
                columns=(
                    Column(
                        name="glaucoma",
                        headers=("Label(Glaucoma=1)", "Glaucoma Label", "Label"),
                        values={"0": 0.0, "1": 1.0},
                    ),
                    *_FOVEA,
                ),
            ),
        ),
        masks={
            "disc_cup": "Annotation-Training400/Annotation-Training400/Disc_Cup_Masks/{class}/{id}.bmp"
            "|Annotation-Training400/Disc_Cup_Masks/{class}/{id}.bmp|REFUGE-Validation400-GT/Disc_Cup_Masks/{id}.bmp"
            "|REFUGE-Test-GT/Disc_Cup_Masks/G/{id}.bmp|REFUGE-Test-GT/Disc_Cup_Masks/N/{id}.bmp"
        },
        traps=(
            "its masks are inverted: 0 is the cup, 128 the disc rim, 255 the background",
            "training photos are from a Zeiss camera, all others from a Canon camera",
        ),
    ),
    Adapter(
        name="adam",
        title="ADAM (iChallenge-AMD)",
        photos=(
            r"(?P<side>Training)400/(?P<class>AMD|Non-AMD)/(?P<id>[AN]\d+)\.jpg",
            r"(?:ADAM-)?(?P<side>Validation|Test)400/(?P<id>[VT]\d+)\.jpg",
        ),
        marks=(r"Training400/(?:AMD|Non-AMD)/[AN]\d+\.jpg",),
        sides={"training": "train", "validation": "val", "test": "test"},
        classes={"amd": {"amd": 1.0}, "non-amd": {"amd": 0.0}},
        traps=("A0012.jpg is damaged in some copies of the set and is then reported as unreadable",),
    ),
    Adapter(
        name="palm",
        title="PALM (pathological myopia)",
        photos=(
            r"PALM-(?P<side>Training)400/(?P<id>(?P<class>[HNP])\d+)\.jpg",
            r"PALM-(?P<side>Validation|Test(?:ing)?)400(?:-Images)?/(?P<id>[VT]\d+)\.jpg",
        ),
        marks=(r"PALM-.*/[HNPVT]\d+\.jpg",),
        sides={"training": "train", "validation": "val", "test": "test", "testing": "test"},
        classes={
            "p": {"pathological_myopia": 1.0, "class": "pathological myopia"},
            "h": {"pathological_myopia": 0.0, "class": "high myopia"},
            "n": {"pathological_myopia": 0.0, "class": "normal"},
        },
        tables=(
            Table(
                file=r"PALM-(?:Validation|Test(?:ing)?)-GT/PM_Label_and_Fovea_Location\.(?:csv|xlsx)",
                key=("imgName", "ImgName"),
                key_of=stem,
                columns=(
                    Column(name="pathological_myopia", headers=("Label", "PM Label"), values={"0": 0.0, "1": 1.0}),
                    *_FOVEA,
                ),
            ),
        ),
        traps=("H means high myopia without pathology and counts as not pathological",),
    ),
)  # fmt: skip
