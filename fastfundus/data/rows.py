"""Preparation of the pixels and the manifest row of each photo in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.data.cache import MANIFEST_COLUMNS
from fastfundus.data.store import checksum_of
from fastfundus.errors import PhotoError, TransientError
from fastfundus.photo.file import read_patiently
from fastfundus.photo.isolation import prepare_isolated
from fastfundus.photo.perceptual_hash import perceptual_hash
from fastfundus.photo.prepare import PreparedPhoto
from fastfundus.records import PhotoFacts, SourcePhoto, Status, identity
from fastfundus.spec import PreprocessSpec

__all__ = ["FACTS", "Preparer", "Row", "file_stamp", "hashed_patient", "identified", "prepare_rows"]

Row = tuple[dict[str, Any], NDArray[np.uint8] | None]
"""Manifest columns of one photo, and its pixels, or None if it could not be used."""
Preparer = Callable[[Sequence[Path]], list[PreparedPhoto]]
"""Prepares several files and returns a result for each, including files that cannot be used."""
FACTS = tuple(name for name in MANIFEST_COLUMNS if name not in ("path", "split"))
"""Manifest columns derived from the file; the others come from the listing."""


def prepare_rows(
    photos: Sequence[SourcePhoto], spec: PreprocessSpec, salt: bytes | None, prepare: Preparer | None = None
) -> list[Row]:
    """Prepare photos.

    Args:
        photos: the inputs.
        spec: preprocessing applied to each photo.
        salt: key for hashing patient identifiers; None keeps them unchanged.
        prepare: prepares all files at once; None prepares them one by one on the CPU, in a process of its own.

    Raises:
        TransientError: a photo cannot be read or decoded for a reason that is not its own.
    """
    # Taken before the files are read, so that a file modified during preparation is later detected as changed.
    stamps = [file_stamp(photo.path) for photo in photos]
    paths = [photo.path for photo in photos if photo.issue is None]
    results = iter(prepare(paths) if prepare else [_prepare_file(path, spec) for path in paths])
    return [
        _row(photo, next(results) if photo.issue is None else PreparedPhoto(Status.UNREADABLE, photo.issue), when, salt)
        for photo, when in zip(photos, stamps, strict=True)
    ]


def _prepare_file(path: Path, spec: PreprocessSpec) -> PreparedPhoto:
    try:
        return prepare_isolated(read_patiently(path, listed=True), spec)
    except PhotoError as error:
        return PreparedPhoto(error.status, error.reason)


def _row(photo: SourcePhoto, result: PreparedPhoto, stamped: tuple[int, int], salt: bytes | None) -> Row:
    if result.status is Status.FAILED:
        raise TransientError(
            f"{photo.path}: {result.reason}; once that is mended, run the same command again to continue"
        )
    circle, image, facts = result.field, result.image, result.facts
    if salt is not None and facts.patient is not None:
        facts = replace(facts, patient=hashed_patient(facts.patient, salt))
    row = {
        "sha256": result.sha256,
        "status": result.status.value,
        "reason": result.reason,
        **identified(photo, facts, salt),
        "width_px": result.width_px,
        "height_px": result.height_px,
        "field_x_px": circle and circle.x_px,
        "field_y_px": circle and circle.y_px,
        "field_radius_px": circle and circle.radius_px,
        "field_confidence": circle and circle.confidence,
        "field_shape": result.field_shape,
        **dict(zip(("window_x_px", "window_y_px", "window_side_px"), result.window or (None,) * 3, strict=True)),
        "quality": result.quality,
        "pixel_spacing_mm": facts.pixel_spacing_mm,
        "look": None if image is None else perceptual_hash(image).hex(),
        "pixels_crc32": None if image is None else checksum_of(image),
        "bytes": stamped[0],
        "mtime_ns": stamped[1],
    }
    return row, image


def identified(photo: SourcePhoto, facts: PhotoFacts, salt: bytes | None) -> dict[str, Any]:
    """Return the patient, eye and camera columns of a photo; the listing takes precedence over the file.

    With a salt, the patient in `facts` must already be hashed.
    """
    patient, known, eye = identity(photo, facts)
    if salt is not None and photo.patient_known:
        patient = hashed_patient(patient, salt)
    return {"patient": patient, "patient_known": known, "eye": eye, "camera": photo.camera or facts.camera}


def hashed_patient(patient: str, salt: bytes) -> str:
    """Hash a patient identifier to 16 hex digits that can be recomputed only with the salt.

    Source: keyed BLAKE2b, RFC 7693.
    """
    return hashlib.blake2b(patient.encode(), key=hashlib.sha256(salt).digest(), digest_size=8).hexdigest()


def file_stamp(path: Path) -> tuple[int, int]:
    """Return the size in bytes and modification time in ns of a file, or zeros if it does not exist."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return stat.st_size, stat.st_mtime_ns
