"""Photos of different sizes in one buffer, and a check for files that a GPU may decode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastfundus.errors import PhotoError
from fastfundus.photo.file import read_photo
from fastfundus.photo.header import PhotoHeader, read_header

__all__ = ["RaggedPhotos", "Window", "open_for_dali", "sound_jpeg"]

Window = tuple[int, int, int, int]
"""Top, left, height and width in pixels of the upright photo."""

_STRAY_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd9\xff]")
_LONGEST_ZEROS = bytes(2048)
"""In camera files, black frames contain runs of a few hundred zeros, while holes in a file are pages of 4096 bytes."""


@dataclass(frozen=True, slots=True)
class RaggedPhotos:
    """Photos of different sizes in one buffer, in the format of `kernels.ops.sample_ragged`."""

    pixels: Tensor
    """[B] uint8 on the device of the decoder, photos [H, W, 3] RGB."""
    offsets: Tensor
    """[N] int64 on the host, the first byte of each photo."""
    sizes: Tensor
    """[N, 2] int32 on the host, height and width of each photo."""

    @classmethod
    def concatenate(cls, photos: Sequence[Tensor], device: torch.device) -> RaggedPhotos:
        """Copy photos, each uint8 [H, W, 3], into one buffer on a device."""
        sizes = torch.tensor([photo.shape[:2] for photo in photos], dtype=torch.int32).view(-1, 2)
        lengths = 3 * sizes.long().prod(dim=1)
        nothing = torch.zeros(0, dtype=torch.uint8, device=device)
        pixels = torch.cat([nothing, *(photo.reshape(-1).to(device) for photo in photos)])
        return cls(pixels, lengths.cumsum(0) - lengths, sizes)

    def followed_by(self, photos: Sequence[Tensor]) -> RaggedPhotos:
        """Return a batch with further photos appended."""
        if not photos:
            return self
        more = RaggedPhotos.concatenate(photos, self.pixels.device)
        offsets = torch.cat([self.offsets, more.offsets + len(self.pixels)])
        return RaggedPhotos(torch.cat([self.pixels, more.pixels]), offsets, torch.cat([self.sizes, more.sizes]))


def sound_jpeg(data: bytes) -> PhotoHeader | None:
    """Return the header of a file that is clearly an intact JPEG; None if the CPU decoder must decide.

    DALI silently fills in pixels if a file is damaged inside. Three signs of damage are checked, which are cheap to
    detect: a missing end-of-image marker, stray markers in the pixel data, and long runs of zeros, as left by an
    interrupted copy.
    """
    try:
        header = read_header(data)
    except PhotoError:
        return None
    if header.format != "JPEG" or header.jpeg is None or not data.endswith(b"\xff\xd9"):
        return None
    # Search after the frame header, because a thumbnail in the metadata has scans, too.
    scan = data.find(b"\xff\xda", header.jpeg.end)
    if scan < 0:
        return None
    if data.find(_LONGEST_ZEROS, scan) >= 0:
        return None
    # Progressive files legitimately have headers between their scans.
    if header.jpeg.coding == "baseline" and _STRAY_MARKER.search(data, scan + 2, len(data) - 2):
        return None
    return header


def open_for_dali(path: Path, *, listed: bool = False) -> tuple[bytes | PhotoError, PhotoHeader | None]:
    """Return the bytes of a file, or the error on reading it; and its header if DALI can decode it (`sound_jpeg`)."""
    try:
        data = read_photo(path, listed=listed)
    except PhotoError as error:
        return error, None
    return data, sound_jpeg(data)
