"""The length of LZW data of a TIFF, without decoding it: LZW has no checksum, and damage mostly changes the length.

The decoders stop as soon as a strip is full, whatever follows. The width of a code depends on nothing but its position
since the table was cleared, so that all codes up to the next clearing are found at once. Source: TIFF 6.0, section 13.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["lzw_length"]

_CLEAR, _END, _FIRST = 256, 257, 258
_LONGEST = 3838 + 1024
"""Codes between two clearings: 3838 fill the table; libtiff tolerates writers that clear it a little late."""
# A code is one bit wider as soon as the entry before the last of its width exists.
_WIDTHS = np.repeat(np.array([9, 10, 11, 12], np.int32), [254, 512, 1024, _LONGEST + 1 - 1790])
_STARTS = np.concatenate([[0], np.cumsum(_WIDTHS)])
_MASKS = (1 << _WIDTHS) - 1
_POSITIONS = np.arange(len(_WIDTHS), dtype=np.int32)
# Byte in which each code begins, and how far three bytes from there are to be shifted, by the first bit of all.
_PLACES = [(phase + _STARTS[:-1]) >> 3 for phase in range(8)]
_SHIFTS = [(24 - ((phase + _STARTS[:-1]) & 7) - _WIDTHS).astype(np.int32) for phase in range(8)]
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def lzw_length(data: bytes, *, reversed_bits: bool = False) -> tuple[int, bool] | None:
    """Return how many bytes a strip or tile decodes to, and whether the data says that it ends there.

    Args:
        data: the compressed strip or tile.
        reversed_bits: whether the bits of each byte are in reverse order (FillOrder 2).

    Returns:
        None if a code is invalid: the data is damaged.
    """
    if reversed_bits:
        data = data.translate(_REVERSED)
    room = np.frombuffer(data + b"\0\0\0", np.uint8)
    at, bits, length = 0, 8 * len(data), 0
    while True:
        count = int(np.searchsorted(_STARTS[1:], bits - at, side="right"))
        codes = _codes(room, at, count)
        ends = np.flatnonzero((codes == _CLEAR) | (codes == _END))
        used = int(ends[0]) if len(ends) else count
        lengths = _lengths(codes[:used])
        if lengths is None or (not len(ends) and count > _LONGEST):
            return None
        length += lengths
        if not len(ends) or codes[used] == _END:
            return length, bool(len(ends))
        at += int(_STARTS[used + 1])


def _codes(room: NDArray[np.uint8], at: int, count: int) -> NDArray[np.int32]:
    """Return `count` codes from bit `at` on, as they are after a clearing."""
    place = _PLACES[at & 7][:count] + (at >> 3)
    word = room[place].astype(np.int32)
    for following in (1, 2):
        word <<= 8
        word |= room[place + following]
    word >>= _SHIFTS[at & 7][:count]
    word &= _MASKS[:count]
    return word


def _lengths(codes: NDArray[np.int32]) -> int | None:
    """Return how many bytes codes stand for, or None if one stands for an entry that does not exist yet."""
    literal = codes < _CLEAR
    positions = _POSITIONS[: len(codes)]
    # The entry that code k completes extends code k - 1 by a byte, and code k itself may already use it.
    before = np.where(literal, positions, codes - _FIRST)
    hops = before < positions
    if np.any(hops == literal):
        return None
    steps = hops.astype(np.int32)
    while not literal[before].all():
        steps += steps[before]
        before = before[before]
    return int(steps.sum()) + len(codes)
