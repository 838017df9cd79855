"""Which column of a table names the file, the patient, the eye, the split and the camera."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastfundus.data.tables import UNKNOWN
from fastfundus.errors import DataError
from fastfundus.identifiers import normal_eye
from fastfundus.records import PHOTO_SUFFIXES

__all__ = ["SPLITS", "Roles", "find_roles", "is_header"]

_FILE = (
    "file", "path", "image", "filename", "filepath", "imagepath", "imagefile", "imagename", "imgname", "imgpath", "img",
    "imagefilename", "fname", "imageid", "imgid", "photo", "photoid", "idcode", "picture", "fundus", "id", "name",
)  # fmt: skip
_PATIENT = (
    "patient", "patientid", "patid", "ptno", "patientno", "patientnumber", "patientcode", "pid", "ptid", "subject",
    "subjectid", "subjid", "participant", "participantid", "person", "personid", "individual", "individualid", "mrn",
    "eid", "caseid",
)  # fmt: skip
_PATIENT_LIKE = re.compile(
    r"(?:^pat|patient|subj|person|participant|proband|mrn|(study|case|record|hospital)(id|no|number))"
    r"(?!.*(age|sex|gender|weight|height|history|status|group|type|label|diagnos|name|date|birth))"
)
_EYE = (
    "eye", "laterality", "eyeside", "eyelaterality", "imagelaterality", "side", "odos", "whicheye", "eyerl", "eyelr",
    "rele", "lere", "rl", "lr", "leftright", "rightleft", "auge", "oeil", "ojo", "occhio",
)  # fmt: skip
_SPLIT = ("split", "set", "subset", "partition", "datasplit", "dataset")
_IS_VALID = ("isvalid", "isval", "isvalidation")
_CAMERA = ("camera", "cameramodel", "device", "devicemodel", "manufacturermodelname")
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Split by lower-case text, in tables and folder names."""
_LOOKED_AT = 1000
_NUMERIC_CODES = frozenset({"0", "1", "2"})


@dataclass(slots=True)
class Roles:
    """The columns with a special meaning."""

    columns: dict[str, int]
    """Index of the column by role: "file" always; "patient", "eye", "split", "is_valid" and "camera" where there is
    one."""
    notes: list[str] = field(default_factory=list)


def find_roles(header: list[str], cells: list[list[str]], *, eye_codes: Mapping[str, str] | None, path: Path) -> Roles:
    """Assign roles to the columns of a table.

    Names are compared ignoring case and punctuation. A column with the plain name of a role ("patient", "eye", "split",
    "camera") always has it. Other names of eyes and splits count only if most values fit: a column "side" is the eye
    only if most of its values are eyes.

    Args:
        header: names of the columns.
        cells: stripped cells by column.
        eye_codes: "L" or "R" by cell text, where eyes are coded by numbers.
        path: the table, for messages.

    Raises:
        DataError: no column identifies the photos.
    """
    plain = list(map(_plain, header))
    values = {
        column: {cell for cell in set(cells[column]) if cell.lower() not in UNKNOWN}
        for column, name in enumerate(plain)
        if name in _EYE or name in _SPLIT
    }
    roles = Roles({})

    def choose(role: str, names: tuple[str, ...], fits: Callable[[str], object] | None = None) -> None:
        free = [column for column in range(len(plain)) if column not in roles.columns.values()]
        candidates = [column for name in names for column in free if plain[column] == name]
        if fits is not None:
            candidates = [column for column in candidates if plain[column] == role or _fit(values[column], fits)]
        if candidates:
            roles.columns[role] = candidates[0]
        if len(candidates) > 1 and role in ("file", "patient"):
            others = " and ".join(repr(header[column]) for column in candidates[1:])
            roles.notes.append(
                f"{path}: column {header[candidates[0]]!r} is read as the {role}, and {others} as a label; if that is "
                f"wrong, rename the right column to {role!r}"
            )

    choose("file", _FILE)
    _prefer_names_of_photos(header, cells, roles, path)
    if "file" not in roles.columns:
        raise DataError(
            f"has no column that identifies the photos; columns: {', '.join(filter(None, header))}; rename the right "
            "one to 'file'",
            path=path,
            row=1,
        )
    choose("patient", _PATIENT)
    if "patient" not in roles.columns:
        alike = [name for name, bare in zip(header, plain, strict=True) if _PATIENT_LIKE.search(bare)]
        if alike:
            roles.notes.append(
                f"{path}: column {alike[0]!r} looks like the patient but is kept as a label: rename it to 'patient' if "
                "it is; without patients, both eyes of a person may land on two sides of a split"
            )
    choose("eye", _EYE, lambda value: normal_eye(value, eye_codes))
    choose("split", _SPLIT, lambda value: value.lower() in SPLITS)
    if "split" not in roles.columns:
        choose("is_valid", _IS_VALID)
    choose("camera", _CAMERA)
    for column in (column for column, name in enumerate(plain) if name in _EYE):
        roles.notes += _notes_on_eyes(
            header[column], values[column], eye_codes, column == roles.columns.get("eye"), path
        )
    return roles


def _prefer_names_of_photos(header: list[str], cells: list[list[str]], roles: Roles, path: Path) -> None:
    """If the values of another column are names of photos, and those of the chosen one are not, choose that one.

    Raises:
        DataError: there are two such columns, as in tables with one row per patient.
    """
    chosen = roles.columns.get("file")
    if chosen is not None and _names_photos(cells[chosen]):
        return
    fitting = [column for column, values in enumerate(cells) if header[column] and _names_photos(values)]
    if len(fitting) > 1:
        names = " and ".join(repr(header[column]) for column in fitting[:3])
        raise DataError(
            f"has names of photos in the columns {names}; one row per photo is needed (if it belongs to a public data "
            "set, give its folder without --labels)",
            path=path,
            row=1,
        )
    if fitting:
        roles.columns["file"] = fitting[0]
        other = f", and {header[chosen]!r} as a label" if chosen is not None else ""
        roles.notes.append(f"{path}: column {header[fitting[0]]!r} has names of photos and is read as the file{other}")


def _names_photos(values: list[str]) -> bool:
    """Return whether most of the first cells of a column that are not empty end like the name of a photo."""
    first = [value for value in values[:_LOOKED_AT] if value]
    fitting = sum(os.path.splitext(value)[1].lower() in PHOTO_SUFFIXES for value in first)
    return bool(first) and fitting > len(first) / 2


def is_header(cells: list[str]) -> bool:
    """Return whether cells name the columns of a table of photos: several, of which one identifies the photo."""
    plain = [name for name in map(_plain, cells) if name]
    named = any(Path(cell.strip()).suffix.lower() in PHOTO_SUFFIXES for cell in cells)
    return len(plain) > 1 and not named and any(name in _FILE for name in plain)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _fit(values: set[str], fits: Callable[[str], object]) -> bool:
    """Return whether most values of a column fit: a few photos of unknown or both eyes do not make it a label."""
    return bool(values) and sum(bool(fits(value)) for value in values) >= len(values) / 2


def _notes_on_eyes(
    name: str, values: set[str], eye_codes: Mapping[str, str] | None, is_eye: bool, path: Path
) -> list[str]:
    """Return notes on cells of a column of eyes that name no eye."""
    if eye_codes is None and values and {value.removesuffix(".0") for value in values} <= _NUMERIC_CODES:
        return [
            f"{path}: column {name!r} codes the eye as {', '.join(sorted(values))}: eyes are unknown until the codes "
            "are declared, such as --eye-codes 1=R,2=L"
        ]
    wrong = sorted(value for value in values if normal_eye(value, eye_codes) is None) if is_eye else []
    if wrong:
        return [f"{path}: column {name!r} has values that are no eye, such as {wrong[0]!r}; the eye is unknown there"]
    return []
