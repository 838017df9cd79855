"""Minimal EXIF reader for the orientation and the camera name."""

from __future__ import annotations

import struct

__all__ = ["read_exif"]

_MAKE, _MODEL, _ORIENTATION = 0x010F, 0x0110, 0x0112
_ASCII = 2
_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}
"""Struct formats of the integer types of TIFF. The standard asks for SHORT; some cameras and converters write LONG."""
_MAX_ENTRIES, _LONGEST_NAME = 512, 64


def read_exif(tiff: bytes) -> tuple[int, str | None]:
    """Read the orientation and the camera name.

    Source: EXIF 2.32, tags 0x010F, 0x0110 and 0x0112.

    Args:
        tiff: EXIF data from its byte order mark on; may be empty or damaged.

    Returns:
        The orientation, 1 to 8 (1 if absent); and the maker and model, None if both are absent.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1, None
    orientation, names = 1, {}
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
    except struct.error:
        pass
    make, model = names.get(_MAKE, ""), names.get(_MODEL, "")
    # Many manufacturers repeat their name in the model.
    camera = model if model.lower().startswith(make.lower()) else f"{make} {model}".strip()
    return orientation, camera or None


def _name(text: bytes) -> str:
    plain = text.split(b"\0")[0].decode("ascii", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in plain).strip()
