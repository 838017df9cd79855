"""The chunks of a PNG: its header without decoding, and whether anything that touches a pixel is damaged.

Source: Portable Network Graphics (PNG) Specification, third edition, sections 5 and 11.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from fastfundus.errors import PhotoError
from fastfundus.photo.exif import Exif, read_exif
from fastfundus.photo.inflate import inflated_length
from fastfundus.records import Status

__all__ = ["PNG_SIGNATURE", "check_png", "check_rows", "read_png_header"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = (2, 3, 6)
"""Colour types with colours: RGB, palette and RGBA; 0 and 4 are greyscale."""
_END = b"\0\0\0\0IEND\xaeB`\x82"
_RAW_PROFILES = (b"Raw profile type exif\0", b"Raw profile type APP1\0")
_LONGEST_PROFILE = 1 << 20
_XMP_KEYWORD = b"XML:com.adobe.xmp\0\0"
"""Keyword of a text that is not compressed."""


def read_png_header(data: bytes) -> tuple[int, int, bool, Exif]:
    """Return width, height, whether the picture is greyscale, and its EXIF orientation and camera.

    Raises:
        PhotoError: the header is damaged (`unreadable`), or the picture is animated (`unsupported`).
    """
    chunks = _chunks(data)
    kind, start, end = next(chunks, (b"", 0, 0))
    if kind != b"IHDR" or end - start != 13 or end + 4 > len(data):
        raise PhotoError(Status.UNREADABLE, "the header is damaged (PNG without a header chunk); copy it again")
    width, height, _, colour = struct.unpack_from(">IIBB", data, start)
    exif, xmp = b"", b""
    for kind, start, end in chunks:
        if kind == b"eXIf":
            exif = data[start:end].removeprefix(b"Exif\0\0")
        elif kind in (b"tEXt", b"zTXt") and data.startswith(_RAW_PROFILES, start):
            exif = exif or _raw_profile(data[start:end], compressed=kind == b"zTXt")
        elif kind == b"iTXt" and data.startswith(_XMP_KEYWORD, start):
            xmp = data[start:end]
        elif kind == b"acTL" and end - start >= 4 and struct.unpack_from(">I", data, start)[0] > 1:
            raise PhotoError(Status.UNSUPPORTED, "several images in one file; export one photo per file")
    return width, height, colour not in _COLOURS, read_exif(exif, xmp)


def _raw_profile(text: bytes, *, compressed: bool) -> bytes:
    """Return the EXIF data of a text by ImageMagick: a name, a length, and hexadecimals."""
    content = text.partition(b"\0")[2]
    if compressed:
        unpacker = zlib.decompressobj()
        try:
            content = unpacker.decompress(content[1:], _LONGEST_PROFILE)
        except zlib.error:
            return b""
    parts = content.split(maxsplit=2)
    try:
        return bytes.fromhex(parts[2].decode("ascii")).removeprefix(b"Exif\0\0")
    except (IndexError, ValueError):
        return b""


def check_png(data: bytes) -> bytes:
    """Verify the checksum of every chunk that touches a pixel, because decoders silently return damaged pixels.

    Returns:
        The data, completed by the end marker if only that is missing.

    Raises:
        PhotoError: a chunk is damaged or truncated.
    """
    view, ended = memoryview(data), False
    for kind, start, end in _chunks(data):
        if end + 4 > len(data):
            break
        # Text, dates and profiles have lower-case names; transparency is the only one of them that changes pixels.
        touches = kind[:1].isupper() or kind == b"tRNS"
        if touches and zlib.crc32(view[start - 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise PhotoError(
                Status.UNREADABLE, f"the image is damaged ({kind.decode('latin-1')} checksum mismatch); copy it again"
            )
        ended = kind == b"IEND"
    if ended:
        return data
    whole = _whole_up_to_end(data)
    if whole is None:
        raise PhotoError(Status.UNREADABLE, "the image is damaged or incomplete (its end is missing); copy it again")
    return whole


def check_rows(data: bytes) -> None:
    """Verify that the pixel data contains every row: a writer that died may have closed its file properly.

    Raises:
        PhotoError: rows are missing.
    """
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    passes: tuple[tuple[int, int, int, int], ...] = ((0, 1, 0, 1),)
    if interlaced:
        # Adam7: seven small pictures; start and step of each, horizontally and vertically.
        passes = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
    needed = 0
    for x, dx, y, dy in passes:
        columns, rows = max(0, -(-(width - x) // dx)), max(0, -(-(height - y) // dy))
        needed += rows * (1 + (columns * channels * bits + 7) // 8) if columns else 0
    try:
        length, _ = inflated_length(data[start:end] for kind, start, end in _chunks(data) if kind == b"IDAT")
    except zlib.error:
        raise PhotoError(Status.UNREADABLE, "the image is damaged (its compressed data); copy it again") from None
    if length < needed:
        raise PhotoError(Status.UNREADABLE, "the image is incomplete (rows are missing); copy it again")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each chunk, and where its content begins and ends; the last one may be cut."""
    at = len(PNG_SIGNATURE)
    while at + 8 <= len(data):
        start = at + 8
        end = start + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : start]
        yield kind, start, end
        if kind == b"IEND":
            return
        at = end + 4


def _whole_up_to_end(data: bytes) -> bytes | None:
    """Return the data with an end marker if all pixels are there, else None."""
    places = [(start, end) for kind, start, end in _chunks(data) if kind == b"IDAT"]
    try:
        _, complete = inflated_length(data[start:end] for start, end in places)
    except zlib.error:
        return None
    if not complete:
        return None
    last = places[-1][1] + 4
    return data[: min(last, len(data))].ljust(last, b"\0") + _END if last <= len(data) else None
