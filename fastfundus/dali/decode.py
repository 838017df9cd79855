"""Decoding of files into a ragged batch with DALI; a file that cannot be decoded does not affect the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastfundus.machine import usable_cores
from fastfundus.training.ragged import RaggedPhotos, Window

__all__ = ["MAX_THREADS", "DaliDecoder", "decoding"]


@pipeline_def(exec_dynamic=True)
def decoding(device: str, windows: bool, hw_decoder_load: float) -> Any:
    """Define the pipeline that decodes encoded bytes to upright RGB.

    Args:
        device: "mixed" decodes on the GPU, "cpu" on the CPU.
        windows: decode only a window of each photo, given by "anchor" and "shape" (rows and columns in pixels).
        hw_decoder_load: fraction of the files assigned to the hardware JPEG units, 0 to 1; GPU only.
    """
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    options: dict[str, Any] = {"hw_decoder_load": hw_decoder_load} if device == "mixed" else {}
    # This is libjpeg-turbo's default; with it, the CPU decoder and DALI give bit-identical pixels.
    options |= {"device": device, "output_type": types.RGB, "jpeg_fancy_upsampling": True}
    if not windows:
        return fn.decoders.image(encoded, **options)
    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    return fn.decoders.image_slice(encoded, anchor, shape, axis_names="HW", **options)


MAX_THREADS = 16
"""Each thread of DALI keeps pinned buffers of its own: 192 cores would pin gigabytes, and a GPU needs a dozen."""


class DaliDecoder:
    """Decoder of batches; concurrent calls from several threads are serialised.

    Args:
        device_id: index of the GPU; None decodes on the CPU.
        batch_size: maximum number of files per call.
        threads: number of CPU threads; None uses one per usable core, at most `MAX_THREADS`.
        hw_decoder_load: fraction of the files assigned to the GPU's hardware JPEG units, 0 to 1.
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
            "num_threads": threads or min(MAX_THREADS, usable_cores()),
            "device_id": device_id,
            "prefetch_queue_depth": 1,
            "hw_decoder_load": hw_decoder_load,
            "device": "cpu" if device_id is None else "mixed",
        }
        self._pipelines: dict[bool, Any] = {}
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    def decode(self, files: Sequence[bytes], windows: Sequence[Window] | None = None) -> tuple[RaggedPhotos, list[int]]:
        """Decode whole files or windows of them.

        Args:
            files: intact JPEGs (see `sound_jpeg`), at most `batch_size`.
            windows: the part of each file to decode, within the upright photo; None decodes all files completely.

        Returns:
            The decoded photos, in order, and the positions of the files that could not be decoded.

        Raises:
            ValueError: there are more than `batch_size` files.
        """
        if len(files) > self.batch_size:
            raise ValueError(f"the number of files must not exceed the batch size, {self.batch_size}, got {len(files)}")
        encoded = [np.frombuffer(data, np.uint8) for data in files]
        places = None if windows is None else np.array(windows, np.int32).reshape(-1, 4)
        with self._lock, self._copied_before_release():
            photos, refused = self._halving(list(range(len(files))), encoded, places)
            # Copy the photos before the next call, which may reuse DALI's memory.
            joined = RaggedPhotos.concatenate(photos, self.device)
            self._finish(joined)
            return joined, refused

    @contextmanager
    def _copied_before_release(self) -> Iterator[None]:
        """Put the copies on a stream of their own: waiting for them must not wait for the training step."""
        if self.device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            yield

    def _finish(self, joined: RaggedPhotos) -> None:
        """Wait until the copies are done: DALI reuses its memory as soon as its tensors are released.

        torch only queues the copies, and DALI orders the reuse after its own work, not after torch's.
        """
        if self._stream is not None:
            self._stream.synchronize()
            # The photos are used on the caller's stream, and must not be reused before it is done with them.
            joined.pixels.record_stream(torch.cuda.default_stream(self.device))

    def _halving(
        self, positions: list[int], encoded: list[NDArray[np.uint8]], places: NDArray[np.int32] | None
    ) -> tuple[list[Tensor], list[int]]:
        """Decode a batch; on failure decode its halves, recursively, to isolate the files that cannot be decoded."""
        if not positions:
            return [], []
        try:
            return self._run(positions, encoded, places), []
        except RuntimeError:
            # DALI does not guarantee that a pipeline is usable after an error.
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
