"""Identity and status of a photo: types shared by all parts of the library. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = [
    "GUARD_LIMIT",
    "NORMAL_NAMES",
    "PHOTO_SUFFIXES",
    "FieldCircle",
    "PhotoFacts",
    "SourcePhoto",
    "Status",
    "bytes_of_name",
    "identity",
    "interval_text",
    "utf8_name",
]

PHOTO_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".tif",
        ".tiff",
        ".bmp",
        ".ppm",
        ".webp",
        ".jp2",
        ".j2k",
        ".pnm",
        ".dib",
        ".gif",
        ".heic",
        ".heif",
        ".hif",
        ".avif",
        ".dcm",
        ".dicom",
    }
)
"""Lower-case file name suffixes that a folder search recognises as photographs."""


NORMAL_NAMES = frozenset({"normal", "healthy", "nodr", "no_dr", "no dr", "negative"})
"""Lower-case label and class names that mean that nothing was found."""


GUARD_LIMIT = 0.5
"""The value of an engine's guard for a photo exactly at the limit of what is familiar."""


class Status(StrEnum):
    """Status of one input. Every input ends with exactly one."""

    OK = "ok"
    """A colour fundus photograph that was preprocessed (and, when screening, scored)."""
    UNGRADABLE = "ungradable"
    """A fundus photograph of insufficient quality: take it again."""
    NOT_FUNDUS = "not_fundus"
    """A picture of something else, or a wide-field picture."""
    UNREADABLE = "unreadable"
    """Missing, empty, damaged, or not a picture."""
    UNSUPPORTED = "unsupported"
    """A valid picture of a type that cannot be screened: grey, CMYK, tiny, several frames."""
    UNFAMILIAR = "unfamiliar"
    """Passes as a fundus photograph, but is unlike those that the model learned from: no decision. Occurs only when
    screening."""
    FAILED = "failed"
    """Storage, memory or the engine failed, also at a second attempt, so nothing is known of the photo. A run with such
    photos does not count as finished: resume it. Occurs only when screening."""


@dataclass(frozen=True, slots=True)
class FieldCircle:
    """The retinal field in one photo, in pixels of the upright photo at full size.

    Pixel (0, 0) covers [0, 1] x [0, 1]; its centre is (0.5, 0.5).
    """

    x_px: float
    y_px: float
    radius_px: float
    confidence: float
    """Share of the visible field edge that agrees with the circle, 0 to 1; 0 if no field was found."""


@dataclass(frozen=True, slots=True)
class PhotoFacts:
    """Metadata of a photo from its file; files other than DICOM provide the camera only. None is unknown."""

    patient: str | None = None
    eye: str | None = None
    """"L" or "R"."""
    camera: str | None = None
    """Manufacturer and model, from DICOM or EXIF."""
    pixel_spacing_mm: float | None = None
    """Pixel spacing on the retina, as stated by the camera: nominal, for the photo at full size."""


# Not frozen: listings have millions of them, and frozen ones take three times as long to make.
@dataclass(slots=True)
class SourcePhoto:
    """One input of `prepare` or `screen`, before its file is read."""

    path: Path
    """Path of the file."""
    name: str
    """Name in results: the path relative to the source, with forward slashes."""
    patient: str
    """Groups photos that must stay on one side of a split; equals `name` if the patient is unknown."""
    patient_known: bool = False
    """False if `patient` is only the name of the photo."""
    eye: str | None = None
    """"L", "R", or None if unknown."""
    split: str | None = None
    """"train", "val" or "test" if the label file fixes it."""
    camera: str | None = None
    """Camera according to the label file."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Labels and other columns of the label file, by column name."""
    issue: str | None = None
    """Fault found while listing, such as a file that the label file names but that does not exist."""
    patient_by_name: bool = False
    """True if only names of files and folders tell the patient: what a DICOM header says takes precedence."""
    eye_by_name: bool = False
    """True if only names tell the eye: if a DICOM header says another, it is unknown."""


def interval_text(entry: dict[str, float | None]) -> str:
    """Format a metric with its confidence interval, given as plain data; None values are unknown."""
    if entry["value"] is None:
        return "not estimable"
    if entry["low"] is None or entry["high"] is None:
        return f"{entry['value']:.3f}"
    return f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"


def utf8_name(name: str) -> str:
    r"""Return a file name that can be written to a UTF-8 file: bytes that are not valid UTF-8 become \xNN.

    Backslashes in the name itself that would be taken for such an escape are doubled, so that two files never get the
    same name.
    """
    if name.isascii() and "\\" not in name:
        return name
    return (
        re.sub(r"(\\+)(?=x|[\udc80-\udcff])", r"\1\1", name)
        .encode("utf-8", "surrogateescape")
        .decode("utf-8", "backslashreplace")
    )


def bytes_of_name(name: str) -> bytes:
    """Return the bytes of the file name that `utf8_name` made a name of."""

    def restored(match: re.Match[str]) -> str:
        backslashes, digits = match[1], match[2]
        if len(backslashes) % 2 and digits:
            return backslashes[: len(backslashes) // 2] + chr(0xDC00 + int(digits, 16))
        return backslashes[: len(backslashes) // 2] + "x" + (digits or "")

    return re.sub(r"(\\+)x([89a-f][0-9a-f])?", restored, name).encode("utf-8", "surrogateescape")


def identity(source: SourcePhoto, facts: PhotoFacts) -> tuple[str, bool, str | None]:
    """Return the patient of a photo, whether the patient is known, and the eye.

    A label file takes precedence over DICOM, because it was written for this purpose, and DICOM over the patient in a
    name. An eye that names and DICOM contradict each other about is unknown.
    """
    eye = source.eye or facts.eye
    if source.eye_by_name and source.eye and facts.eye and source.eye != facts.eye:
        eye = None
    if facts.patient is not None and (source.patient_by_name or not source.patient_known):
        return facts.patient, True, eye
    return source.patient, source.patient_known, eye
