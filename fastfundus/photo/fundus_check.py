"""Check that an image is a colour fundus photograph: by its colours, its texture, and the shape of its lit region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.errors import PhotoError
from fastfundus.photo.field import Field
from fastfundus.records import Status

__all__ = ["Texture", "judge_kind", "measure_texture", "retinal_share"]

_BLACK = 12
"""An image whose brightest parts stay below this grey level is black."""
_MAX_EXCESS_ROUND = 0.8
_MAX_EXCESS = 0.0
"""Limits of `Texture.excess` for a round field on a dark frame, which is evidence in itself, and without one. Of 4,100
public photographs of retinas, one of severe myopia comes closest to the first; 99.7 % of 900 squares cut out of their
fields stay below the second. Of 640 photographs of animals, people, buildings and landscapes, none does."""
_MAX_CONTRAST = 0.2
"""Limit of `Texture.contrast` without a round field: all of those squares stay below it."""
_MIN_TINT = 0.25
"""Limit of `Texture.tint`: 0.32 or more in those retinas, below 0.27 in half of those photographs."""
_LOGS = np.log(np.arange(256) + 16).astype(np.float32)
"""Logarithm of a grey level; the offset keeps the noise of dark pixels from counting as contrast."""
_INNER = np.ones((15, 15), np.uint8)
"""Keeps 7 pixels of distance from the edge of the field, whose gradient is not the retina's."""


def judge_kind(small: NDArray[np.uint8], field: Field | None) -> None:
    """Reject images that are not colour fundus photographs.

    A round field on a dark frame is evidence of a fundus camera, so its colours and texture only need to be plausible.
    An image without a field edge (a retina cropped inside its field, a montage, a landscape) must be reddish nearly
    everywhere, and as smooth as a retina.

    Args:
        small: uint8 [h, w, 3] RGB from `shrink`.
        field: The field that `find_field` found in it, if any.

    Raises:
        PhotoError: The image is black (`ungradable`), greyscale (`unsupported`), or not a retina (`not_fundus`).
    """
    red, green, blue = planes = cv2.split(small)
    value = cv2.max(cv2.max(red, green), blue)
    if np.count_nonzero(value >= _BLACK) < 0.01 * value.size:
        raise PhotoError(Status.UNGRADABLE, "the image is black: no retina is visible")
    spread = cv2.subtract(value, cv2.min(cv2.min(red, green), blue))
    if np.count_nonzero(spread <= 4) >= 0.98 * spread.size:
        # Red-free and angiography frames are often stored as three equal channels.
        raise PhotoError(Status.UNSUPPORTED, "greyscale image; a colour fundus photograph is required")
    if field is not None and _looks_wide(small, field):
        raise PhotoError(Status.NOT_FUNDUS, "looks like a wide-field image; a standard fundus photograph is required")
    # Exclude dark pixels, whose colour is not meaningful.
    lit = cv2.inRange(value, 16, 255)
    share = retinal_share(planes, lit if field is None else cv2.bitwise_and(lit, field.mask))
    edge = field is not None and field.shape != "irregular" and field.circle.confidence >= 0.7
    if share < (0.3 if edge else 0.6):
        raise PhotoError(Status.NOT_FUNDUS, "the colours are not those of a retina")
    if not edge:
        _check_without_edge(small)
    _check_texture(small, field, edge)


def retinal_share(planes: Sequence[NDArray[np.uint8]], lit: NDArray[np.uint8]) -> float:
    """Return the share of lit pixels with a plausible retinal colour: not bluer than red, and not mostly green.

    Haemoglobin and melanin absorb blue light most and red light least, whatever the camera or the pigmentation.

    Args:
        planes: Red, green and blue, uint8 [h, w] each.
        lit: uint8 [h, w], 255 at the pixels to count.

    Returns:
        The share, 0 to 1; 0 if less than 2 % of the pixels are lit.
    """
    count = cv2.countNonZero(lit)
    if count < 0.02 * lit.size:
        return 0.0
    red, green, blue = planes
    # 0.95 x blue and 0.87 x green, in integer grey levels.
    bluish = cv2.compare(cv2.convertScaleAbs(blue, alpha=0.95), red, cv2.CMP_GE)
    greenish = cv2.compare(cv2.convertScaleAbs(green, alpha=0.87), red, cv2.CMP_GE)
    return 1 - cv2.countNonZero(cv2.bitwise_and(lit, cv2.bitwise_or(bluish, greenish))) / count


class Texture(NamedTuple):
    """How sharp the edges of an image are, by colour."""

    excess: float
    """How much sharper its edges are in red than those of a retina of its colour could be: ln r + 3.2 - 1.25 ln(R/G) -
    0.6 ln(G/B), with r the 95th percentile of the gradient of ln R per pixel, and medians of the ratios where they are
    above 1."""
    contrast: float
    """95th percentile of the gradient of ln G per pixel."""
    tint: float
    """95th percentile of the gradient of ln(R/G), as a share of that of ln G: near 0 if edges are equally strong in all
    colours, as where a picture of light and shade was coloured."""


def measure_texture(small: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> Texture | None:
    """Measure the texture of an image.

    Red light passes through blood and pigment: in the red channel, vessels and lesions are faint, and the retina is
    smooth whatever its disease. The edges of everyday things are as sharp in red as in other colours. Where atrophy
    bares the sclera, red contrast is higher, but so is redness elsewhere.

    Args:
        small: uint8 [h, w, 3] RGB from `shrink`.
        mask: uint8 [h, w], 255 inside the field; None uses the whole image.

    Returns:
        The texture, or None if too little of the field is visible to tell.
    """
    inner = places = None
    if mask is not None:
        inner = cv2.erode(mask, _INNER, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    quarter = (max(1, small.shape[1] // 4), max(1, small.shape[0] // 4))
    colours = cv2.resize(small, quarter, interpolation=cv2.INTER_AREA).reshape(-1, 3)
    if inner is not None:
        colours = colours[cv2.resize(inner, quarter, interpolation=cv2.INTER_NEAREST).ravel() > 0]
        places = np.flatnonzero(inner[1:-1, 1:-1])
    if len(colours) < 20:
        return None
    red, green = (
        cv2.GaussianBlur(cv2.LUT(cv2.extractChannel(small, channel), _LOGS), (5, 5), 1.0) for channel in (0, 1)
    )
    in_red, in_green, in_tint = (_sharpness(plane, places) for plane in (red, green, cv2.subtract(red, green)))
    logs = _LOGS[colours]
    redness, yellowness = np.median(logs[:, 0] - logs[:, 1]), np.median(logs[:, 1] - logs[:, 2])
    excess = np.log(in_red + 1e-3) + 3.2 - 1.25 * max(redness, 0) - 0.6 * max(yellowness, 0)
    return Texture(float(excess), in_green, in_tint / (in_green + 1e-4))


def _sharpness(plane: NDArray[np.float32], places: NDArray[np.intp] | None) -> float:
    """Return the 95th percentile of the gradient per pixel, at the given places of the flattened [h - 2, w - 2]."""
    across = cv2.subtract(plane[1:-1, 2:], plane[1:-1, :-2])
    down = cv2.subtract(plane[2:, 1:-1], plane[:-2, 1:-1])
    slope = cv2.magnitude(across, down)
    slopes = slope.ravel() if places is None else slope.ravel().take(places)
    if not len(slopes):
        return 0.0
    place = int(0.95 * len(slopes))
    return float(np.partition(slopes, place)[place]) / 2


def _check_texture(small: NDArray[np.uint8], field: Field | None, edge: bool) -> None:
    """Check the texture of an image, more strictly without the edge of a round field.

    Raises:
        PhotoError: The image is not a retina (`not_fundus`).
    """
    texture = measure_texture(small, None if field is None else field.mask)
    if texture is None:
        return
    if texture.excess > (_MAX_EXCESS_ROUND if edge else _MAX_EXCESS) or (not edge and texture.contrast > _MAX_CONTRAST):
        raise PhotoError(Status.NOT_FUNDUS, "its edges are sharper than those of a retina")
    if texture.tint < _MIN_TINT:
        raise PhotoError(Status.NOT_FUNDUS, "its edges are as strong in red as in green, unlike those of a retina")


def _check_without_edge(small: NDArray[np.uint8]) -> None:
    """Check an image without a round field: a retina cropped inside its field, a montage, or a half-hidden field.

    How much of the retina is hidden is left to the quality check.

    Raises:
        PhotoError: The image is not a retina (`not_fundus`).
    """
    red, _, blue = small.reshape(-1, 3).astype(np.float32).T
    lit = red > 20
    if not lit.any() or np.mean(red[lit] > 1.15 * blue[lit]) <= 0.9:
        raise PhotoError(Status.NOT_FUNDUS, "no round retinal field was found")


def _looks_wide(small: NDArray[np.uint8], field: Field) -> bool:
    """Return whether the image looks like one from a scanning wide-field camera.

    Such images show a horizontal ellipse in red and green without blue, because the cameras scan with a red and a green
    laser; the eyelids cut the field above and below.
    """
    if field.shape == "round":
        return False
    rows, columns = np.flatnonzero(field.mask.any(axis=1)), np.flatnonzero(field.mask.any(axis=0))
    if (columns[-1] - columns[0]) <= 1.15 * (rows[-1] - rows[0]):
        return False
    red, green, blue = (float(value) for value in cv2.mean(small, field.mask)[:3])
    return blue < 0.25 * red and green > 0.8 * red
