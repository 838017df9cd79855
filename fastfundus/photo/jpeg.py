"""The scans of a JPEG: whether all of them are there, and a copy without header faults that touch no pixel.

libjpeg only warns about damage and continues with invented pixels. The strict decoder therefore refuses every warning,
and this module removes those causes of warnings that concern no pixel, so that the rest is still decoded strictly.
Source: ITU-T T.81, annexes B and G.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from fastfundus.errors import PhotoError
from fastfundus.records import Status

__all__ = ["has_all_scans", "has_another_photo", "without_harmless_faults"]

_SOS, _EOI = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""The next marker in entropy-coded data: stuffed zeros, fill bytes and restart markers do not end it."""
_MAX_SCANS = 64
"""Programs write ten; the standard allows some hundred."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MAX_HEADER = 1 << 20
"""Bytes that the header of a second picture may have: EXIF, profile and thumbnail are some ten thousand."""
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_KEPT = frozenset({0xDB, 0xC4, 0xDD, *range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)})
"""Segments that decoding needs: quantisation and Huffman tables, restart interval, frame."""
_START = b"\xff\xd8\xff"
_MAX_PICTURES = 16
_MIN_SHARE_OF_PHOTO = 0.5
_GAIN_MAP = (b"hdrgm", b"HDRGainMap", b"iso:ts:21496")
"""Words in the header of a gain map, the second picture of photos from phones for bright screens."""
_JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"


def has_all_scans(data: bytes) -> bool:
    """Return whether the scans of a JPEG contain every coefficient of every component, to the last bit.

    A progressive JPEG whose later scans are missing decodes to a blurred picture without any warning.

    Raises:
        PhotoError: there are more scans than any camera or converter writes (`unsupported`): each costs a pass over all
            coefficients.
    """
    components: list[int] = []
    progressive = False
    precision: dict[tuple[int, int], int] = {}
    scans = 0
    for marker, start, end in _segments(data):
        body = data[start:end]
        if marker in _FRAMES:
            progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
            components = [body[6 + 3 * index] for index in range(body[5])] if len(body) > 5 else []
        elif marker == _SOS and body:
            count, scans = body[0], scans + 1
            if scans > _MAX_SCANS:
                raise PhotoError(Status.UNSUPPORTED, f"JPEG with more than {_MAX_SCANS} scans; save it again")
            if len(body) < 4 + 2 * count:
                return False
            first, last, bits = body[1 + 2 * count : 4 + 2 * count]
            if not progressive:
                first, last, bits = 0, 63, 0
            for index in range(count):
                for coefficient in range(first, min(last, 63) + 1):
                    precision[body[1 + 2 * index], coefficient] = bits & 15
            if not progressive and len({component for component, _ in precision}) == len(components):
                return True
    return bool(components) and all(
        precision.get((component, coefficient)) == 0 for component in components for coefficient in range(64)
    )


def has_another_photo(data: bytes, start: int, area: int) -> bool:
    """Return whether a second photo follows in the same file, as in stereo pairs of cameras (MPO): nobody would see it.

    Previews, which are smaller, depth maps, which are grey, and gain maps are no photos.

    Args:
        data: the file.
        start: end of the frame header of the first photo; thumbnails come before it.
        area: number of pixels of the first photo.
    """
    end = len(data)
    for _ in range(_MAX_PICTURES):
        # Cannot occur within the pixels of a JPEG. From the end, because `rfind` is twice as fast as `find`.
        end = data.rfind(_START, start, end)
        if end < 0:
            return False
        frame = _frame(data[end : end + _MAX_HEADER])
        if (
            frame is not None
            and frame.components == 3
            and frame.area > _MIN_SHARE_OF_PHOTO * area
            and not frame.gain_map
        ):
            return True
    return False


class _Frame(NamedTuple):
    area: int
    components: int
    gain_map: bool


def _frame(data: bytes) -> _Frame | None:
    """Return what the frame header at the start of a JPEG says; None if there is none."""
    for marker, first, end in _segments(data):
        if marker == _SOS:
            break
        if marker in _FRAMES and end - first >= 6:
            height, width, components = struct.unpack_from(">xHHB", data, first)
            return _Frame(width * height, components, any(word in data[:end] for word in _GAIN_MAP))
    return None


def without_harmless_faults(data: bytes, filling: int = 0) -> bytes:
    """Return a copy that decodes to the same pixels, without faults between the segments of its header.

    Left out are stray bytes, application segments and comments; the parameters of the scan of a sequential JPEG are set
    to the only values that they can have; and a missing end marker is added. A file that was cut still decodes with a
    warning, because the end marker then comes too early.

    Args:
        data: the file.
        filling: number of bytes after the last scan that the decoder did not use; they are left out if all their bits
            are zeros or ones, which cannot be pixels that were lost.
    """
    parts = [b"\xff\xd8"]
    sequential = False
    for marker, start, end in _segments(data):
        body = data[start:end]
        if marker == 0xE0 and body[:5] == b"JFIF\0":
            parts.append(_JFIF)
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12 and body[11] <= 2:
            parts.append(data[start - 4 : end])
        elif marker in _KEPT:
            sequential = sequential or marker in (0xC0, 0xC1, 0xC9)
            parts.append(data[start - 4 : end])
        elif marker == _SOS:
            count = body[0] if body else 0
            head = bytearray(data[start - 4 : end])
            if sequential and len(body) == 4 + 2 * count:
                head[-3:] = (0, 63, 0)
            parts.append(bytes(head))
            stop = _end_of_scan(data, end)
            parts.append(data[end:stop])
    if filling and not parts[-1][-filling:].strip(b"\x00\xff"):
        parts[-1] = parts[-1][:-filling]
    return b"".join(parts) + b"\xff\xd9"


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker of each segment, and where its content begins and ends, up to the end of the picture."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0x00, 0xFF) or marker in _STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == _EOI:
            return
        start, end = at + 4, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if end > len(data):
            return
        yield marker, start, end
        at = _end_of_scan(data, end) if marker == _SOS else end


def _end_of_scan(data: bytes, start: int) -> int:
    following = _MARKER.search(data, start)
    return following.start() if following else len(data)
