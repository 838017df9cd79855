"""What names say about a photo: eye and patient in file names, folders, columns and DICOM. Standard library only.

A wrong patient is worse than none: photos of different people would share a result row, and photos of one person could
land on two sides of a split. Names that are ambiguous therefore yield nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "EyeName",
    "is_device_word",
    "is_patient_folder",
    "is_placeholder",
    "normal_eye",
    "parse_eye_codes",
    "read_eye_name",
]

_LEFT = ("l", "left", "os", "oi", "og", "le", "lt", "left eye", "lefteye", "oculus sinister", "sinister", "izquierdo")
_RIGHT = ("r", "right", "od", "re", "rt", "right eye", "righteye", "oculus dexter", "dexter", "derecho")
_EYES = dict.fromkeys(_LEFT, "L") | dict.fromkeys(_RIGHT, "R")
# In running text "le", "re", "lt" and "rt" are words or abbreviations, so that only upper case counts.
_WORD = r"(?:(?i:left|right|od|os|oi|og|l|r)|LE|RE|LT|RT)(?:[_\-. ]?(?i:eye))?"
_SEPARATED = re.compile(rf"(?:^|(?<=[_\-. ]))({_WORD})(?=[_\-. ]|$)")
_NUMBERED = re.compile(rf"({_WORD})[_\-. ]?\(?\d{{0,2}}\)?")
_ATTACHED = re.compile(r"(.*\d)(OD|OS|OI|OG|RE|LE)")
_ATTACHED_EYES = frozenset({"OD", "OS", "OI", "OG", "RE", "LE"})
_LONGEST_EYE = 20
_DATED = re.compile(r"[_\-. ](19|20)\d{2}[_\-. ]?(0[1-9]|1[0-2])[_\-. ]?[0-3]\d$")
_SEPARATOR = re.compile(r"[_\-. ]")
_PATIENT_FOLDER = re.compile(r"(?:p|pt|pat|patient|subj|subject|sub|participant|person)[_\-. ]?\d+", re.IGNORECASE)
_DEVICE_WORDS = frozenset(
    {
        "img", "image", "images", "imgs", "photo", "photos", "picture", "pic", "fundus", "retina", "cfp", "color",
        "colour", "dsc", "dscn", "dscf", "scan", "capture", "eye", "eyes", "file", "export", "patient", "subject",
        "sample", "test", "unknown", "anonymous", "anonymized", "anonymised",
    }
)  # fmt: skip
_PLACEHOLDERS = frozenset(
    {
        "unknown", "none", "null", "nan", "na", "nil", "nopatientid", "noid", "noname", "noident", "notavailable",
        "notapplicable", "removed", "deleted", "redacted", "hidden", "masked", "blank", "empty", "dummy", "default",
        "test", "testpatient", "patient", "patientid", "subject", "id", "anon", "anonymous", "anonymized", "anonymised",
        "anonymouspatient", "anonymizedpatient", "anonymisedpatient", "anonymouspatientid", "deidentified",
        "deidentifiedpatient", "pseudonymized", "pseudonymised", "unk", "anonym", "anonyme", "anonimo", "nn", "nobody",
        "undefined", "unspecified", "novalue", "nodata", "notknown", "notspecified", "missing", "unbekannt", "inconnu",
        "desconocido", "private", "confidential", "tbd",
    }
)  # fmt: skip
_NUMBERED_NOBODY = re.compile(r"(anonym|unknown|unk|noname|nobody)\w*?\d{1,2}", re.IGNORECASE)
_VISIT_WORDS = (
    r"(?:baseline|bl|screening|v\d{1,2}|(?:visita?|visite|session|ses|timepoint|tp|follow[_\-. ]?up|fu|month|year|week)"
    r"[_\-. ]?\d{1,3}|\d{1,3}[_\-. ]?(?:months?|years?|weeks?))"
)
_VISIT = re.compile(_VISIT_WORDS, re.IGNORECASE)
"""A folder that tells the visit, not the person. Single letters are none: M12 may be a man."""
_VISITED = re.compile(rf"[_\-. ]{_VISIT_WORDS}$", re.IGNORECASE)
_NO_PERSON = re.compile(r"(site|cent|clinic|hospital|study|cohort|group|batch|set|part|year|series|export|scan|19|20)")
"""How texts with numbers begin that stand for many people."""
_DATE = re.compile(r"(19|20)\d{2}[_\-. ]?(0[1-9]|1[0-2])[_\-. ]?[0-3]\d")


@dataclass(frozen=True, slots=True)
class EyeName:
    """Eye and patient according to the path of a photo."""

    eye: str | None = None
    """"L", "R", or None if the path names no eye or both."""
    patient: str | None = None
    """The part of the path that identifies the patient, with its folders; None if there is none."""
    shot: str = ""
    """What follows the eye in the file name, such as a running number."""
    in_folder: bool = False
    """True if `patient` is a folder of its own, as in `P001/OD.jpg`."""
    eye_first: bool = False
    """True if the eye comes first, as in `left_12.jpg` or `left/12.jpg`: `patient` may then be a running number."""


def normal_eye(text: str | None, codes: Mapping[str, str] | None = None) -> str | None:
    """Convert "left", "OS", "R", ... to "L" or "R", and anything else to None.

    Args:
        text: the text of a cell, a file name or a DICOM attribute.
        codes: "L" or "R" by text, for tables that code eyes by numbers.
    """
    if codes is not None:
        code = (text or "").strip()
        if (known := codes.get(code) or codes.get(code.removesuffix(".0"))) is not None:
            return known
    return _eye_of(text or "")


@functools.lru_cache(4096)
def _eye_of(text: str) -> str | None:
    plain = " ".join(re.sub(r"[_\-.]+", " ", text).lower().split())
    return _EYES.get(plain) or _EYES.get(plain.removesuffix(" eye")) or _EYES.get(plain.replace(" ", ""))


def parse_eye_codes(text: str) -> dict[str, str]:
    """Read a declaration such as "1=R,2=L".

    Raises:
        ValueError: it is not a list of CODE=EYE, or does not name both eyes.
    """
    codes: dict[str, str] = {}
    for pair in text.split(","):
        code, equals, eye = pair.partition("=")
        side = normal_eye(eye)
        if not equals or not code.strip() or side is None or code.strip() in codes:
            raise ValueError(f"{pair.strip()!r} is not CODE=EYE; give both eyes, such as 1=R,2=L")
        codes[code.strip()] = side
    if set(codes.values()) != {"L", "R"}:
        raise ValueError(f"{text!r} names one eye only; give both, such as 1=R,2=L")
    return codes


def is_placeholder(patient: str, *, zeros: bool = False) -> bool:
    """Return whether a patient identifier stands for "unknown", as de-identification tools write it.

    Args:
        patient: the identifier.
        zeros: whether identifiers of only zeros and numbered ones such as "ANONYMOUS1" count, too; tables may number
            people.
    """
    if patient.isalnum() and any(map(str.isdigit, patient)):
        return zeros and (set(patient) <= {"0"} or _NUMBERED_NOBODY.fullmatch(patient) is not None)
    plain = re.sub(r"[\W_]+", "", patient).lower()
    if not plain or plain in _PLACEHOLDERS:
        return True
    words = re.split(r"[\W_]+", patient.strip().lower())
    if len(words) > 1 and words[0] in _PLACEHOLDERS and all(w in _PLACEHOLDERS or w.isdigit() for w in words):
        # "Anonymous^1" is nobody; "anonymous 0017" may be a pseudonym.
        return sum(len(word) for word in words if word.isdigit()) < 3
    return (zeros and set(plain) <= {"0"}) or (len(plain) > 1 and set(plain) == {"x"})


def read_eye_name(name: str) -> EyeName:
    """Read patient and eye from a path such as `123_left.jpg`, `P001/OD.jpg`, `P001/left/1.jpg` or `RET002OD.jpg`.

    Args:
        name: path relative to the folder that contains all photos, with forward slashes.
    """
    parent, slash, last = name.rpartition("/")
    folders = tuple(parent.split("/")) if slash else ()
    stem, dot, suffix = last.rpartition(".")
    if not dot or suffix.isdigit():
        stem = last
    elif suffix.lower() == "gz":
        stem = stem.rpartition(".")[0] or stem
    numbered = _NUMBERED.fullmatch(stem) if len(stem) < _LONGEST_EYE else None
    if numbered and folders:
        shot = stem[numbered.end(1) :].strip("_-. ()")
        return EyeName(normal_eye(numbered[1]), _person_of(folders), shot=shot, in_folder=True)
    words = list(_SEPARATED.finditer(stem))
    eyes = {_eye_of(word[1]) for word in words}
    if words and len(eyes) == 1:
        before = stem[: words[0].start()].rstrip("_-. ")
        after = stem[words[0].end() :].lstrip("_-. ")
        if before:
            return EyeName(eyes.pop(), f"{parent}{slash}{_without_visit(before)}", shot=after)
        return EyeName(eyes.pop(), f"{parent}{slash}{after}" if after else None, eye_first=True)
    if words:
        return EyeName()
    attached = _ATTACHED.fullmatch(stem) if stem[-2:] in _ATTACHED_EYES else None
    if attached:
        return EyeName(normal_eye(attached[2]), f"{parent}{slash}{attached[1]}")
    return _from_folders(folders, stem)


def _from_folders(folders: tuple[str, ...], stem: str) -> EyeName:
    """Read a path whose file name tells nothing: a folder may be an eye, or be named like a patient."""
    eyes = [(place, eye) for place, folder in enumerate(folders) if (eye := normal_eye(folder))]
    if len(eyes) == 1:
        place, eye = eyes[0]
        others = (*folders[:place], *folders[place + 1 :])
        if others:
            return EyeName(eye, _person_of(others), shot=stem, in_folder=True)
        return EyeName(eye, stem, eye_first=True)
    for depth in range(len(folders), 0, -1):
        if _PATIENT_FOLDER.fullmatch(folders[depth - 1]):
            return EyeName(None, "/".join(folders[:depth]), shot=stem, in_folder=True)
    return EyeName()


def _without_visit(before: str) -> str:
    """Remove a date or a visit from the end of the text before the eye: the patient is the same at the next one.

    After a name without a number, a date may be that of birth, which tells two people of one name apart.
    """
    for ending in (_DATED, _VISITED) if _SEPARATOR.search(before) else ():
        shorter = ending.sub("", before)
        if shorter != before and _is_identifier(shorter):
            return shorter
    return before


def _person_of(folders: tuple[str, ...]) -> str:
    """Return the folders of a person without those of visits below them."""
    kept = list(folders)
    while len(kept) > 1 and (_VISIT.fullmatch(kept[-1]) or _DATE.fullmatch(kept[-1])) and _is_identifier(kept[-2]):
        kept.pop()
    return "/".join(kept)


def _is_identifier(text: str) -> bool:
    """Return whether the last part of a text is the number of a person: two digits at least, and no site or year."""
    last = _SEPARATOR.split(text)[-1].lower()
    digits = sum(map(str.isdigit, last))
    return is_patient_folder(last) or (digits >= 2 and not _NO_PERSON.match(last))


def is_patient_folder(name: str) -> bool:
    """Return whether a folder is named like a patient, such as `P001`."""
    return _PATIENT_FOLDER.fullmatch(name) is not None


def is_device_word(patient: str) -> bool:
    """Return whether the part of a name before the eye is a word that cameras and exports write, not a person."""
    name = patient.rpartition("/")[2]
    return not name.isdigit() and re.sub(r"[\W_]+", "", name).lower() in _DEVICE_WORDS
