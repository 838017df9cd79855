"""Adapters for data sets with vessel masks."""

from __future__ import annotations

from fastfundus.data.adapters.entry import Adapter

__all__ = ["VESSELS"]

_FIVES = {"a": "AMD", "d": "diabetic retinopathy", "g": "glaucoma", "n": "normal"}
_HRF = {"h": "healthy", "dr": "diabetic retinopathy", "g": "glaucoma"}

VESSELS = (
    Adapter(
        name="drive",
        title="DRIVE",
        photos=(r"(?P<side>training|test)/images/(?P<id>(?P<number>\d+)_(?:training|test))\.tif",),
        marks=(r"(?:training|test)/images/\d+_(?:training|test)\.tif",),
        sides={"training": "train", "test": "test"},
        masks={
            "vessels": "{side}/1st_manual/{number}_manual1.gif",
            "vessels_second": "{side}/2nd_manual/{number}_manual2.gif",
            "field": "{side}/mask/{id}_mask.gif",
        },
        traps=("newer archives contain no masks for the test photos",),
    ),
    Adapter(
        name="stare",
        title="STARE",
        photos=(r"(?:stare-images/)?(?P<id>im\d{4})\.ppm(?:\.gz)?",),
        marks=(r"(?:stare-images/)?im\d{4}\.ppm(?:\.gz)?",),
        masks={
            "vessels": "labels-ah/{id}.ah.ppm|labels-ah/{id}.ah.ppm.gz",
            "vessels_second": "labels-vk/{id}.vk.ppm|labels-vk/{id}.vk.ppm.gz",
        },
        traps=("it has no official split and no field-of-view masks",),
    ),
    Adapter(
        name="chase_db1",
        title="CHASE_DB1",
        photos=(r"(?P<id>Image_(?P<patient>\d{2})(?P<eye>L|R))\.jpg",),
        marks=(r"Image_\d{2}[LR]\.jpg", r"Image_\d{2}[LR]_1stHO\.png"),
        masks={"vessels": "{id}_1stHO.png", "vessels_second": "{id}_2ndHO.png"},
        traps=("it contains both eyes of each child: they stay together", "it has no field-of-view masks"),
    ),
    Adapter(
        name="hrf",
        title="HRF",
        photos=(r"images/(?P<id>(?P<number>\d{2})_(?P<class>dr|g|h))\.jpe?g",),
        marks=(r"images/\d{2}_(?:dr|g|h)\.jpe?g",),
        classes={letter: {"class": name, "abnormal": float(letter != "h")} for letter, name in _HRF.items()},
        masks={
            "vessels": "manual1/{id}.tif|masks/{id}.tif",
            "field": "mask/{id}_mask.tif",
        },
        traps=("the extensions of its photos vary (.JPG and .jpg)",),
    ),
    Adapter(
        name="fives",
        title="FIVES",
        photos=(r"(?P<side>train|test)/Original/(?P<id>\d+_(?P<class>[ADGN]))\.png",),
        marks=(r"(?:train|test)/Original/\d+_[ADGN]\.png",),
        sides={"train": "train", "test": "test"},
        classes={letter: {"class": name, "abnormal": float(letter != "n")} for letter, name in _FIVES.items()},
        masks={"vessels": "{side}/Ground truth/{id}.png"},
        traps=("A stands for AMD, not for normal", "file numbers restart at 1 in the test set"),
    ),
)
