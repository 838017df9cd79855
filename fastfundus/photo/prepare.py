"""From a file to the square that models see: the code that `prepare` and `screen` share."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import PhotoError
from fastfundus.photo.decode import MOST_BYTES, decode, read_header
from fastfundus.photo.field import LEAST_CONFIDENCE, brightest, find_field, looks_grey, looks_like_retina, shrink
from fastfundus.photo.quality import LEAST_QUALITY, measure_quality
from fastfundus.records import FieldCircle, Status
from fastfundus.spec import PreprocessSpec

__all__ = ["PreparedPhoto", "prepare_photo"]

_BLACK = 12
"""A picture whose brightest parts stay below this grey level shows nothing."""


@dataclass(frozen=True, slots=True)
class PreparedPhoto:
    """What became of one file."""

    status: Status
    reason: str
    """Why the status is not `ok`, in words; empty when it is."""
    image: NDArray[np.uint8] | None = None
    """[size, size, 3] RGB for `ok` and `ungradable`, else None."""
    sha256: str = ""
    """Of the file's bytes, 64 hex digits; empty when it could not be read."""
    bytes: int = 0
    """Size of the file."""
    width_px: int = 0
    """Of the upright photo at full size; 0 when the header could not be read."""
    height_px: int = 0
    field: FieldCircle | None = None
    """In pixels of the upright photo at full size; None when the whole frame was taken."""
    quality: float | None = None
    """0 to 1; None when the photo was not preprocessed."""


def prepare_photo(path: Path, spec: PreprocessSpec) -> PreparedPhoto:
    """Read, decode, crop and resize one photo.

    Never raises for what is in the file, or for a file that cannot be read: the result says so.

    Args:
        path: JPEG, PNG or TIFF.
        spec: what to make of it.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            return PreparedPhoto(Status.UNSUPPORTED, f"the file is larger than {MOST_BYTES >> 20} MiB")
        data = path.read_bytes()
    except FileNotFoundError:
        return PreparedPhoto(Status.UNREADABLE, "the file is not there; check the path")
    except PermissionError:
        return PreparedPhoto(Status.UNREADABLE, "no permission to read the file; run chmod +r on it")
    except OSError as error:
        return PreparedPhoto(Status.UNREADABLE, f"the file cannot be read ({error.strerror or error})")
    known = PreparedPhoto(Status.OK, "", sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    try:
        header = read_header(data)
        width, height = header.upright_size
        known = replace(known, width_px=width, height_px=height)
        rgb, scale = decode(data, header, spec.size)
        small = shrink(rgb)
        circle = _judge_field(small, spec)
        square = None if circle is None else _square_around(circle, small, rgb, spec)
        if square is not None and square[2] < spec.size and scale < 1:
            # The field fills little of the frame: decode again, so that no detail is lost to the scaled DCT.
            rgb, scale = decode(data, header)
            assert circle is not None
            square = _square_around(circle, small, rgb, spec)
    except PhotoError as error:
        return replace(known, status=error.status, reason=error.reason)
    image = _cut(rgb, square, spec)
    if circle is not None:
        to_full = width / small.shape[1]
        circle = FieldCircle(
            circle.x_px * to_full, circle.y_px * to_full, circle.radius_px * to_full, round(circle.confidence, 4)
        )
    quality = measure_quality(image)
    known = replace(known, image=image, field=circle, quality=round(quality.score, 4))
    if quality.score < LEAST_QUALITY:
        return replace(known, status=Status.UNGRADABLE, reason=quality.reason)
    return known


def _judge_field(small: NDArray[np.uint8], spec: PreprocessSpec) -> FieldCircle | None:
    """Find the circle to crop to, in pixels of `small`; None takes the frame.

    Raises:
        PhotoError: the picture is black, grey, or no retina.
    """
    if np.percentile(brightest(small), 99) < _BLACK:
        raise PhotoError(Status.UNGRADABLE, "the picture is black: no retina can be seen")
    if looks_grey(small):
        raise PhotoError(Status.UNSUPPORTED, "a grey picture; a colour fundus photograph is needed")
    if spec.field == "frame":
        return None
    circle = find_field(small)
    if circle is not None and circle.confidence < LEAST_CONFIDENCE:
        circle = None
    if not looks_like_retina(small, circle):
        raise PhotoError(Status.NOT_FUNDUS, "the colours are not those of a retina")
    if circle is None:
        _judge_unframed(small)
    return circle


def _judge_unframed(small: NDArray[np.uint8]) -> None:
    """Judge a picture without a round rim: a retina cropped inside its field, squeezed by an export, or mostly hidden.

    The first two fill half the picture or more; all are reddish nearly everywhere.

    Raises:
        PhotoError: it is no retina, or most of it is hidden.
    """
    red, _, blue = small.reshape(-1, 3).astype(np.float32).T
    lit = red > 20
    if not lit.any() or np.mean(red[lit] > 1.15 * blue[lit]) <= 0.9:
        raise PhotoError(Status.NOT_FUNDUS, "no round retinal field was found")
    if lit.mean() <= 0.5:
        raise PhotoError(Status.UNGRADABLE, "most of the field is dark or missing")


def _square_around(
    circle: FieldCircle, small: NDArray[np.uint8], rgb: NDArray[np.uint8], spec: PreprocessSpec
) -> tuple[int, int, int]:
    """Left, top and side, in whole pixels of `rgb`, of the square around a circle found on `small`."""
    to_rgb = rgb.shape[1] / small.shape[1]
    half = circle.radius_px * (1 + spec.margin) * to_rgb
    side = max(1, round(2 * half))
    return round(circle.x_px * to_rgb - side / 2), round(circle.y_px * to_rgb - side / 2), side


def _cut(rgb: NDArray[np.uint8], square: tuple[int, int, int] | None, spec: PreprocessSpec) -> NDArray[np.uint8]:
    """Cut a square (which may overhang the photo: black there), resize it, and blacken outside the field."""
    height, width = rgb.shape[:2]
    masked = square is not None and spec.mask_outside
    if square is None:
        side = min(height, width)
        square = ((width - side) // 2, (height - side) // 2, side)
    left, top, side = square
    inside = rgb[max(top, 0) : top + side, max(left, 0) : left + side]
    above, before = max(-top, 0), max(-left, 0)
    below, after = side - above - inside.shape[0], side - before - inside.shape[1]
    if above or before or below or after:
        inside = cv2.copyMakeBorder(inside, above, below, before, after, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    method = cv2.INTER_AREA if side >= spec.size else cv2.INTER_LINEAR
    image = cv2.resize(inside, (spec.size, spec.size), interpolation=method)
    return cv2.bitwise_and(image, image, mask=_round_mask(spec.size)) if masked else image


@functools.lru_cache(maxsize=4)
def _round_mask(size: int) -> NDArray[np.uint8]:
    rows, columns = np.ogrid[:size, :size]
    distance = np.hypot(columns + 0.5 - size / 2, rows + 0.5 - size / 2)
    return (distance <= size / 2).astype(np.uint8) * 255
