"""Minimal reader of EXIF, and of XMP where EXIF says nothing, for the orientation and the camera name."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

__all__ = ["Exif", "read_exif"]

_MAKE, _MODEL, _ORIENTATION, _XMP = 0x010F, 0x0110, 0x0112, 0x02BC
_ASCII = 2
_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
"""Struct formats of the integer types of TIFF. The standard asks for SHORT; some cameras and converters write LONG."""
_MAX_ENTRIES, _LONGEST_NAME, _LONGEST_XMP = 512, 64, 1 << 20
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")
"""As an attribute, or as an element."""


class Exif(NamedTuple):
    """What EXIF and XMP say of a photo."""

    orientation: int = 1
    """1 (upright) to 8; 1 if neither says it."""
    camera: str | None = None
    """Maker and model; None if both are absent."""
    by_xmp: bool = False
    """True if only XMP has the orientation: most decoders do not know it."""


def read_exif(tiff: bytes, xmp: bytes = b"") -> Exif:
    """Read the orientation and the camera name.

    Source: EXIF 2.32, tags 0x010F, 0x0110 and 0x0112; XMP specification, part 2, section 3.5.

    Args:
        tiff: EXIF data from its byte order mark on, or a whole TIFF; may be empty or damaged.
        xmp: an XMP packet; editors write some photos without EXIF. A TIFF contains its own.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return _with_xmp(None, xmp, None)
    orientation: int | None = None
    names = {}
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for index in range(min(count, _MAX_ENTRIES)):
            place = at + 2 + 12 * index
            tag, kind, length = struct.unpack_from(order + "HHI", tiff, place)
            if tag == _ORIENTATION and kind in _NUMBERS:
                (value,) = struct.unpack_from(order + _NUMBERS[kind], tiff, place + 8)
                orientation = value if 1 <= value <= 8 else 1
            elif tag in (_MAKE, _MODEL) and kind == _ASCII:
                # Values of up to four bytes are stored in the entry itself.
                start = place + 8 if length <= 4 else struct.unpack_from(order + "I", tiff, place + 8)[0]
                names[tag] = _name(tiff[start : start + min(length, _LONGEST_NAME)])
            elif tag == _XMP and not xmp:
                (start,) = struct.unpack_from(order + "I", tiff, place + 8)
                xmp = tiff[start : start + min(length, _LONGEST_XMP)]
    except struct.error:
        pass
    make, model = names.get(_MAKE, ""), names.get(_MODEL, "")
    # Many manufacturers repeat their name in the model.
    camera = model if model.lower().startswith(make.lower()) else f"{make} {model}".strip()
    return _with_xmp(orientation, xmp, camera or None)


def _with_xmp(orientation: int | None, xmp: bytes, camera: str | None) -> Exif:
    found = _XMP_ORIENTATION.search(xmp) if orientation is None and xmp else None
    return Exif(int(found[1]), camera, by_xmp=True) if found else Exif(orientation or 1, camera)


def _name(text: bytes) -> str:
    plain = text.split(b"\0")[0].decode("ascii", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in plain).strip()
