"""Patients and eyes from the names of all photos of a source, seen together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

from fastfundus.identifiers import EyeName, is_device_word, read_eye_name
from fastfundus.records import SourcePhoto

__all__ = ["note_crowded_patients", "people_from_names"]

_MAX_SHOTS = 6
"""Photos that one person plausibly has in a folder: more with the same text before the eye share a constant prefix."""
_MAX_SHOTS_OF_A_NUMBER = 24
"""The same for text with a number, which identifies a person more often than a site."""
_MAX_PHOTOS_OF_A_PATIENT = 50


def people_from_names(names: Mapping[str, str]) -> tuple[dict[str, EyeName], list[str]]:
    """Read patient and eye from the names of photos.

    A patient is unknown where the text before the eye is the same for photos of different people, such as the `IMG`
    of `IMG_L_0001.jpg` and `IMG_R_0002.jpg`, or where only a running number follows the eye.

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
    prefixes = {
        _last(found.patient)
        for found in read.values()
        if found.patient is not None and found.shot and not found.eye_first and found.eye is not None
    }
    notes: list[str] = []
    lost: Counter[str] = Counter()
    for patient, keys in groups.items():
        if _is_one_person(patient, [read[key] for key in keys], only_prefix=len(prefixes) == 1):
            continue
        lost[_last(patient) if not read[keys[0]].eye_first else ""] += len(keys)
        for key in keys:
            read[key] = replace(read[key], patient=None)
    for prefix, count in lost.items():
        if prefix:
            notes.append(
                f"{prefix!r} in the names of {count} photos is the same for different people: their patients are "
                "unknown; name them in a column 'patient' of a label file"
            )
        else:
            notes.append(
                f"{count} names begin with the eye, and the rest occurs for one eye only: their patients are unknown; "
                "name them in a column 'patient' of a label file"
            )
    return read, notes


def _last(patient: str) -> str:
    return patient.rpartition("/")[2]


def _is_one_person(patient: str, photos: list[EyeName], *, only_prefix: bool) -> bool:
    if all(photo.eye_first for photo in photos):
        # The same number for both eyes is a person; otherwise it may just count photos.
        return {photo.eye for photo in photos} == {"L", "R"}
    shots = [(photo.eye, photo.shot) for photo in photos]
    numbered = all(any(char.isdigit() for char in photo.shot) for photo in photos)
    name = _last(patient)
    from_folder = all(photo.eye is None or photo.shot == "" for photo in photos)
    if from_folder or not numbered:
        return not (numbered and is_device_word(name))
    if is_device_word(name):
        return False
    has_digit = any(char.isdigit() for char in name)
    distinct = len(set(shots)) == len(shots)
    if only_prefix and len(photos) > 1 and distinct:
        return has_digit and len(photos) <= _MAX_SHOTS
    return len(photos) <= (_MAX_SHOTS_OF_A_NUMBER if has_digit else _MAX_SHOTS)


def note_crowded_patients(photos: list[SourcePhoto]) -> list[str]:
    """Return notes about patients with implausibly many photos, whose identifier may stand for many people."""
    counts = Counter(photo.patient for photo in photos if photo.patient_known)
    return [
        f"patient {patient!r} has {count} photos; if it stands for several people, name each in a column 'patient'"
        for patient, count in counts.most_common(3)
        if count > _MAX_PHOTOS_OF_A_PATIENT
    ]
