"""Bytes of a picture file to upright RGB, as small as the target allows.

libjpeg-turbo (through simplejpeg) decodes JPEG, scaled where `plan_decode` says so; OpenCV decodes the rest, and Pillow
gets a last try before a file is called unreadable. All of them release the interpreter's lock while they decode.

No decoder may make up missing pixels: a truncated or damaged file is unreadable, since half a retina in grey looks like
disease to a model. Colour profiles are not applied: every executor sees the stored values.
"""

from __future__ import annotations

import io
import re
import zlib
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from fastfundus.errors import PhotoError
from fastfundus.photo.header import PhotoHeader
from fastfundus.photo.plan import DecodePlan, plan_decode
from fastfundus.records import Status

__all__ = ["decode", "decode_with_room", "eight_bit_rgb"]

_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")


def decode(data: bytes, header: PhotoHeader, plan: DecodePlan | None = None) -> NDArray[np.uint8]:
    """Decode a photo and turn it upright.

    Args:
        data: the whole file.
        header: from `read_header`.
        plan: from `plan_decode`; None decodes at full size.

    Returns:
        uint8 [H, W, 3] RGB of the planned size, turned upright.

    Raises:
        PhotoError: the pixels are damaged or incomplete (`unreadable`), or of a kind that cannot be screened.
    """
    return decode_with_room(data, header, plan or plan_decode(header), 0)[0]


def decode_with_room(
    data: bytes, header: PhotoHeader, plan: DecodePlan, rows: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Decode as `decode` does, with black rows above and below the photo where that costs nothing.

    Fields are often cut at top and bottom: a square around them overhangs the photo there, and is then cut out of
    memory that is there already, not copied into a larger picture.

    Returns:
        The photo, and the picture that it is the middle of: at most `rows` taller at each end, or the photo itself.
    """
    rgb: NDArray[np.uint8] | None = None
    if plan.decoder == "libjpeg-turbo":
        rows = rows if header.orientation == 1 else 0
        roomy = np.empty((plan.height + 2 * rows, plan.width, 3), np.uint8)
        rgb = _turbo(data, plan, roomy[rows : rows + plan.height])
        if rgb is not None and rows:
            roomy[:rows] = roomy[rows + plan.height :] = 0
            return rgb, roomy
    elif plan.decoder == "opencv":
        if header.format == "PNG":
            _check_png(data)
        rgb = _opencv(data)
    if rgb is None:
        rgb = _pillow(data, plan.divisor)
    rgb = _upright(rgb, header.orientation)
    return rgb, rgb


def _turbo(data: bytes, plan: DecodePlan, room: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """Decode with libjpeg-turbo into `room`; None when it does not know this kind of JPEG.

    libjpeg warns of damage and goes on with made-up pixels, which Pillow and OpenCV then pass on in silence. Here every
    warning counts, but for bytes that stray between segments: these touch no pixel.
    """
    size = {"min_width": plan.width, "min_height": plan.height, "min_factor": 1} if plan.divisor > 1 else {}
    try:
        simplejpeg.decode_jpeg(data, "RGB", buffer=room, **size)
        return room
    except ValueError as error:
        message = str(error)
    stray = _STRAY.search(message)
    if stray and _touches_no_pixel(data, int(stray[1]), int(stray[2], 16)):
        # The binding refuses stray bytes in the header in any mode; Pillow reads these.
        return None
    if re.search("corrupt|premature|bogus|invalid|inconsistent", message, re.IGNORECASE):
        raise PhotoError(Status.UNREADABLE, f"the picture is damaged or incomplete ({message}); copy it again")
    return None


def _touches_no_pixel(data: bytes, count: int, marker: int) -> bool:
    """Whether stray bytes lie between header segments, or fill up the end of the pixels with zeros or ones."""
    if marker == 0xD9:
        end = data.rfind(b"\xff\xd9")
        filling = data[max(0, end - count) : end]
        return bool(filling) and set(filling) <= {0x00, 0xFF}
    return not 0xD0 <= marker <= 0xD7


def _check_png(data: bytes) -> None:
    """Compare every chunk of a PNG with its checksum: decoders pass damaged pixels on.

    Raises:
        PhotoError: a chunk is damaged or cut off.
    """
    at, view = 8, memoryview(data)
    while at + 12 <= len(data):
        length = int.from_bytes(view[at : at + 4], "big")
        end = at + 12 + length
        if end > len(data):
            break
        kind = bytes(view[at + 4 : at + 8])
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise PhotoError(
                Status.UNREADABLE, f"the picture is damaged (checksum of its {kind.decode('latin-1')}); copy it again"
            )
        if kind == b"IEND":
            return
        at = end
    raise PhotoError(Status.UNREADABLE, "the picture is damaged or incomplete (its end is missing); copy it again")


def _opencv(data: bytes) -> NDArray[np.uint8] | None:
    try:
        pixels: NDArray[Any] | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    return None if pixels is None else eight_bit_rgb(pixels)


def eight_bit_rgb(pixels: NDArray[Any]) -> NDArray[np.uint8]:
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
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _pillow(data: bytes, divisor: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if divisor > 1:
                # The same scaled DCT: who planned a size counts in its pixels. Rounded down, Pillow takes this divisor.
                image.draft("RGB", (image.width // divisor, image.height // divisor))
            image.load()
            return np.array(image.convert("RGB"))
    except Exception as error:
        # As in read_header: damaged pixels surface as OSError, ValueError, SyntaxError, struct.error and others.
        raise PhotoError(Status.UNREADABLE, f"the picture is damaged or incomplete ({error}); copy it again") from None


_TURNS = {3: cv2.ROTATE_180, 4: cv2.ROTATE_180, 5: cv2.ROTATE_90_COUNTERCLOCKWISE, 6: cv2.ROTATE_90_CLOCKWISE}
_TURNS |= {7: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}


def _upright(rgb: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation. Source: EXIF 2.32, tag 0x0112."""
    if orientation in (2, 4, 5, 7):
        rgb = cv2.flip(rgb, 1)
    return cv2.rotate(rgb, _TURNS[orientation]) if orientation in _TURNS else rgb
