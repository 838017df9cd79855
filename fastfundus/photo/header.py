"""Image headers, read without decoding pixels."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from fastfundus.errors import PhotoError
from fastfundus.photo.exif import read_exif
from fastfundus.records import Status

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "MIN_SIDE_PX",
    "JpegFrame",
    "PhotoHeader",
    "check_size",
    "read_header",
]

MAX_BYTES = 512 * 2**20
"""File size limit, checked before reading. The largest fundus photographs are TIFFs of about 100 MB."""
MAX_PIXELS = 150_000_000
"""Pixel count limit, checked before decoding. Fundus cameras produce less than 50 million pixels."""
MIN_SIDE_PX = 64
"""Smallest accepted side; smaller images cannot show a retina well enough to be judged."""
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP", "JPEG2000")
"""Supported image formats. DICOM files are handled separately and contain one of these or their own encoding."""

_GREY = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"})
_CODINGS = {0: "baseline", 1: "extended", 2: "progressive", 9: "arithmetic", 10: "arithmetic"}
"""JPEG coding by start-of-frame marker; all other markers are lossless or hierarchical."""


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """The frame header of an 8-bit colour JPEG.

    Source: ITU-T T.81, annex B.2.2.
    """

    coding: str
    """"baseline", "extended", "progressive" or "arithmetic"."""
    subsampling: str
    """Chroma subsampling: "444", "422", "420", "440", "411", or "other"."""
    end: int
    """Offset of the first byte after the frame header."""


@dataclass(frozen=True, slots=True)
class PhotoHeader:
    """The properties of an image file that its header declares."""

    format: str
    """One of `FORMATS`, or "DICOM"."""
    width: int
    """Width of the stored image in pixels, before the orientation is applied."""
    height: int
    orientation: int
    """EXIF orientation that still has to be undone, 1 (upright) to 8."""
    jpeg: JpegFrame | None = None
    """Frame header of a JPEG; None for other formats."""
    camera: str | None = None
    """Maker and model from EXIF."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height after the orientation is applied."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(data: bytes) -> PhotoHeader:
    """Read the header of a photo, without its pixels.

    The format is determined by content; the file name extension is ignored.

    Raises:
        PhotoError: The data is not an image (`unreadable`), or of a kind that is not supported (`unsupported`).
    """
    if not data:
        raise PhotoError(Status.UNREADABLE, "the file is empty; copy it again")
    header = _read_jpeg(data) if data[:3] == b"\xff\xd8\xff" else _read_by_pillow(data)
    check_size(header.width, header.height)
    return header


def check_size(width: int, height: int) -> None:
    """Reject images that are too large to decode or too small to show a retina.

    Raises:
        PhotoError: The size is out of range (`unsupported`).
    """
    if width * height > MAX_PIXELS:
        raise PhotoError(Status.UNSUPPORTED, f"{width}x{height} pixels; at most {MAX_PIXELS:,} are supported")
    if min(width, height) < MIN_SIDE_PX:
        raise PhotoError(Status.UNSUPPORTED, f"{width}x{height} pixels; each side must be at least {MIN_SIDE_PX}")


def _read_by_pillow(data: bytes) -> PhotoHeader:
    try:
        with Image.open(io.BytesIO(data)) as image:
            form, mode, (width, height) = image.format or "", image.mode, image.size
            # Counting frames scans the whole file, which is slow for some formats.
            frames = getattr(image, "n_frames", 1) if form in ("TIFF", "WEBP") else 1
            if frames > 1 and form == "TIFF":
                frames = _full_size_pages(image)
            # `getexif` would decode a whole PNG, because it also looks behind the pixel data.
            orientation, camera = read_exif(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
    except UnidentifiedImageError:
        kinds = "supported formats include JPEG, PNG, TIFF and DICOM"
        if data[:4] in (b"II*\0", b"MM\0*"):
            raise PhotoError(Status.UNREADABLE, f"damaged TIFF, or one of an unsupported kind; {kinds}") from None
        raise PhotoError(Status.UNREADABLE, f"the file is not an image; {kinds}") from None
    except Image.DecompressionBombError:
        raise PhotoError(Status.UNSUPPORTED, f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        # Pillow's plugins raise many types of errors on damaged headers.
        raise PhotoError(Status.UNREADABLE, f"the header is damaged ({error})") from None
    if form not in FORMATS:
        raise PhotoError(Status.UNSUPPORTED, f"{form} files are not supported; export as JPEG, PNG or TIFF")
    if frames > 1:
        raise PhotoError(Status.UNSUPPORTED, f"{frames} images in one file; export one photo per file")
    if mode in _GREY:
        raise PhotoError(Status.UNSUPPORTED, "greyscale image; a colour fundus photograph is required")
    if mode in ("CMYK", "LAB"):
        raise PhotoError(Status.UNSUPPORTED, f"{mode} colours, intended for print; export as RGB")
    # OpenCV and Pillow apply the orientation of TIFFs themselves.
    return PhotoHeader(form, width, height, 1 if form == "TIFF" else orientation, camera=camera)


def _full_size_pages(image: Image.Image) -> int:
    """Return the number of TIFF pages as large as the first; thumbnails and pyramid levels are smaller."""
    size, pages = image.size, 1
    for page in range(1, getattr(image, "n_frames", 1)):
        image.seek(page)
        pages += image.size == size
    image.seek(0)
    return pages


def _read_jpeg(data: bytes) -> PhotoHeader:
    """Parse the segments of a JPEG up to its frame header, in a tenth of the time that Pillow takes.

    Raises:
        PhotoError: The frame header is missing or invalid, or of a kind that is not supported.
    """
    at, exif = 2, read_exif(b"")
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            # Skip stray bytes between segments, as decoders do.
            at += 1
            continue
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):
            break
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            exif = read_exif(data[at + 10 : at + 2 + length])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _read_frame(marker - 0xC0, data[at + 4 : at + 2 + length], exif, at + 2 + length)
        at += 2 + length
    raise PhotoError(Status.UNREADABLE, "the header is damaged (JPEG without a frame header); copy it again")


def _read_frame(kind: int, segment: bytes, exif: tuple[int, str | None], end: int) -> PhotoHeader:
    if len(segment) < 6 or len(segment) < 6 + 3 * segment[5]:
        raise PhotoError(Status.UNREADABLE, "the header is damaged (truncated JPEG frame header); copy it again")
    bits, height, width, components = struct.unpack_from(">BHHB", segment)
    if components == 1:
        raise PhotoError(Status.UNSUPPORTED, "greyscale image; a colour fundus photograph is required")
    if components != 3:
        raise PhotoError(Status.UNSUPPORTED, "CMYK colours, intended for print; export as RGB")
    if bits != 8:
        raise PhotoError(Status.UNSUPPORTED, f"JPEG with {bits} bits per sample; export with 8")
    if kind not in _CODINGS:
        raise PhotoError(Status.UNSUPPORTED, "lossless or hierarchical JPEG; export as baseline JPEG or PNG")
    first, *others = (segment[7 + 3 * index] for index in range(components))
    # Number of luma samples per chroma sample, horizontally and vertically.
    names = {0x11: "444", 0x21: "422", 0x22: "420", 0x12: "440", 0x41: "411"}
    sampling = "444" if set(others) == {first} else names.get(first, "other") if set(others) == {0x11} else "other"
    orientation, camera = exif
    return PhotoHeader("JPEG", width, height, orientation, JpegFrame(_CODINGS[kind], sampling, end), camera)
