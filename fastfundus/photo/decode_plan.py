"""The choice of decoder and scale for a photo, from its header and the required size; free of side effects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastfundus.photo.header import PhotoHeader

__all__ = ["DecodePlan", "plan_decode"]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How to decode one photo."""

    decoder: Literal["libjpeg-turbo", "opencv", "pillow"]
    """The decoder that is tried first."""
    divisor: int = 1
    """1, 2, 4 or 8: divides both sides of the full size, rounded up."""
    width: int = 0
    """Width of the decoded image in pixels, before the orientation is applied."""
    height: int = 0


def plan_decode(header: PhotoHeader, min_side: int = 0) -> DecodePlan:
    """Choose the decoder and the scale.

    A JPEG can be decoded at a fraction of its size by omitting high DCT coefficients, which saves arithmetic and moves
    four to sixty-four times fewer pixels. Only 1/2, 1/4 and 1/8 are used, because libjpeg-turbo has SIMD code for
    these. Its 3/8, 5/8, 6/8 and 7/8 are scalar and slower than full decoding (10 megapixels: 21 ms at full size, 33 ms
    at 5/8, 13 ms at 4/8).

    Args:
        header: The result of `read_header`.
        min_side: Lower limit for both sides in pixels, unless the photo itself is smaller; 0 selects full size.

    Example:
        3872x2592 with `min_side` 512 is decoded at 1/4, as 968x648; with 700, at 1/2.
    """
    divisor = 1
    if header.format == "JPEG" and min_side > 0:
        short = min(header.width, header.height)
        divisor = next((d for d in (8, 4, 2) if -(-short // d) >= min_side), 1)
    decoder: Literal["libjpeg-turbo", "opencv", "pillow"] = "opencv"
    if header.format == "JPEG":
        decoder = "libjpeg-turbo"
    elif header.format in ("JPEG2000", "HEIF", "AVIF"):
        # Pillow includes OpenJPEG and libavif on every platform; OpenCV builds differ. HEIC is a plug-in of Pillow.
        decoder = "pillow"
    return DecodePlan(decoder, divisor, -(-header.width // divisor), -(-header.height // divisor))
