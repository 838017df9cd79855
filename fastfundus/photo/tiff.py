"""The directories of a TIFF, read without decoding: which page is the photo, and what its samples mean.

Libraries walk the directories of a file in Python or decode to count them; a file of a few megabytes can hold tens of
thousands. Here the walk is bounded. Source: TIFF 6.0, sections 2 and 8; BigTIFF (libtiff).
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, replace

import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastfundus.errors import PhotoError
from fastfundus.photo.inflate import inflated_length
from fastfundus.photo.lzw import lzw_length
from fastfundus.records import Status

__all__ = ["TiffPage", "check_tiff", "choose_page", "is_tiff", "read_pages"]

_MAX_PAGES = 64
_MAX_ENTRIES = 512
_MAX_PARTS = 1_000_000
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_SAMPLES, _ROWS_PER_STRIP, _PLANAR, _SUB_PAGES, _JPEG_TABLES = 277, 278, 284, 330, 347
_TILE_WIDTH, _TILE_HEIGHT, _FILL_ORDER = 322, 323, 266
_LZW, _DEFLATE, _JPEG, _PACKBITS, _YCBCR = 5, (8, 32946), 7, 32773, 6
_MIN_SHARE_OF_PHOTO = 0.5
_OFFSETS, _COUNTS = (273, 324), (279, 325)
"""Offsets and byte counts of the strips, or of the tiles."""
_SIZES = {1: 1, 3: 2, 4: 4, 7: 1, 13: 4, 16: 8}
_FORMATS = {1: "B", 3: "H", 4: "I", 7: "B", 13: "I", 16: "Q"}


@dataclass(frozen=True, slots=True)
class TiffPage:
    """What the directory of one page says."""

    width: int
    height: int
    mask: bool
    samples: int
    photometric: int
    compression: int
    bits: int
    offsets: tuple[int, ...]
    """Where each strip or tile begins."""
    counts: tuple[int, ...]
    """Size of each strip or tile in bytes."""
    jpeg_tables: bytes
    """The tables that JPEG strips and tiles share."""
    planar: bool
    """True if each channel has strips or tiles of its own."""
    part_width: int
    """Width of a strip or tile in pixels."""
    part_height: int
    tiled: bool
    sub_pages: tuple[int, ...]
    """Where directories of further pages below this one begin, as in DNG files."""
    reversed_bits: bool = False
    """True if the lowest bit of each byte comes first."""
    below: bool = False
    """True for such a page, which decoders do not count."""


def is_tiff(data: bytes) -> bool:
    """Return whether the data starts like a TIFF or a BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_pages(data: bytes) -> list[TiffPage]:
    """Read the directory of every page.

    Raises:
        PhotoError: a directory is damaged (`unreadable`), or there are more than 64 pages (`unsupported`).
    """
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    pages: list[TiffPage] = []
    seen: set[int] = set()
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
        while at:
            if at in seen:
                raise PhotoError(Status.UNREADABLE, "the TIFF is damaged (its directories form a circle)")
            if len(pages) == _MAX_PAGES:
                raise PhotoError(Status.UNSUPPORTED, f"more than {_MAX_PAGES} images in one file; export one per file")
            seen.add(at)
            tags, at = _read_directory(data, at, order, big=big)
            page = _page(tags, data, order)
            pages.append(page)
            for place in page.sub_pages[: _MAX_PAGES - len(pages)]:
                if place not in seen:
                    seen.add(place)
                    below = _page(_read_directory(data, place, order, big=big)[0], data, order)
                    pages.append(replace(below, below=True))
    except (struct.error, OverflowError):
        if not pages:
            raise PhotoError(Status.UNREADABLE, "the TIFF is damaged or incomplete; copy it again") from None
    return pages


_Tags = dict[int, tuple[int, int, int]]
"""Type, number of values and position of the values, by tag."""


def _read_directory(data: bytes, at: int, order: str, *, big: bool) -> tuple[_Tags, int]:
    """Return where the values of each tag are, and the position of the next directory."""
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    if count > _MAX_ENTRIES:
        raise PhotoError(Status.UNREADABLE, f"the TIFF is damaged ({count} tags in one directory)")
    start, size = at + (8 if big else 2), 20 if big else 12
    inline, pointer = (8, "Q") if big else (4, "I")
    tags: _Tags = {}
    for index in range(count):
        place = start + size * index
        tag, kind = struct.unpack_from(order + "HH", data, place)
        (length,) = struct.unpack_from(order + pointer, data, place + 4)
        if kind not in _SIZES or length == 0:
            continue
        value = place + (12 if big else 8)
        if length * _SIZES[kind] > inline:
            (value,) = struct.unpack_from(order + pointer, data, value)
        tags[tag] = kind, length, value
    (following,) = struct.unpack_from(order + pointer, data, start + size * count)
    return tags, following


def _page(tags: _Tags, data: bytes, order: str) -> TiffPage:
    def values(tag: int) -> tuple[int, ...]:
        if tag not in tags:
            return ()
        kind, length, place = tags[tag]
        if length > _MAX_PARTS:
            raise PhotoError(Status.UNREADABLE, f"the TIFF is damaged ({length} values of one tag)")
        return struct.unpack_from(f"{order}{length}{_FORMATS[kind]}", data, place)

    def first(tag: int, default: int) -> int:
        if tag not in tags:
            return default
        kind, _, place = tags[tag]
        return int(struct.unpack_from(order + _FORMATS[kind], data, place)[0])

    subfile, width, height = first(_SUBFILE, 0), first(_WIDTH, 0), first(_HEIGHT, 0)
    tiled = _TILE_WIDTH in tags
    return TiffPage(
        width=width,
        height=height,
        mask=bool(subfile & 4),
        samples=first(_SAMPLES, 1),
        photometric=first(_PHOTOMETRIC, 1),
        compression=first(_COMPRESSION, 1),
        bits=first(_BITS, 1),
        offsets=values(_OFFSETS[0]) or values(_OFFSETS[1]),
        counts=values(_COUNTS[0]) or values(_COUNTS[1]),
        jpeg_tables=bytes(values(_JPEG_TABLES)),
        planar=first(_PLANAR, 1) == 2,
        part_width=first(_TILE_WIDTH, 0) if tiled else width,
        part_height=first(_TILE_HEIGHT, 0) if tiled else min(height, first(_ROWS_PER_STRIP, height)),
        tiled=tiled,
        sub_pages=values(_SUB_PAGES),
        reversed_bits=first(_FILL_ORDER, 1) == 2,
    )


def choose_page(pages: list[TiffPage]) -> int:
    """Return the index of the photo among the pages: the largest one, whatever thumbnails come before it.

    Raises:
        PhotoError: several pages are about equally large, or the photo is a page that decoders do not reach
            (`unsupported`).
    """
    candidates = [index for index, page in enumerate(pages) if not page.mask] or list(range(len(pages)))
    areas = {index: pages[index].width * pages[index].height for index in candidates}
    chosen = max(candidates, key=lambda index: areas[index])
    # Levels of a pyramid and thumbnails have a quarter of the area or less.
    similar = sum(area > _MIN_SHARE_OF_PHOTO * areas[chosen] for area in areas.values())
    if similar > 1:
        raise PhotoError(Status.UNSUPPORTED, f"{similar} images in one file; export one photo per file")
    if pages[chosen].below:
        raise PhotoError(
            Status.UNSUPPORTED, "the photo is below a thumbnail, as in raw files; export it as JPEG or PNG"
        )
    return chosen


def check_tiff(data: bytes, page: TiffPage) -> None:
    """Verify that every strip or tile of a page is whole, because decoders continue after damage.

    Deflate streams carry a checksum, JPEG data is decoded strictly, and the codes of LZW and PackBits are counted: they
    have to end where the strip does. Damage that changes values only, as in uncompressed data, cannot be seen. Rare
    kinds are decoded by Pillow, which reports errors.

    Raises:
        PhotoError: a strip or tile is damaged or truncated.
    """
    across, down = -(-page.width // max(1, page.part_width)), -(-page.height // max(1, page.part_height))
    needed = across * down * (page.samples if page.planar else 1)
    if len(page.offsets) < needed or len(page.counts) < needed:
        raise PhotoError(Status.UNREADABLE, "the image is incomplete (parts are missing); copy it again")
    for index, (offset, count) in enumerate(zip(page.offsets, page.counts, strict=False)):
        part = data[offset : offset + count]
        # The last strip may be shorter; tiles have their full size.
        row = index // across % down
        rows = page.part_height if page.tiled else min(page.part_height, page.height - row * page.part_height)
        samples = 1 if page.planar else page.samples
        row_bytes = (page.part_width * samples * page.bits + 7) // 8
        # Some programs store the last strip with as many rows as the others.
        sizes = (rows * row_bytes, page.part_height * row_bytes)
        if len(part) < count or not _is_whole(part, page, sizes):
            where = f"part {index + 1} of {len(page.offsets)}"
            raise PhotoError(Status.UNREADABLE, f"the image is damaged or incomplete ({where}); copy it again")
    counted = page.compression == _LZW and not _is_old_lzw(data[page.offsets[0] : page.offsets[0] + 2])
    if page.compression not in (1, *_DEFLATE, _JPEG, _PACKBITS) and not counted:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except UnidentifiedImageError:
            # Kinds of samples that Pillow does not know.
            return
        except Exception as error:
            raise PhotoError(
                Status.UNREADABLE, f"the image is damaged or incomplete ({type(error).__name__}); copy it again"
            ) from None


def _is_old_lzw(part: bytes) -> bool:
    """Return whether LZW data has the order of bits that programs used before TIFF 6.0 defined one."""
    return part[:1] == b"\0" and len(part) > 1 and part[1] & 1 == 1


def _is_whole(part: bytes, page: TiffPage, sizes: tuple[int, int]) -> bool:
    """Return whether a strip or tile decodes to one of two sizes; subsampled colours need less and are not checked."""
    size = 0 if page.photometric == _YCBCR else sizes[0]
    if page.compression == 1:
        return len(part) >= size
    if page.compression == _PACKBITS:
        return _unpacked_bits(part) in sizes or size == 0
    if page.compression == _LZW and not _is_old_lzw(part):
        found = lzw_length(part, reversed_bits=page.reversed_bits)
        # Some programs leave out the mark at the end.
        return found is not None and (size == 0 or found[0] in sizes or (not found[1] and found[0] >= size))
    if page.compression in _DEFLATE:
        try:
            length, complete = inflated_length([part])
        except zlib.error:
            return False
        return complete and length >= size
    if page.compression == _JPEG and part[:2] == b"\xff\xd8":
        tables = page.jpeg_tables[:-2] if page.jpeg_tables[-2:] == b"\xff\xd9" else page.jpeg_tables
        try:
            simplejpeg.decode_jpeg((tables or b"\xff\xd8") + part[2:], "GRAY")
        except ValueError as error:
            # The strict decoder knows fewer kinds of JPEG than libtiff.
            return "precision" in str(error) or "colorspace" in str(error)
    return True


def _unpacked_bits(part: bytes) -> int:
    """Return the number of bytes that PackBits data decodes to, or -1 if it ends within a run."""
    at = length = 0
    while at < len(part):
        code = part[at]
        run, step = (code + 1, code + 2) if code < 128 else ((0, 1) if code == 128 else (257 - code, 2))
        length, at = length + run, at + step
    return length if at == len(part) else -1
