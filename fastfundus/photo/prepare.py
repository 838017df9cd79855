"""From a file to the square that models see: the code that `prepare` and `screen` share."""

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
from fastfundus.photo.dicom import DicomPhoto, is_dicom, read_dicom
from fastfundus.photo.field import Field, brightest, find_field, without_margin
from fastfundus.photo.file import read_photo
from fastfundus.photo.header import PhotoHeader, read_header
from fastfundus.photo.kind import judge_kind
from fastfundus.photo.plan import DecodePlan, plan_decode
from fastfundus.photo.quality import LEAST_QUALITY, QUALITY_PX, measure_quality
from fastfundus.photo.resample import resize_square, shrink
from fastfundus.records import FieldCircle, PhotoFacts, Status
from fastfundus.spec import PreprocessSpec

__all__ = [
    "PreparedPhoto", "crop_window", "decode_at", "decode_reduced", "facts_of", "finish", "known_of", "least_side",
    "look_at", "plan_for_crop", "prepare_bytes", "prepare_photo", "round_mask",
]  # fmt: skip


_NO_FACTS = PhotoFacts()
_LONGEST_ASPECT = 5
"""Frames of fundus cameras are at most 1.6 times as wide as high."""


@dataclass(frozen=True, slots=True)
class PreparedPhoto:
    """What became of one file."""

    status: Status
    reason: str
    """Why the status is not `ok`, in words; empty when it is."""
    image: NDArray[np.uint8] | None = None
    """[size, size, 3] RGB for `ok` and `ungradable`, else None."""
    sha256: str = ""
    """Of the file's bytes (unpacked, if it is gzipped), 64 hex digits; empty when it could not be read."""
    bytes: int = 0
    """Size of the file."""
    width_px: int = 0
    """Of the upright photo at full size; 0 when the header could not be read."""
    height_px: int = 0
    field: FieldCircle | None = None
    """In pixels of the upright photo at full size; None when the whole frame was taken."""
    field_shape: str | None = None
    """"round", "oval" or "irregular"; None when the whole frame was taken."""
    window: tuple[int, int, int] | None = None
    """Left, top and side of the square that became `image`, in pixels of the upright photo; it may overhang it."""
    quality: float | None = None
    """0 to 1; None when the photo was not preprocessed."""
    facts: PhotoFacts = _NO_FACTS
    """What its file says about the photo."""


def prepare_photo(path: Path, spec: PreprocessSpec) -> PreparedPhoto:
    """Read, decode, crop and resize one photo.

    Never raises for what is in the file, or for a file that cannot be read: the result says so.

    Args:
        path: a picture in one of `header.FORMATS`, or a DICOM file.
        spec: what to make of it.
    """
    try:
        data = read_photo(path)
    except PhotoError as error:
        return PreparedPhoto(error.status, error.reason)
    return prepare_bytes(data, spec)


def prepare_bytes(data: bytes, spec: PreprocessSpec) -> PreparedPhoto:
    """Decode, crop and resize one photo from the bytes of its file; as `prepare_photo`."""
    known = known_of(data)
    try:
        photo, header = _opened(data)
        width, height = header.upright_size
        known = replace(known, width_px=width, height_px=height, facts=facts_of(photo, header))
        plan = plan_decode(header, least_side(spec))
        rgb, roomy = _decode(data, photo, header, plan)
        whole, scale = shrink(rgb)
        # Of the decoded picture: a damaged header may have promised another.
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
    # The finished image, unless it is too small to show fine detail: that is smaller work.
    shown = image if spec.size >= QUALITY_PX else square
    return finish(known, image, shown, found, scale * plan.divisor, spec)


def least_side(spec: PreprocessSpec) -> int:
    """The least side of a crop in pixels: quality is judged at a fixed size, whatever the model's."""
    return max(spec.size, QUALITY_PX)


def plan_for_crop(header: PhotoHeader, plan: DecodePlan, side: int, spec: PreprocessSpec) -> DecodePlan:
    """Plan anew where the field fills so little of the frame that the scaled DCT would lose detail.

    Args:
        header: from `read_header`.
        plan: how the photo was decoded.
        side: of the crop, in pixels of the decoded photo.
        spec: what is made of the photo.

    Returns:
        A plan that decodes it larger, or `plan` itself where the crop is large enough.
    """
    least = least_side(spec)
    if side >= least or plan.divisor == 1:
        return plan
    return plan_decode(header, least * min(header.width, header.height) // max(1, side * plan.divisor) + 1)


def known_of(data: bytes) -> PreparedPhoto:
    """What is known of a file before anything of it is understood: its hash and its size."""
    return PreparedPhoto(Status.OK, "", sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def look_at(whole: NDArray[np.uint8], shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], Field | None]:
    """Find the field of view on a small picture, and judge whether it shows a retina.

    Args:
        whole: uint8 [h, w, 3] RGB, the photo brought to at most `WORK_PX`.
        shape: height and width of the photo in pixels, and what follows.

    Returns:
        The small picture, its white margins black: `whole` itself where it has none. And the field, in its pixels, if
        one was found.

    Raises:
        PhotoError: it is no fundus photograph.
    """
    height, width = shape[:2]
    if max(height, width) > _LONGEST_ASPECT * min(height, width):
        raise PhotoError(Status.NOT_FUNDUS, f"a strip of {width}x{height} pixels is no fundus photograph")
    small = without_margin(whole)
    found = find_field(small)
    judge_kind(small, found)
    return small, found


def finish(
    known: PreparedPhoto,
    image: NDArray[np.uint8],
    shown: NDArray[np.uint8],
    found: Field | None,
    to_full: float,
    spec: PreprocessSpec,
) -> PreparedPhoto:
    """Blacken what lies outside the field, and judge quality.

    Args:
        known: what is known of the photo so far.
        image: uint8 [size, size, 3] RGB, the crop; changed in place.
        shown: the crop in which quality is judged, at least `QUALITY_PX` a side; may be `image`.
        found: the field, in pixels of the small picture, if one was found.
        to_full: pixels of the photo that one of the small picture spans.
        spec: what is made of the photo.
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
    if quality.score < LEAST_QUALITY:
        return replace(known, status=Status.UNGRADABLE, reason=quality.reason)
    return known


def decode_at(data: bytes, least_side: int) -> NDArray[np.uint8]:
    """Decode a photo of any kind, upright, as small as `least_side` allows: uint8 [H, W, 3] RGB.

    Raises:
        PhotoError: it cannot be decoded.
    """
    photo, header = _opened(data)
    return _decode(data, photo, header, plan_decode(header, least_side))[0]


def decode_reduced(data: bytes, most: float) -> tuple[NDArray[np.uint8], int]:
    """Decode a photo of any kind, upright, at most `most` times smaller than it is.

    Returns:
        uint8 [H, W, 3] RGB, and how many of the photo's pixels one of its spans, across and down.

    Raises:
        PhotoError: it cannot be decoded.
    """
    photo, header = _opened(data)
    plan = plan_decode(header, math.ceil(min(header.width, header.height) / max(1.0, most)))
    return _decode(data, photo, header, plan)[0], plan.divisor


def _opened(data: bytes) -> tuple[DicomPhoto | None, PhotoHeader]:
    """The DICOM file that bytes may be, and the header of the picture in them."""
    photo = read_dicom(data) if is_dicom(data) else None
    return photo, photo.header if photo else read_header(data)


def facts_of(photo: DicomPhoto | None, header: PhotoHeader) -> PhotoFacts:
    """What a file says about its photo: DICOM much, a picture its camera."""
    if photo is not None:
        return photo.facts
    return _NO_FACTS if header.camera is None else PhotoFacts(camera=header.camera)


def _decode(
    data: bytes, photo: DicomPhoto | None, header: PhotoHeader, plan: DecodePlan
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The photo, and the picture with black rows above and below that it may be the middle of."""
    if photo is None:
        return decode_with_room(data, header, plan, plan.height // 8)
    rgb = photo.decode(plan)
    return rgb, rgb


def _blacken_margin(rgb: NDArray[np.uint8], whole: NDArray[np.uint8], small: NDArray[np.uint8]) -> None:
    """Do to the photo, in place, what `without_margin` did to its small picture, and to the soft edge beside it."""
    margin = cv2.compare(brightest(cv2.absdiff(whole, small)), 0, cv2.CMP_GT)
    margin = cv2.dilate(margin, np.ones((3, 3), np.uint8))
    margin = cv2.resize(margin, (rgb.shape[1], rgb.shape[0]), interpolation=cv2.INTER_NEAREST)
    cv2.copyTo(np.zeros_like(rgb), margin, rgb)


def crop_window(
    field: Field | None, scale: float, shape: tuple[int, ...], spec: PreprocessSpec
) -> tuple[int, int, int]:
    """The square around the field, or the largest centred one; it may overhang the photo.

    Its sides lie on whole pixels, so that a scaled decode and a full one show the same piece of retina.

    Args:
        field: in pixels of the small picture; None takes the whole frame.
        scale: pixels of the decoded photo that one of the small picture spans.
        shape: height and width of the decoded photo in pixels, and what follows.
        spec: says how wide a margin is kept.

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
    """Cut a window from `crop_window`; black where it overhangs the photo."""
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
    """255 inside the circle that fills a square, else 0: uint8 [size, size, 3]; not to be written to."""
    rows, columns = np.ogrid[:size, :size]
    distance = np.hypot(columns + 0.5 - size / 2, rows + 0.5 - size / 2)
    # For each channel: OpenCV combines whole pictures six times as fast as it looks at a mask.
    return np.repeat((distance <= size / 2).astype(np.uint8)[..., None] * 255, 3, axis=2)
