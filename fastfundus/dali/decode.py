"""Encoded files to a ragged batch of pixels, by DALI; a file that it cannot decode costs no other file anything."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastfundus.errors import PhotoError
from fastfundus.photo.file import read_photo
from fastfundus.photo.header import PhotoHeader, read_header

__all__ = ["DaliDecoder", "RaggedPhotos", "Window", "decoding", "opened", "sound_jpeg"]

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


@pipeline_def(exec_dynamic=True)
def decoding(device: str, windows: bool, hw_decoder_load: float) -> Any:
    """The pipeline: encoded bytes to upright RGB.

    Args:
        device: "mixed" decodes on the GPU, "cpu" on the CPU.
        windows: decode only a window of each photo, given as "anchor" and "shape" (rows and columns, pixels).
        hw_decoder_load: share of the files that goes to the hardware JPEG units, 0 to 1; on a GPU only.
    """
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    options: dict[str, Any] = {"hw_decoder_load": hw_decoder_load} if device == "mixed" else {}
    # As libjpeg-turbo does by default: the CPU's decoder and this one then agree to the bit.
    options |= {"device": device, "output_type": types.RGB, "jpeg_fancy_upsampling": True}
    if not windows:
        return fn.decoders.image(encoded, **options)
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    return fn.decoders.image_slice(encoded, anchor, shape, axis_names="HW", **options)


class DaliDecoder:
    """Decodes batches; calls from several threads wait for each other.

    Args:
        device_id: number of the GPU; None decodes on the CPU.
        batch_size: most files of one call.
        threads: CPU threads; None takes one a core.
        hw_decoder_load: share of the files that goes to the GPU's hardware JPEG units, 0 to 1.
    """

    def __init__(
        self,
        *,
        device_id: int | None = None,
        batch_size: int = 16,
        threads: int | None = None,
        hw_decoder_load: float = 0.65,
    ) -> None:
        self.device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        self.batch_size = batch_size
        self._options = {
            "batch_size": batch_size,
            "num_threads": threads or os.cpu_count() or 1,
            "device_id": device_id,
            "prefetch_queue_depth": 1,
            "hw_decoder_load": hw_decoder_load,
            "device": "cpu" if device_id is None else "mixed",
        }
        self._pipelines: dict[bool, Any] = {}
        self._lock = threading.Lock()

    def decode(self, files: Sequence[bytes], windows: Sequence[Window] | None = None) -> tuple[RaggedPhotos, list[int]]:
        """Decode files, whole or in part.

        Args:
            files: sound JPEGs (`sound_jpeg`), at most `batch_size`.
            windows: for each file the part to decode, within the upright photo; None decodes all of them whole.

        Returns:
            The photos that could be decoded, in order, and the positions of the files that could not.

        Raises:
            ValueError: there are more files than `batch_size`.
        """
        if len(files) > self.batch_size:
            raise ValueError(f"files must be at most {self.batch_size}, the batch size; got {len(files)}")
        encoded = [np.frombuffer(data, np.uint8) for data in files]
        places = None if windows is None else np.array(windows, np.int32).reshape(-1, 4)
        with self._lock:
            photos, refused = self._halving(list(range(len(files))), encoded, places)
            # Copied before the next call may reuse DALI's memory.
            return RaggedPhotos.joined(photos, self.device), refused

    def _halving(
        self, positions: list[int], encoded: list[NDArray[np.uint8]], places: NDArray[np.int32] | None
    ) -> tuple[list[Tensor], list[int]]:
        """Decode; where a batch fails, its halves, down to the file that is at fault."""
        if not positions:
            return [], []
        try:
            return self._run(positions, encoded, places), []
        except RuntimeError:
            # DALI does not promise that a pipeline goes on after an error.
            self._pipelines.pop(places is not None)
        if len(positions) == 1:
            return [], positions
        middle = len(positions) // 2
        left, right = (self._halving(half, encoded, places) for half in (positions[:middle], positions[middle:]))
        return left[0] + right[0], left[1] + right[1]

    def _run(
        self, positions: list[int], encoded: list[NDArray[np.uint8]], places: NDArray[np.int32] | None
    ) -> list[Tensor]:
        windows = places is not None
        if windows not in self._pipelines:
            self._pipelines[windows] = decoding(windows=windows, **self._options)
            self._pipelines[windows].build()
        pipeline = self._pipelines[windows]
        pipeline.feed_input("encoded", [encoded[n] for n in positions])
        if places is not None:
            pipeline.feed_input("anchor", [places[n, :2] for n in positions])
            pipeline.feed_input("shape", [places[n, 2:] for n in positions])
        (decoded,) = pipeline.run()
        return [from_dlpack(decoded[n]) for n in range(len(positions))]
