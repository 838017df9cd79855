"""Patients and eyes from the names of all photos of a source, seen together."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

from fastfundus.identifiers import EyeName, is_device_word, read_eye_name
from fastfundus.records import SourcePhoto

__all__ = ["note_crowded_patients", "people_from_names"]

_MAX_SHOTS = 8
"""Photos that one person plausibly has: more with the same text before the eye share a constant prefix."""
_MAX_PHOTOS_OF_A_PATIENT = 50
_DATE = re.compile(r"(19|20)\d{2}([_\-. ]?(0[1-9]|1[0-2])([_\-. ]?[0-3]\d)?)?")


def people_from_names(names: Mapping[str, str]) -> tuple[dict[str, EyeName], list[str]]:
    """Read patient and eye from the names of photos.

    A patient is unknown where the text before the eye may be the same for photos of different people: the `IMG` of
    `IMG_L_0001.jpg`, a site or a date; wherever what follows the eye counts through all photos; and where only a
    running number follows the eye.

    Args:
        names: path relative to the folder that contains all photos, by key.

    Returns:
        What each name says, by key, and notes for the user.
    """
    read = {key: read_eye_name(name) for key, name in names.items()}
    groups: dict[str, list[str]] = defaultdict(list)
    for key, found in read.items():
        if found.patient is not None:
            groups[found.patient].append(key)
    counting = _count_through(read)
    notes: list[str] = []
    lost: Counter[str] = Counter()
    for patient, keys in groups.items():
        photos = [read[key] for key in keys]
        if _is_one_person(patient, photos, counting=counting):
            continue
        lost["" if photos[0].eye_first else _last(patient)] += len(keys)
        for key in keys:
            read[key] = replace(read[key], patient=None)
    for prefix, count in list(lost.items())[:5]:
        if prefix:
            notes.append(
                f"{prefix!r} in the names of {count} photos may stand for different people: their patients are "
                "unknown; name them in a column 'patient' of a label file"
            )
        else:
            notes.append(
                f"{count} names begin with the eye, and the rest occurs for one eye only: their patients are unknown; "
                "name them in a column 'patient' of a label file"
            )
    folders = Counter(_last(patient) for patient in {found.patient for found in read.values() if found.patient})
    if several := sorted(name for name, count in folders.items() if count > 1):
        notes.append(
            f"{len(several)} names such as {several[0]!r} occur in several folders, and are taken for different "
            "people; if they are the same ones, name them in a column 'patient' of a table"
        )
    return read, notes


def _count_through(read: Mapping[str, EyeName]) -> bool:
    """Return whether what follows the eye is different in every name, as when an export numbers its files."""
    shots = [found.shot for found in read.values() if found.shot and not found.in_folder and not found.eye_first]
    return len(shots) > 1 and len(set(shots)) == len(shots)


def _last(patient: str) -> str:
    return patient.rpartition("/")[2]


def _is_one_person(patient: str, photos: list[EyeName], *, counting: bool) -> bool:
    name = _last(patient)
    eye_first = in_folder = True
    shots = 0
    for photo in photos:
        eye_first &= photo.eye_first
        in_folder &= photo.in_folder
        shots += bool(photo.shot)
    if eye_first:
        # The same number for both eyes is a person; otherwise it may just count photos.
        return {photo.eye for photo in photos} == {"L", "R"}
    if is_device_word(name) or _DATE.fullmatch(name):
        return False
    if in_folder:
        # A folder of a person has a number, or files that are called like their eye and nothing else.
        only_eyes = all(photo.shot == "" for photo in photos)
        return only_eyes or (any(char.isdigit() for char in name) and len(photos) <= 3 * _MAX_SHOTS)
    return not shots or (not counting and len(photos) <= _MAX_SHOTS)


def note_crowded_patients(photos: list[SourcePhoto]) -> list[str]:
    """Return notes about patients with implausibly many photos, whose identifier may stand for many people."""
    counts = Counter(photo.patient for photo in photos if photo.patient_known)
    return [
        f"patient {patient!r} has {count} photos; if it stands for several people, name each in a column 'patient'"
        for patient, count in counts.most_common(3)
        if count > _MAX_PHOTOS_OF_A_PATIENT
    ]
