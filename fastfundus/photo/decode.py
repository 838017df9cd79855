"""Decode image files to upright RGB arrays, at the smallest scale that the target size allows.

libjpeg-turbo (through simplejpeg) decodes JPEG, at a reduced scale where `plan_decode` asks for it. OpenCV decodes all
other formats, and Pillow is the fallback before a file is reported as unreadable. All three release the GIL while they
decode.

No decoder may invent missing pixels: a truncated or damaged file is unreadable, because a half-grey retina looks like
disease to a model. Colour profiles are not applied, so that every engine sees the stored values.
"""

from __future__ import annotations

import io
import re
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from fastfundus.errors import PhotoError
from fastfundus.photo.decode_plan import DecodePlan, plan_decode
from fastfundus.photo.header import PhotoHeader
from fastfundus.photo.jpeg import has_all_scans, without_harmless_faults
from fastfundus.photo.png import check_png, check_rows
from fastfundus.photo.tiff import check_tiff, read_pages
from fastfundus.records import Status

__all__ = ["decode", "decode_with_room", "eight_bit_rgb", "is_damage"]

_DAMAGE = re.compile("corrupt|premature|bogus|invalid|inconsistent|extraneous|unknown|warning", re.IGNORECASE)
"""Warnings of libjpeg, as opposed to errors about kinds that it does not support."""
_ROWS, _LOOKED_AT = 256, 4_000_000
_COMMENT, _MAX_PPM_HEADER = re.compile(rb"#[^\n]*\n?"), 4096
_FILLING = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


def decode(data: bytes, header: PhotoHeader, plan: DecodePlan | None = None) -> NDArray[np.uint8]:
    """Decode a photo to upright RGB.

    Args:
        data: The whole file.
        header: The result of `read_header`.
        plan: The result of `plan_decode`; None decodes at full size.

    Returns:
        uint8 [H, W, 3] upright RGB of the planned size.

    Raises:
        PhotoError: The pixel data is damaged or incomplete (`unreadable`), or of an unsupported kind (`unsupported`).
    """
    return decode_with_room(data, header, plan or plan_decode(header), 0)[0]


def decode_with_room(
    data: bytes, header: PhotoHeader, plan: DecodePlan, rows: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Decode like `decode`, adding black rows above and below the photo where that costs nothing.

    Retinal fields are often cut at the top and bottom, so the square crop around them extends beyond the photo. With
    the extra rows the crop is a view of existing memory and needs no copy into a larger image.

    Args:
        data: The whole file.
        header: The result of `read_header`.
        plan: The result of `plan_decode`.
        rows: Number of black rows to add at each end.

    Returns:
        The photo, and the padded image of which it is the middle: at most `rows` taller at each end, or the photo
        itself.
    """
    rgb: NDArray[np.uint8] | None = None
    if plan.decoder == "libjpeg-turbo":
        if header.jpeg is not None and not has_all_scans(data):
            raise PhotoError(Status.UNREADABLE, "the image is incomplete (scans are missing); copy it again")
        rows = rows if header.orientation == 1 else 0
        roomy = np.empty((plan.height + 2 * rows, plan.width, 3), np.uint8)
        rgb = _turbo(data, plan, roomy[rows : rows + plan.height])
        if rgb is not None and rows:
            roomy[:rows] = roomy[rows + plan.height :] = 0
            return rgb, roomy
    elif plan.decoder == "opencv":
        if header.format == "PNG":
            data = check_png(data)
            check_rows(data)
        elif header.format == "TIFF":
            check_tiff(data, [page for page in read_pages(data) if not page.below][header.page])
        # OpenCV reads the first page, multiplies by the fourth channel without being asked, and takes every PPM to
        # reach up to 255 or 65535, and every BMP to have the usual order of channels.
        if header.page == 0 and header.samples == 3 and not _is_unusual(data, header):
            rgb = _opencv(data)
    if rgb is None:
        rgb = _pillow(data, plan.divisor, header.page)
    rgb = _upright(rgb, header.orientation)
    return rgb, rgb


def _turbo(data: bytes, plan: DecodePlan, room: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """Decode with libjpeg-turbo into `room`; return None if it does not support this kind of JPEG.

    libjpeg only warns about damage and continues with invented pixels, which Pillow and OpenCV then return silently.
    Here every warning is an error. Faults of the header that touch no pixel are removed and the rest is decoded again,
    as strictly: a warning about the header may hide one about the pixels.
    """
    size = {"min_width": plan.width, "min_height": plan.height, "min_factor": 1} if plan.divisor > 1 else {}
    message = ""
    for again in (False, True):
        filling = _FILLING.search(message)
        sound = without_harmless_faults(data, int(filling[1]) if filling else 0) if again else data
        try:
            simplejpeg.decode_jpeg(sound, "RGB", buffer=room, **size)
            return room
        except ValueError as error:
            message = str(error)
        if not is_damage(message):
            return None
    raise PhotoError(Status.UNREADABLE, "the image is damaged or incomplete; copy it again")


def is_damage(message: str) -> bool:
    """Return whether an error of the strict JPEG decoder is about damage, rather than a kind that it cannot decode."""
    return bool(_DAMAGE.search(message))


def _is_unusual(data: bytes, header: PhotoHeader) -> bool:
    """Return whether a PPM has another range than 8 or 16 bits, or a BMP channels in an order of its own."""
    if header.format == "PPM":
        numbers = _COMMENT.sub(b" ", data[:_MAX_PPM_HEADER]).split(maxsplit=4)
        return len(numbers) > 3 and numbers[3] not in (b"255", b"65535")
    # Compression 3 and 6 have masks of their own.
    return header.format == "BMP" and data[30:34] in (b"\3\0\0\0", b"\6\0\0\0")


def _opencv(data: bytes) -> NDArray[np.uint8] | None:
    try:
        pixels: NDArray[Any] | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    return None if pixels is None else eight_bit_rgb(pixels)


def eight_bit_rgb(pixels: NDArray[Any], bits: int = 16) -> NDArray[np.uint8]:
    """Convert 8-bit or 16-bit BGR(A) from OpenCV to 8-bit RGB; transparent pixels become black.

    A fourth channel of zeros is padding, as in 32-bit BMPs: nobody stores a picture that is transparent everywhere.

    Args:
        pixels: uint8 or uint16 [H, W, 3] or [H, W, 4], BGR or BGRA.
        bits: number of bits of a uint16 sample according to the file.

    Returns:
        uint8 [H, W, 3] RGB.

    Raises:
        PhotoError: The image is greyscale or has samples of another type (`unsupported`).
    """
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
        raise PhotoError(Status.UNSUPPORTED, "greyscale image; a colour fundus photograph is required")
    if pixels.dtype == np.uint16:
        colours = pixels if pixels.shape[2] == 3 else pixels[..., :3]
        if (scaled := _to_full_scale(colours, bits)) is not colours:
            pixels = scaled if pixels.shape[2] == 3 else np.dstack([scaled, pixels[..., 3]])
        pixels = _to_eight_bits(pixels)
    if pixels.dtype != np.uint8:
        raise PhotoError(Status.UNSUPPORTED, f"{pixels.dtype} samples; 8 or 16 bits per channel are supported")
    if pixels.shape[2] == 4 and not pixels[..., 3].any():
        pixels = pixels[..., :3]
    if pixels.shape[2] == 4:
        pixels = _on_black(pixels)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _to_full_scale(pixels: NDArray[np.uint16], bits: int) -> NDArray[np.uint16]:
    """Map samples to the full range of 16 bits, so that 12-bit samples in 16 bits do not become a dark image.

    A file may say 16 bits where the camera stored 12: then the range of the values decides.

    Args:
        pixels: uint16 [H, W, 3].
        bits: number of bits of a sample according to the file.
    """
    # Whole pixels: red is twice as bright as blue.
    some = pixels.reshape(-1, pixels.shape[-1])[:: 1 + pixels.size // _LOOKED_AT].ravel()
    # One hot pixel must not decide: one in ten thousand may be brighter.
    rank = some.size // 10_000
    used = int(np.partition(some, -1 - rank)[-1 - rank]).bit_length()
    stored = next(size for size in (8, 10, 12, 14, 16) if used <= size)
    # A photo may leave the brightest half of its range unused, but hardly three quarters.
    bits = stored if used > bits or stored <= bits - 2 else bits
    if bits == 16:
        return pixels
    result = np.empty(pixels.shape, np.uint16)
    for row in range(0, len(pixels), _ROWS):
        scaled = pixels[row : row + _ROWS].astype(np.uint32) * 65535 // (2**bits - 1)
        result[row : row + _ROWS] = np.minimum(scaled, 65535)
    return result


def _to_eight_bits(pixels: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Convert 16 to 8 bits, rounding to nearest, some rows at a time: intermediate results need four times the room."""
    result = np.empty(pixels.shape, np.uint8)
    for row in range(0, len(pixels), _ROWS):
        # 65535 / 255 = 257 maps full scale to full scale.
        result[row : row + _ROWS] = (pixels[row : row + _ROWS].astype(np.uint32) + 128) // 257
    return result


def _on_black(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay a picture [H, W, 4] with transparency on black, some rows at a time."""
    result = np.empty((*pixels.shape[:2], 3), np.uint8)
    for row in range(0, len(pixels), _ROWS):
        part = pixels[row : row + _ROWS]
        result[row : row + _ROWS] = (part[..., :3] * part[..., 3:].astype(np.uint16) + 127) // 255
    return result


def _pillow(data: bytes, divisor: int, page: int = 0) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if page:
                image.seek(page)
            if divisor > 1:
                # Use the same scaled DCT, so that the size matches the plan. Rounding down makes Pillow choose exactly
                # this divisor.
                image.draft("RGB", (image.width // divisor, image.height // divisor))
            image.load()
            if image.mode == "RGBA":
                return eight_bit_rgb(cv2.cvtColor(np.array(image), cv2.COLOR_RGBA2BGRA))
            return np.array(image.convert("RGB"))
    except Exception:
        # As in read_header: damaged pixel data raises OSError, ValueError, SyntaxError, struct.error and others.
        raise PhotoError(
            Status.UNREADABLE,
            "the image is damaged, incomplete or of an unknown kind; copy it again, or export it anew",
        ) from None


_TURNS = {3: cv2.ROTATE_180, 4: cv2.ROTATE_180, 5: cv2.ROTATE_90_COUNTERCLOCKWISE, 6: cv2.ROTATE_90_CLOCKWISE}
_TURNS |= {7: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}


def _upright(rgb: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation.

    Source: EXIF 2.32, tag 0x0112.
    """
    if orientation in (2, 4, 5, 7):
        rgb = cv2.flip(rgb, 1)
    return cv2.rotate(rgb, _TURNS[orientation]) if orientation in _TURNS else rgb
