"""What goes to DALI and what comes from it: files that are plainly sound, and photos of many sizes in one buffer."""

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

__all__ = ["RaggedPhotos", "Window", "opened", "sound_jpeg"]

Window = tuple[int, int, int, int]
"""Top, left, height and width in pixels of the upright photo."""

_STRAY_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd9\xff]")
_LONGEST_ZEROS = bytes(2048)
"""Black frames have runs of some hundred zeros in real cameras' files; holes in a file are pages of 4096 bytes."""


@dataclass(frozen=True, slots=True)
class RaggedPhotos:
    """Photos of many sizes in one buffer, as `kernels.ops.sample_ragged` takes them."""

    pixels: Tensor
    """[B] uint8 on the device that decoded, photos [H, W, 3] RGB."""
    offsets: Tensor
    """[N] int64 on the host, the first byte of each photo."""
    sizes: Tensor
    """[N, 2] int32 on the host, height and width of each photo."""

    @classmethod
    def joined(cls, photos: Sequence[Tensor], device: torch.device) -> RaggedPhotos:
        """Copy photos, uint8 [H, W, 3], into one buffer on a device."""
        sizes = torch.tensor([photo.shape[:2] for photo in photos], dtype=torch.int32).view(-1, 2)
        lengths = 3 * sizes.long().prod(dim=1)
        nothing = torch.zeros(0, dtype=torch.uint8, device=device)
        pixels = torch.cat([nothing, *(photo.reshape(-1).to(device) for photo in photos)])
        return cls(pixels, lengths.cumsum(0) - lengths, sizes)

    def followed_by(self, photos: Sequence[Tensor]) -> RaggedPhotos:
        """Put further photos behind these."""
        if not photos:
            return self
        more = RaggedPhotos.joined(photos, self.pixels.device)
        offsets = torch.cat([self.offsets, more.offsets + len(self.pixels)])
        return RaggedPhotos(torch.cat([self.pixels, more.pixels]), offsets, torch.cat([self.sizes, more.sizes]))


def sound_jpeg(data: bytes) -> PhotoHeader | None:
    """Read the header of a file that is plainly a sound JPEG; None where the CPU's decoder is to judge.

    DALI passes on made-up pixels where a file is damaged inside; three cheap signs of it are looked for: the end of the
    picture is missing, markers stand between pixels, or long runs of zeros, as an interrupted copy leaves them.
    """
    try:
        header = read_header(data)
    except PhotoError:
        return None
    if header.format != "JPEG" or header.jpeg is None or not data.endswith(b"\xff\xd9"):
        return None
    # Behind the frame: a thumbnail in the header has scans, too.
    scan = data.find(b"\xff\xda", header.jpeg.end)
    if scan < 0:
        return None
    if data.find(_LONGEST_ZEROS, scan) >= 0:
        return None
    # A progressive file has further headers between its scans.
    if header.jpeg.coding == "baseline" and _STRAY_MARKER.search(data, scan + 2, len(data) - 2):
        return None
    return header


def opened(path: Path) -> tuple[bytes | PhotoError, PhotoHeader | None]:
    """Read a file, or say why not; and its header, if it is one for DALI (`sound_jpeg`)."""
    try:
        data = read_photo(path)
    except PhotoError as error:
        return error, None
    return data, sound_jpeg(data)
