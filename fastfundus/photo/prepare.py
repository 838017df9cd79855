"""Preprocessing of photos, from a file to the square model input; shared by `prepare` and `screen`."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import PhotoError
from fastfundus.photo.decode import decode_with_room
from fastfundus.photo.decode_plan import DecodePlan, plan_decode
from fastfundus.photo.dicom import DicomPhoto, is_dicom, read_dicom
from fastfundus.photo.field import Field, brightest, count_fields, find_field, lit_parts, without_margin
from fastfundus.photo.file import read_photo
from fastfundus.photo.fundus_check import judge_kind
from fastfundus.photo.header import PhotoHeader, read_header
from fastfundus.photo.quality import MIN_QUALITY, QUALITY_PX, measure_quality
from fastfundus.photo.resample import resize_square, shrink
from fastfundus.records import FieldCircle, PhotoFacts, Status
from fastfundus.spec import PreprocessSpec

__all__ = [
    "PreparedPhoto",
    "crop_window",
    "decode_at",
    "decode_reduced",
    "facts_of",
    "finish",
    "known_of",
    "look_at",
    "min_side",
    "plan_for_crop",
    "prepare_bytes",
    "prepare_photo",
    "round_mask",
]  # fmt: skip


_NO_FACTS = PhotoFacts()
_LONGEST_ASPECT = 5
"""Largest accepted aspect ratio; frames of fundus cameras are at most 1.6 times as wide as high."""


@dataclass(frozen=True, slots=True)
class PreparedPhoto:
    """The result of preprocessing one file."""

    status: Status
    reason: str
    """Reason for a status other than `ok`, in words; empty for `ok`."""
    image: NDArray[np.uint8] | None = None
    """uint8 [size, size, 3] RGB for `ok` and `ungradable`, otherwise None."""
    sha256: str = ""
    """SHA-256 of the file's bytes (decompressed if gzipped), 64 hex digits; empty if the file could not be read."""
    bytes: int = 0
    """Size of the file in bytes (decompressed if gzipped)."""
    width_px: int = 0
    """Width of the upright photo at full size; 0 if the header could not be read."""
    height_px: int = 0
    field: FieldCircle | None = None
    """The retinal field in pixels of the upright photo at full size; None if the whole frame was used."""
    field_shape: str | None = None
    """"round", "oval" or "irregular"; None if the whole frame was used."""
    window: tuple[int, int, int] | None = None
    """Left, top and side of the square that became `image`, in pixels of the upright photo; it may extend beyond the
    photo."""
    quality: float | None = None
    """Quality score, 0 to 1; None if the photo was not preprocessed."""
    facts: PhotoFacts = _NO_FACTS
    """Metadata from the file."""


def prepare_photo(path: Path, spec: PreprocessSpec) -> PreparedPhoto:
    """Read, decode, crop and resize one photo.

    Never raises for unreadable files or unexpected content; the result contains the status and reason instead: `failed`
    if the storage is the cause.

    Args:
        path: An image in one of `header.FORMATS`, or a DICOM file.
        spec: The preprocessing to apply.
    """
    try:
        data = read_photo(path)
    except PhotoError as error:
        return PreparedPhoto(error.status, error.reason)
    return prepare_bytes(data, spec)


def prepare_bytes(data: bytes, spec: PreprocessSpec) -> PreparedPhoto:
    """Decode, crop and resize one photo from the bytes of its file. See `prepare_photo`."""
    known = known_of(data)
    try:
        return _prepared(known, data, spec)
    except MemoryError:
        raise
    except Exception as error:
        # A fault here or in a decoder must cost one photo, not the run.
        return replace(
            known,
            status=Status.UNREADABLE,
            reason=f"decoding failed ({type(error).__name__}); please report this file",
        )


def _prepared(known: PreparedPhoto, data: bytes, spec: PreprocessSpec) -> PreparedPhoto:
    """Do the work of `prepare_bytes`; may raise on content that nobody expected."""
    try:
        photo, header = _opened(data)
        width, height = header.upright_size
        known = replace(known, width_px=width, height_px=height, facts=facts_of(photo, header))
        plan = plan_decode(header, min_side(spec))
        rgb, roomy = _decode(data, photo, header, plan)
        whole, scale = shrink(rgb)
        # Use the shape of the decoded image: a damaged header may have declared another one.
        small, found = look_at(whole, rgb.shape)
        field = found if spec.field == "circle" else None
        better = plan_for_crop(header, plan, crop_window(field, scale, rgb.shape, spec)[2], spec)
        if better is not plan:
            scale, plan = scale * plan.divisor / better.divisor, better
            rgb, roomy = _decode(data, photo, header, plan)
    except PhotoError as error:
        return replace(known, status=error.status, reason=error.reason)
    if small is not whole:
        _blacken_margin(rgb, whole, small)
    left, top, side = crop_window(field, scale, rgb.shape, spec)
    square = _cut(rgb, roomy, (left, top, side))
    known = replace(known, window=(left * plan.divisor, top * plan.divisor, side * plan.divisor))
    image = resize_square(square, spec.size, exact=plan.divisor == 1)
    # Measure quality in the finished image, which is less work, unless it is too small to show fine detail.
    shown = image if spec.size >= QUALITY_PX else square
    return finish(known, image, shown, found, scale * plan.divisor, spec)


def min_side(spec: PreprocessSpec) -> int:
    """Return the smallest side of a crop in pixels: quality is measured at a fixed size, whatever the model's."""
    return max(spec.size, QUALITY_PX)


def plan_for_crop(header: PhotoHeader, plan: DecodePlan, side: int, spec: PreprocessSpec) -> DecodePlan:
    """Plan a larger decode if the field fills so little of the frame that the scaled DCT would lose detail.

    Args:
        header: The result of `read_header`.
        plan: The plan with which the photo was decoded.
        side: Side of the crop, in pixels of the decoded photo.
        spec: The preprocessing to apply.

    Returns:
        A plan that decodes the photo at a larger scale, or `plan` itself if the crop is large enough.
    """
    minimum = min_side(spec)
    if side >= minimum or plan.divisor == 1:
        return plan
    return plan_decode(header, minimum * min(header.width, header.height) // max(1, side * plan.divisor) + 1)


def known_of(data: bytes) -> PreparedPhoto:
    """Return a result with the hash and size of a file, which are known before it is parsed."""
    return PreparedPhoto(Status.OK, "", sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def look_at(whole: NDArray[np.uint8], shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], Field | None]:
    """Find the retinal field in a downscaled image, and check that it shows a retina.

    Args:
        whole: uint8 [h, w, 3] RGB, the photo downscaled to at most `WORK_PX`.
        shape: Shape of the photo in pixels: height, width, and any further dimensions.

    Returns:
        The downscaled image with white margins painted black (`whole` itself if there are none); and the field in its
        pixels, if one was found.

    Raises:
        PhotoError: The image is not a fundus photograph.
    """
    height, width = shape[:2]
    if max(height, width) > _LONGEST_ASPECT * min(height, width):
        raise PhotoError(Status.NOT_FUNDUS, f"a strip of {width}x{height} pixels is not a fundus photograph")
    small = without_margin(whole)
    parts = lit_parts(small)
    found = find_field(small, parts)
    judge_kind(small, found)
    fields = count_fields(small, parts)
    if fields > 1:
        raise PhotoError(
            Status.UNSUPPORTED, f"{fields} retinal fields in one picture; export one photo of one eye per file"
        )
    return small, found


def finish(
    known: PreparedPhoto,
    image: NDArray[np.uint8],
    shown: NDArray[np.uint8],
    found: Field | None,
    to_full: float,
    spec: PreprocessSpec,
) -> PreparedPhoto:
    """Black out the area outside the field, and measure quality.

    Args:
        known: The result so far.
        image: uint8 [size, size, 3] RGB, the crop; modified in place.
        shown: The crop in which quality is measured, at least `QUALITY_PX` per side; may be `image`.
        found: The field, in pixels of the downscaled image, if one was found.
        to_full: Number of full-size photo pixels per pixel of the downscaled image, along each axis.
        spec: The preprocessing to apply.
    """
    if found is not None and spec.field == "circle":
        circle = found.circle
        circle = FieldCircle(
            circle.x_px * to_full, circle.y_px * to_full, circle.radius_px * to_full, round(circle.confidence, 4)
        )
        known = replace(known, field=circle, field_shape=found.shape)
        if spec.mask_outside:
            cv2.bitwise_and(image, round_mask(spec.size), dst=image)
    quality = measure_quality(shown, *(found.completeness() if found else ()))
    known = replace(known, image=image, quality=round(quality.score, 4))
    if quality.score < MIN_QUALITY:
        return replace(known, status=Status.UNGRADABLE, reason=quality.reason)
    return known


def decode_at(data: bytes, min_side: int) -> NDArray[np.uint8]:
    """Decode a photo in any supported format, as small as `min_side` allows.

    Returns:
        uint8 [H, W, 3] upright RGB.

    Raises:
        PhotoError: The photo cannot be decoded.
    """
    photo, header = _opened(data)
    return _decode(data, photo, header, plan_decode(header, min_side))[0]


def decode_reduced(data: bytes, max_factor: float) -> tuple[NDArray[np.uint8], int]:
    """Decode a photo in any supported format, reduced by a factor of at most `max_factor`.

    Returns:
        uint8 [H, W, 3] upright RGB, and the reduction factor along each axis.

    Raises:
        PhotoError: The photo cannot be decoded.
    """
    photo, header = _opened(data)
    plan = plan_decode(header, math.ceil(min(header.width, header.height) / max(1.0, max_factor)))
    return _decode(data, photo, header, plan)[0], plan.divisor


def _opened(data: bytes) -> tuple[DicomPhoto | None, PhotoHeader]:
    """Return the DICOM file, if the data is one, and the header of the image in it."""
    photo = read_dicom(data) if is_dicom(data) else None
    return photo, photo.header if photo else read_header(data)


def facts_of(photo: DicomPhoto | None, header: PhotoHeader) -> PhotoFacts:
    """Return the metadata of a photo: several fields from DICOM, only the camera from other formats."""
    if photo is not None:
        return photo.facts
    return _NO_FACTS if header.camera is None else PhotoFacts(camera=header.camera)


def _decode(
    data: bytes, photo: DicomPhoto | None, header: PhotoHeader, plan: DecodePlan
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the photo, and the image padded with black rows of which it is the middle (or the photo itself)."""
    if photo is None:
        return decode_with_room(data, header, plan, plan.height // 8)
    rgb = photo.decode(plan)
    return rgb, rgb


def _blacken_margin(rgb: NDArray[np.uint8], whole: NDArray[np.uint8], small: NDArray[np.uint8]) -> None:
    """Black out, in place, the margin that `without_margin` removed from the downscaled image, and its soft edge."""
    margin = cv2.compare(brightest(cv2.absdiff(whole, small)), 0, cv2.CMP_GT)
    margin = cv2.dilate(margin, np.ones((3, 3), np.uint8))
    margin = cv2.resize(margin, (rgb.shape[1], rgb.shape[0]), interpolation=cv2.INTER_NEAREST)
    cv2.copyTo(np.zeros_like(rgb), margin, rgb)


def crop_window(
    field: Field | None, scale: float, shape: tuple[int, ...], spec: PreprocessSpec
) -> tuple[int, int, int]:
    """Return the square around the field, or the largest centred one; it may extend beyond the photo.

    Its sides are on whole pixels, so that a scaled and a full decode show the same part of the retina.

    Args:
        field: The field in pixels of the downscaled image; None uses the whole frame.
        scale: Number of decoded photo pixels per pixel of the downscaled image, along each axis.
        shape: Shape of the decoded photo in pixels: height, width, and any further dimensions.
        spec: The preprocessing to apply; defines the width of the margin.

    Returns:
        Left, top and side in pixels of the decoded photo.
    """
    height, width = shape[:2]
    if field is None:
        side = min(height, width)
        return (width - side) // 2, (height - side) // 2, side
    side = max(1, round(2 * field.circle.radius_px * (1 + spec.margin) * scale))
    return round(field.circle.x_px * scale - side / 2), round(field.circle.y_px * scale - side / 2), side


def _cut(rgb: NDArray[np.uint8], roomy: NDArray[np.uint8], window: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Cut out a window from `crop_window`, filling with black where it extends beyond the photo."""
    left, top, side = window
    top += (len(roomy) - len(rgb)) // 2
    inside = roomy[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    above, before = max(-top, 0), max(-left, 0)
    below, after = side - above - inside.shape[0], side - before - inside.shape[1]
    if above or before or below or after:
        inside = cv2.copyMakeBorder(inside, above, below, before, after, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    return inside


@functools.lru_cache(maxsize=4)
def round_mask(size: int) -> NDArray[np.uint8]:
    """Return a mask, uint8 [size, size, 3]: 255 inside the inscribed circle, else 0.

    The mask is cached and must not be modified.
    """
    rows, columns = np.ogrid[:size, :size]
    distance = np.hypot(columns + 0.5 - size / 2, rows + 0.5 - size / 2)
    # The mask has three channels: OpenCV combines whole images six times as fast as it applies a mask.
    return np.repeat((distance <= size / 2).astype(np.uint8)[..., None] * 255, 3, axis=2)
