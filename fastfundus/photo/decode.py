"""Bytes of a JPEG, PNG or TIFF file to upright RGB, as small as the target allows.

Pillow reads the header, libjpeg-turbo (through simplejpeg) decodes JPEG with a scaled DCT, OpenCV decodes PNG and TIFF,
and Pillow gets a last try before a file is called unreadable. No decoder may make up missing pixels: a truncated file
is unreadable, since half a retina in grey looks like disease to a model.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastfundus.errors import PhotoError
from fastfundus.records import Status

__all__ = ["MOST_BYTES", "MOST_PIXELS", "PhotoHeader", "decode", "read_header"]

MOST_BYTES = 512 * 2**20
"""Larger files are refused before they are read. The largest fundus photographs are TIFFs of about 100 MB."""
MOST_PIXELS = 150_000_000
"""Larger pictures are refused before they are decoded; fundus cameras stop below 50 million pixels."""
LEAST_SIDE_PX = 64
"""Smaller pictures hold no retina that could be judged."""

_JPEG = frozenset({"JPEG", "MPO"})
_FORMATS = _JPEG | {"PNG", "TIFF"}
_GREY = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"})


@dataclass(frozen=True, slots=True)
class PhotoHeader:
    """What a file says about itself."""

    format: str
    """"JPEG", "MPO", "PNG" or "TIFF"."""
    width: int
    """Of the stored picture in pixels, before it is turned upright."""
    height: int
    orientation: int
    """EXIF orientation that is left for us to undo, 1 (upright) to 8."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height after turning."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(data: bytes) -> PhotoHeader:
    """Read the header of a photo, without its pixels.

    Raises:
        PhotoError: it is no picture (`unreadable`), or of a kind that cannot be screened (`unsupported`).
    """
    if not data:
        raise PhotoError(Status.UNREADABLE, "the file is empty; copy it again")
    try:
        with Image.open(io.BytesIO(data)) as image:
            form, mode, (width, height) = image.format or "", image.mode, image.size
            orientation = image.getexif().get(0x0112, 1)
    except UnidentifiedImageError:
        raise PhotoError(Status.UNREADABLE, "the file is not a picture; JPEG, PNG and TIFF can be read") from None
    except Image.DecompressionBombError:
        raise PhotoError(Status.UNSUPPORTED, f"more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:
        # Pillow's plugins raise many kinds of errors on damaged headers; whatever it is, this file ends here.
        raise PhotoError(Status.UNREADABLE, f"the header is damaged ({error})") from None
    if form not in _FORMATS:
        raise PhotoError(Status.UNSUPPORTED, f"{form} files are not read; export as JPEG, PNG or TIFF")
    if width * height > MOST_PIXELS:
        raise PhotoError(Status.UNSUPPORTED, f"{width}x{height} pixels; at most {MOST_PIXELS:,} are decoded")
    if min(width, height) < LEAST_SIDE_PX:
        raise PhotoError(Status.UNSUPPORTED, f"{width}x{height} pixels; each side needs {LEAST_SIDE_PX} at least")
    if mode in _GREY:
        raise PhotoError(Status.UNSUPPORTED, "a grey picture; a colour fundus photograph is needed")
    if mode == "CMYK":
        raise PhotoError(Status.UNSUPPORTED, "CMYK colours cannot be turned into camera RGB reliably; export as RGB")
    # Pillow and OpenCV both turn TIFFs upright by themselves, and Pillow's size is already the upright one.
    turned = form != "TIFF" and orientation in range(1, 9)
    return PhotoHeader(form, width, height, orientation if turned else 1)


def decode(data: bytes, header: PhotoHeader, least_side: int = 0) -> tuple[NDArray[np.uint8], float]:
    """Decode a photo, turned upright.

    Args:
        data: the whole file.
        header: from `read_header`.
        least_side: JPEGs may be decoded smaller, as long as neither side falls below this many pixels; 0 decodes at
            full size.

    Returns:
        uint8 [H, W, 3] RGB, and its size as a share of the full size (1, 7/8, 6/8, ... 1/8).

    Raises:
        PhotoError: the pixels are damaged or incomplete (`unreadable`), or of a kind that cannot be screened.
    """
    rgb: NDArray[np.uint8] | None = None
    if header.format in _JPEG:
        try:
            rgb = simplejpeg.decode_jpeg(
                data, "RGB", min_height=least_side, min_width=least_side, min_factor=1 if least_side else 8
            )
        except ValueError:
            rgb = None
    else:
        pixels = _opencv(data)
        rgb = None if pixels is None else _eight_bit_rgb(pixels)
    if rgb is None:
        rgb = _pillow(data)
    scale = rgb.shape[1] / header.width
    return _upright(rgb, header.orientation), scale


def _opencv(data: bytes) -> NDArray[Any] | None:
    try:
        pixels: NDArray[Any] | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    return pixels


def _eight_bit_rgb(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Bring OpenCV's BGR(A), 8 or 16 bit, to RGB, 8 bit; transparent pixels become black."""
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise PhotoError(Status.UNSUPPORTED, "a grey picture; a colour fundus photograph is needed")
    if pixels.dtype == np.uint16:
        # 65535 / 255 = 257: full scale maps to full scale, rounded to nearest.
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise PhotoError(Status.UNSUPPORTED, f"{pixels.dtype} samples; 8 or 16 bits a channel are read")
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * alpha + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(pixels[..., ::-1])


def _pillow(data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return np.array(image.convert("RGB"))
    except Exception as error:
        # As in read_header: damaged pixels surface as OSError, ValueError, SyntaxError, struct.error and others.
        raise PhotoError(Status.UNREADABLE, f"the picture is damaged or incomplete ({error}); copy it again") from None


def _upright(rgb: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation. Source: EXIF 2.32, tag 0x0112."""
    if orientation in (2, 4, 5, 7):
        rgb = rgb[:, ::-1]
    quarter_turns = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return np.ascontiguousarray(np.rot90(rgb, quarter_turns)) if orientation != 1 else rgb
