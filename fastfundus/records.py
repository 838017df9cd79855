"""What a photo is called and what became of it: words shared by every part. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = [
    "NORMAL_NAMES",
    "PHOTO_SUFFIXES",
    "FieldCircle",
    "PhotoFacts",
    "SourcePhoto",
    "Status",
    "identity",
    "interval_text",
    "told_name",
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
        ".dcm",
        ".dicom",
    }
)
"""File name endings, lower case, that a folder search takes for photographs."""


NORMAL_NAMES = frozenset({"normal", "healthy", "nodr", "no_dr", "no dr", "negative"})
"""Names, lower case, by which sets say that nothing was found."""


class Status(StrEnum):
    """What became of one input. Every input ends with exactly one."""

    OK = "ok"
    """A colour fundus photograph that was preprocessed (and, when screening, scored)."""
    UNGRADABLE = "ungradable"
    """A fundus photograph too poor to grade: take it again."""
    NOT_FUNDUS = "not_fundus"
    """A picture of something else, or a wide-field picture."""
    UNREADABLE = "unreadable"
    """Missing, empty, damaged, or no picture at all."""
    UNSUPPORTED = "unsupported"
    """A sound picture of a kind that cannot be screened: grey, CMYK, tiny, several frames."""
    FAILED = "failed"
    """Sound, but the engine failed on it, alone too: screen it again. Only when screening."""


@dataclass(frozen=True, slots=True)
class FieldCircle:
    """The retinal field in one photo, in pixels of the upright photo at full size.

    Pixel (0, 0) covers [0, 1] x [0, 1]: its centre lies at (0.5, 0.5).
    """

    x_px: float
    y_px: float
    radius_px: float
    confidence: float
    """0 to 1: the share of the visible rim that agrees with the circle; 0 when none was found."""


@dataclass(frozen=True, slots=True)
class PhotoFacts:
    """What a file says about its photo, of pictures the camera only; None is unknown."""

    patient: str | None = None
    eye: str | None = None
    """"L" or "R"."""
    camera: str | None = None
    """Manufacturer and model, as DICOM or EXIF has them."""
    pixel_spacing_mm: float | None = None
    """On the retina, as the camera states it: nominal, for the photo at full size."""


@dataclass(frozen=True, slots=True)
class SourcePhoto:
    """One input of `prepare` or `screen`, before anything is read from it."""

    path: Path
    """Where the file is."""
    name: str
    """How results name it: the path relative to the source, with forward slashes."""
    patient: str
    """Groups photos that must never be split; equals `name` when nothing is known."""
    patient_known: bool = False
    """False when `patient` is only the photo's own name."""
    eye: str | None = None
    """"L", "R" or unknown."""
    split: str | None = None
    """"train", "val" or "test" when the label file fixes it."""
    camera: str | None = None
    """As the label file names it."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Labels and other columns of the label file, by column name."""
    issue: str | None = None
    """A fault found while listing, such as a file that the label file names but is not there."""


def interval_text(entry: dict[str, float | None]) -> str:
    """Write a metric with its interval, from the plain data that results hold; None stands for what is not known."""
    if entry["value"] is None:
        return "not estimable"
    if entry["low"] is None or entry["high"] is None:
        return f"{entry['value']:.3f}"
    return f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"


def told_name(name: str) -> str:
    r"""Write a file name so that it can stand in a UTF-8 file: bytes that are not UTF-8 on disk become \xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def identity(source: SourcePhoto, facts: PhotoFacts) -> tuple[str, bool, str | None]:
    """Whose photo it is: patient, whether that is known, and eye.

    A label file or a telling file name goes before what DICOM says: it was written for the purpose.
    """
    if source.patient_known or facts.patient is None:
        return source.patient, source.patient_known, source.eye or facts.eye
    return facts.patient, True, source.eye or facts.eye
