"""What a picture file says about itself, read without its pixels."""

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
    "LEAST_SIDE_PX",
    "MOST_BYTES",
    "MOST_PIXELS",
    "JpegFrame",
    "PhotoHeader",
    "check_size",
    "read_header",
]

MOST_BYTES = 512 * 2**20
"""Larger files are refused before they are read. The largest fundus photographs are TIFFs of about 100 MB."""
MOST_PIXELS = 150_000_000
"""Larger pictures are refused before they are decoded; fundus cameras stop below 50 million pixels."""
LEAST_SIDE_PX = 64
"""Smaller pictures hold no retina that could be judged."""
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP", "JPEG2000")
"""Picture formats that are decoded; DICOM files hold one of their own."""

_GREY = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"})
_CODINGS = {0: "baseline", 1: "extended", 2: "progressive", 9: "arithmetic", 10: "arithmetic"}
"""Of a JPEG, by its start-of-frame marker; all others are lossless or hierarchical."""


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """The frame header of an 8-bit colour JPEG. Source: ITU-T T.81, annex B.2.2."""

    coding: str
    """"baseline", "extended", "progressive" or "arithmetic"."""
    subsampling: str
    """Of colour: "444", "422", "420", "440", "411", or "other"."""
    end: int
    """Offset of the first byte of the file behind the frame header."""


@dataclass(frozen=True, slots=True)
class PhotoHeader:
    """What a file says about itself."""

    format: str
    """One of `FORMATS`."""
    width: int
    """Of the stored picture in pixels, before it is turned upright."""
    height: int
    orientation: int
    """EXIF orientation that is left for us to undo, 1 (upright) to 8."""
    jpeg: JpegFrame | None = None
    """For a JPEG, its frame header."""
    camera: str | None = None
    """Maker and model, as EXIF has them."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height after turning."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(data: bytes) -> PhotoHeader:
    """Read the header of a photo, without its pixels.

    What counts is the content: the ending of a file's name is not looked at.

    Raises:
        PhotoError: it is no picture (`unreadable`), or of a kind that cannot be screened (`unsupported`).
    """
    if not data:
        raise PhotoError(Status.UNREADABLE, "the file is empty; copy it again")
    header = _read_jpeg(data) if data[:3] == b"\xff\xd8\xff" else _read_by_pillow(data)
    check_size(header.width, header.height)
    return header


def check_size(width: int, height: int) -> None:
    """Refuse pictures too large to decode or too small to show a retina.

    Raises:
        PhotoError: `unsupported`.
    """
    if width * height > MOST_PIXELS:
        raise PhotoError(Status.UNSUPPORTED, f"{width}x{height} pixels; at most {MOST_PIXELS:,} are decoded")
    if min(width, height) < LEAST_SIDE_PX:
        raise PhotoError(Status.UNSUPPORTED, f"{width}x{height} pixels; each side needs {LEAST_SIDE_PX} at least")


def _read_by_pillow(data: bytes) -> PhotoHeader:
    try:
        with Image.open(io.BytesIO(data)) as image:
            form, mode, (width, height) = image.format or "", image.mode, image.size
            # Asking for the number of frames walks through the whole file, which is slow for some formats.
            frames = getattr(image, "n_frames", 1) if form in ("TIFF", "WEBP") else 1
            if frames > 1 and form == "TIFF":
                frames = _full_size_pages(image)
            # `getexif` would decode the whole of a PNG, to look behind its pixels too.
            orientation, camera = read_exif(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
    except UnidentifiedImageError:
        kinds = "JPEG, PNG, TIFF and DICOM can be read"
        if data[:4] in (b"II*\0", b"MM\0*"):
            raise PhotoError(Status.UNREADABLE, f"a TIFF that is damaged or of an unusual kind; {kinds}") from None
        raise PhotoError(Status.UNREADABLE, f"the file is not a picture; {kinds}") from None
    except Image.DecompressionBombError:
        raise PhotoError(Status.UNSUPPORTED, f"more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:
        # Pillow's plugins raise many kinds of errors on damaged headers; whatever it is, this file ends here.
        raise PhotoError(Status.UNREADABLE, f"the header is damaged ({error})") from None
    if form not in FORMATS:
        raise PhotoError(Status.UNSUPPORTED, f"{form} files are not read; export as JPEG, PNG or TIFF")
    if frames > 1:
        raise PhotoError(Status.UNSUPPORTED, f"{frames} pictures in one file; export one photo a file")
    if mode in _GREY:
        raise PhotoError(Status.UNSUPPORTED, "a grey picture; a colour fundus photograph is needed")
    if mode in ("CMYK", "LAB"):
        raise PhotoError(Status.UNSUPPORTED, f"{mode} colours, as for print; export as RGB")
    # OpenCV and Pillow turn TIFFs upright themselves.
    return PhotoHeader(form, width, height, 1 if form == "TIFF" else orientation, camera=camera)


def _full_size_pages(image: Image.Image) -> int:
    """Pages of a TIFF as large as the first: thumbnails and pyramid levels that follow are smaller."""
    size, pages = image.size, 1
    for page in range(1, getattr(image, "n_frames", 1)):
        image.seek(page)
        pages += image.size == size
    image.seek(0)
    return pages


def _read_jpeg(data: bytes) -> PhotoHeader:
    """Walk through the segments of a JPEG up to its frame: a tenth of the time that Pillow takes.

    Raises:
        PhotoError: there is no sound frame, or it is of a kind that cannot be screened.
    """
    at, exif = 2, read_exif(b"")
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            # Stray bytes between segments: decoders skip them too.
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
    raise PhotoError(Status.UNREADABLE, "the header is damaged (a JPEG without a frame); copy it again")


def _read_frame(kind: int, segment: bytes, exif: tuple[int, str | None], end: int) -> PhotoHeader:
    if len(segment) < 6 or len(segment) < 6 + 3 * segment[5]:
        raise PhotoError(Status.UNREADABLE, "the header is damaged (its JPEG frame is cut off); copy it again")
    bits, height, width, components = struct.unpack_from(">BHHB", segment)
    if components == 1:
        raise PhotoError(Status.UNSUPPORTED, "a grey picture; a colour fundus photograph is needed")
    if components != 3:
        raise PhotoError(Status.UNSUPPORTED, "CMYK colours, as for print; export as RGB")
    if bits != 8:
        raise PhotoError(Status.UNSUPPORTED, f"a JPEG of {bits} bits a sample; export with 8")
    if kind not in _CODINGS:
        raise PhotoError(Status.UNSUPPORTED, "a lossless or hierarchical JPEG; export as baseline JPEG or PNG")
    first, *others = (segment[7 + 3 * index] for index in range(components))
    # How many luma samples there are for one of colour, across and down.
    names = {0x11: "444", 0x21: "422", 0x22: "420", 0x12: "440", 0x41: "411"}
    sampling = "444" if set(others) == {first} else names.get(first, "other") if set(others) == {0x11} else "other"
    orientation, camera = exif
    return PhotoHeader("JPEG", width, height, orientation, JpegFrame(_CODINGS[kind], sampling, end), camera)
