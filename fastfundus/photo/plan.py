"""Decides how a photo is decoded, from its header and the size that is needed: a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastfundus.photo.header import PhotoHeader

__all__ = ["DecodePlan", "plan_decode"]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How to decode one photo."""

    decoder: Literal["libjpeg-turbo", "opencv", "pillow"]
    """Which decoder goes first."""
    divisor: int = 1
    """1, 2, 4 or 8: the decoded picture has this fraction of the full size, rounded up."""
    width: int = 0
    """Of the decoded picture in pixels, before it is turned upright."""
    height: int = 0


def plan_decode(header: PhotoHeader, least_side: int = 0) -> DecodePlan:
    """Choose decoder and size.

    A JPEG can be decoded at a fraction of its size by leaving out high DCT coefficients: less arithmetic, and eight to
    sixty times fewer pixels to move. Only halves, quarters and eighths are chosen: libjpeg-turbo has vector code for
    these; its 3/8, 5/8, 6/8 and 7/8 are scalar and slower than decoding everything (10 megapixels: 21 ms whole, 33 ms
    at 5/8, 13 ms at 4/8).

    Args:
        header: from `read_header`.
        least_side: neither side may fall below this many pixels, unless the photo is smaller; 0 asks for full size.

    Example: 3872x2592 with `least_side` 512 is decoded at a quarter, 968x648; with 700, at a half.
    """
    divisor = 1
    if header.format == "JPEG" and least_side > 0:
        short = min(header.width, header.height)
        divisor = next((d for d in (8, 4, 2) if -(-short // d) >= least_side), 1)
    decoder: Literal["libjpeg-turbo", "opencv", "pillow"] = "opencv"
    if header.format == "JPEG":
        decoder = "libjpeg-turbo"
    elif header.format == "JPEG2000":
        # Pillow carries OpenJPEG on every platform; OpenCV's builds differ.
        decoder = "pillow"
    return DecodePlan(decoder, divisor, -(-header.width // divisor), -(-header.height // divisor))
