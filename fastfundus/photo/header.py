"""Image headers, read without decoding pixels."""

from __future__ import annotations

import importlib.util
import io
import re
import struct
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from fastfundus.errors import PhotoError
from fastfundus.photo.exif import Exif, read_exif
from fastfundus.photo.jpeg import has_another_photo
from fastfundus.photo.png import PNG_SIGNATURE, read_png_header
from fastfundus.photo.tiff import choose_page, is_tiff, read_pages
from fastfundus.records import Status

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "MIN_SIDE_PX",
    "OTHER_PICTURES",
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
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP", "JPEG2000", "HEIF", "AVIF")
"""Supported image formats. DICOM files are handled separately and contain one of these or their own encoding."""

OTHER_PICTURES = {
    "JPEG XL": re.compile(rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a[\x00-\xff]{60}", re.DOTALL),
    "JPEG XR": re.compile(rb"II\xbc"),
    "raw camera": re.compile(rb".{4}ftypcrx |FUJIFILMCCD-RAW|IIU\0|II(?:RO|RS)|MMOR|\0MRM", re.DOTALL),
    "PCX": re.compile(rb"\x0a\x05\x01[\x01\x02\x04\x08]"),
    "PAM": re.compile(rb"P7\nWIDTH|P7\n#"),
}
"""The first bytes of pictures that are named, not read, by kind."""
_GREY = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"})
_GREYSCALE = "greyscale image; a colour fundus photograph is required"
_PRINT_COLOURS = {5: "CMYK", 8: "LAB", 9: "LAB", 10: "LAB"}
"""Photometric interpretations of TIFF."""
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
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
    page: int = 0
    """Index of the photo among the pages of a TIFF."""
    samples: int = 3
    """Samples a pixel of a TIFF; a fourth one need not be transparency."""

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
    if data[:3] == b"\xff\xd8\xff":
        header = _read_jpeg(data)
    elif data[:8] == PNG_SIGNATURE:
        if data[12:16] == b"CgBI":
            raise PhotoError(Status.UNSUPPORTED, "PNG in the form of iPhone apps; export it as a usual PNG or JPEG")
        header = _read_png(data)
    elif is_tiff(data):
        header = _read_tiff(data)
    else:
        kind = next((name for name, pattern in OTHER_PICTURES.items() if pattern.match(data)), None)
        if kind is not None:
            raise PhotoError(Status.UNSUPPORTED, f"{kind} files are not supported; export as JPEG, PNG or TIFF")
        header = _read_by_pillow(data)
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


def _read_png(data: bytes) -> PhotoHeader:
    width, height, grey, exif = read_png_header(data)
    check_size(width, height)
    if grey:
        raise PhotoError(Status.UNSUPPORTED, _GREYSCALE)
    return PhotoHeader("PNG", width, height, exif.orientation, camera=exif.camera)


def _read_tiff(data: bytes) -> PhotoHeader:
    pages = read_pages(data)
    index = choose_page(pages) if pages else 0
    if not pages or not pages[index].width or not pages[index].offsets:
        raise PhotoError(Status.UNREADABLE, "the TIFF is damaged or has no image; copy it again")
    page = pages[index]
    if page.photometric in (0, 1):
        raise PhotoError(Status.UNSUPPORTED, _GREYSCALE)
    if page.samples > 4:
        raise PhotoError(Status.UNSUPPORTED, f"{page.samples} channels; a colour fundus photograph has three")
    if page.planar and page.bits > 8:
        # OpenCV mixes the planes up.
        raise PhotoError(Status.UNSUPPORTED, "16 bits in separate planes; export with 8 bits, or interleaved")
    if page.bits > 16:
        raise PhotoError(Status.UNSUPPORTED, f"{page.bits} bits per channel; 8 or 16 are supported")
    if page.photometric in _PRINT_COLOURS:
        raise PhotoError(
            Status.UNSUPPORTED, f"{_PRINT_COLOURS[page.photometric]} colours, intended for print; export as RGB"
        )
    exif = read_exif(data)
    width, height, orientation = page.width, page.height, exif.orientation
    if not exif.by_xmp:
        # OpenCV and Pillow apply the tag of TIFFs themselves.
        width, height, orientation = (height, width, 1) if orientation >= 5 else (width, height, 1)
    number = sum(not p.below for p in pages[:index])
    return PhotoHeader("TIFF", width, height, orientation, camera=exif.camera, page=number, samples=page.samples)


def _read_by_pillow(data: bytes) -> PhotoHeader:
    kind = data[4:12] if data[4:8] == b"ftyp" else b""
    if kind[4:] in _HEIF_BRANDS and not register_heif():
        raise PhotoError(
            Status.UNSUPPORTED, "HEIC photo; install fastfundus[phone] to read it, or export it as JPEG or PNG"
        )
    try:
        with Image.open(io.BytesIO(data)) as image:
            form, mode, (width, height) = image.format or "", image.mode, image.size
            # Counting frames scans the whole file, which is slow for some formats.
            frames = getattr(image, "n_frames", 1) if form in ("WEBP", "AVIF", "HEIF") else 1
            xmp = image.info.get("xmp") or b""
            exif = read_exif(
                (image.info.get("exif") or b"").removeprefix(b"Exif\0\0"), xmp if isinstance(xmp, bytes) else b""
            )
    except UnidentifiedImageError:
        if kind[4:] in _HEIF_BRANDS:
            raise PhotoError(
                Status.UNSUPPORTED, "HEIC photo that libheif cannot read; export it as JPEG or PNG"
            ) from None
        raise PhotoError(Status.UNREADABLE, _say_what_it_is(data)) from None
    except Image.DecompressionBombError:
        raise PhotoError(Status.UNSUPPORTED, f"more than {MAX_PIXELS:,} pixels") from None
    except Exception:
        # Pillow's plugins raise many types of errors on damaged headers.
        raise PhotoError(Status.UNREADABLE, "the header is damaged; copy it again") from None
    if form not in FORMATS:
        raise PhotoError(Status.UNSUPPORTED, f"{form} files are not supported; export as JPEG, PNG or TIFF")
    if frames > 1:
        raise PhotoError(Status.UNSUPPORTED, f"{frames} images in one file; export one photo per file")
    if mode in _GREY:
        raise PhotoError(Status.UNSUPPORTED, _GREYSCALE)
    if mode in ("CMYK", "LAB"):
        raise PhotoError(Status.UNSUPPORTED, f"{mode} colours, intended for print; export as RGB")
    # libheif turns photos upright while it decodes.
    return PhotoHeader(form, width, height, 1 if form == "HEIF" else exif.orientation, camera=exif.camera)


def register_heif() -> bool:
    """Make Pillow read HEIC, if pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    # Registering again has no effect.
    pillow_heif.register_heif_opener()
    return True


def _say_what_it_is(data: bytes) -> str:
    """Describe a file that is not an image."""
    start = data[:256].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the photo itself; run git lfs pull"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page or XML, not a photo; download the photo itself"
    if start.startswith(b"%pdf"):
        return "a PDF, not a photo; export the photo from it"
    if not any(data):
        return "only zero bytes; copy it again"
    if start.startswith((b"data:image/", b"{", b"[")):
        return "text that may contain a photo, not the photo itself; save it as a file"
    return "the file is not an image; supported formats include JPEG, PNG, TIFF and DICOM"


def _read_jpeg(data: bytes) -> PhotoHeader:
    """Parse the segments of a JPEG up to its frame header, in a tenth of the time that Pillow takes.

    Raises:
        PhotoError: The frame header is missing or invalid, or of a kind that is not supported.
    """
    at, exif, xmp = 2, b"", b""
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
        # Of two segments the first counts, as for other programs; the byte after the zero is padding.
        if marker == 0xE1 and data[at + 4 : at + 9] == b"Exif\0":
            exif = exif or data[at + 10 : at + 2 + length]
        elif marker == 0xE1 and data.startswith(_XMP, at + 4):
            xmp = xmp or data[at + 4 + len(_XMP) : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            end = at + 2 + length
            header = _read_frame(marker - 0xC0, data[at + 4 : end], read_exif(exif, xmp), end)
            if has_another_photo(data, end, header.width * header.height):
                raise PhotoError(Status.UNSUPPORTED, "several images in one file; export one photo per file")
            return header
        at += 2 + length
    raise PhotoError(Status.UNREADABLE, "the header is damaged (JPEG without a frame header); copy it again")


def _read_frame(kind: int, segment: bytes, exif: Exif, end: int) -> PhotoHeader:
    if len(segment) < 6 or len(segment) < 6 + 3 * segment[5]:
        raise PhotoError(Status.UNREADABLE, "the header is damaged (truncated JPEG frame header); copy it again")
    bits, height, width, components = struct.unpack_from(">BHHB", segment)
    if components == 1:
        raise PhotoError(Status.UNSUPPORTED, _GREYSCALE)
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
    frame = JpegFrame(_CODINGS[kind], sampling, end)
    return PhotoHeader("JPEG", width, height, exif.orientation, frame, exif.camera)
