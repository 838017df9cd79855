"""Training batches: pixels from the cache, augmented and normalised by `sample`, prefetched one batch ahead.

The pixels stay in GPU memory if they fit there in addition to the training itself. Otherwise a thread reads them into
pinned memory and copies them while the GPU computes. On a CPU, this thread reads and samples them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfundus.kernels.ops import sample_ragged
from fastfundus.training.augment import Transforms

if TYPE_CHECKING:
    # Benchmarks on bare GPU machines lack the dependencies of the rest of `data`.
    from fastfundus.data.store import PhotoArray

__all__ = ["PhotoLoader", "balanced_order", "epoch_order", "prefetch", "split_batch"]

_Batch = TypeVar("_Batch")
_COPIES = 2
"""Number of pinned buffers: one is filled while the other is copied."""


def epoch_order(count: int, batch_size: int, *, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Shuffle an epoch into whole batches.

    Photos that do not fill a last batch are skipped in this epoch; a set smaller than a batch forms one batch.
    """
    return _whole_batches(np.random.default_rng([seed, epoch, 0x0D]).permutation(count), batch_size)


def _whole_batches(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    batch_size = min(batch_size, len(order))
    return [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]


def balanced_order(strata: NDArray[np.int64], batch_size: int, *, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Shuffle an epoch into whole batches in which all classes occur equally often over the epoch.

    Each class is traversed in shuffled order, repeatedly if it is rare: draw counts within a class differ by at most
    one. Like `epoch_order`, the result depends on seed and epoch only, so that ranks agree on it.

    Args:
        strata: [N] class of each photo.
        batch_size: photos per batch.
        seed: seed of the run.
        epoch: epoch, counted from 0.
    """
    generator = np.random.default_rng([seed, epoch, 0xBA])
    classes = np.unique(strata)
    drawn = []
    for number, value in enumerate(classes):
        # N photos in total: the first classes get one more if N is not a multiple of the number of classes.
        count = (len(strata) - number - 1) // len(classes) + 1
        own = np.flatnonzero(strata == value)
        rounds = [generator.permutation(own) for _ in range(-(-count // len(own)))]
        drawn.append(np.concatenate(rounds)[:count])
    return _whole_batches(generator.permutation(np.concatenate(drawn)), batch_size)


def split_batch(batch: NDArray[np.int64], accumulate: int) -> list[NDArray[np.int64]]:
    """Split a batch into at most `accumulate` non-empty parts of nearly equal size."""
    return [part for part in np.array_split(batch, accumulate) if len(part)]


class PhotoLoader:
    """Loader of augmented photos by row, from GPU memory or from the cache.

    Args:
        photos: uint8 [*, S, S, 3], the cache.
        rows: [N] rows that will be requested.
        device: device of the model.
        free_bytes: bytes of GPU memory that photos may fill; 0 reads them batch by batch.
    """

    def __init__(
        self, photos: PhotoArray, rows: NDArray[np.int64], device: torch.device, *, free_bytes: int = 0
    ) -> None:
        self._photos, self._device = photos, device
        self._side = photos.shape[1]
        self._bytes = 3 * self._side**2
        self._place: dict[int, int] = {}
        self._pixels: Tensor | None = None
        self.resident = 0 < len(rows) * self._bytes <= free_bytes
        if self.resident:
            self._place = {int(row): place for place, row in enumerate(rows)}
            self._pixels = torch.empty(len(rows) * self._bytes, dtype=torch.uint8, device=device)
            for place, row in enumerate(rows):
                own = self._pixels[place * self._bytes : (place + 1) * self._bytes]
                own.copy_(torch.from_numpy(np.array(photos[row]).reshape(-1)))
        self._pinned: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._turn = 0
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and not self.resident:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(
        self,
        rows: NDArray[np.int64],
        transforms: Transforms,
        size: int,
        *,
        nearest: bool = False,
    ) -> Callable[[], Tensor]:
        """Start to make a batch, in any thread. Call the result in the thread of the model to finish it.

        Args:
            rows: [B] rows of the cache.
            transforms: B geometry and colour matrices.
            size: side of the batch in pixels.
            nearest: use nearest-neighbour interpolation, as for masks.

        Returns:
            A function that returns [B, 3, size, size] float32, channels-last, on the device.
        """
        matrices = torch.from_numpy(transforms.geometry), torch.from_numpy(transforms.colour)
        sizes = torch.full((len(rows), 2), self._side, dtype=torch.int32)
        offsets = torch.arange(len(rows)) * self._bytes
        if self._pixels is not None:
            pixels, places = self._pixels, torch.tensor([self._place[int(row)] for row in rows])
            return lambda: sample_ragged(pixels, places * self._bytes, sizes, *matrices, size, nearest=nearest)
        if self._stream is None:
            host = self._read(rows, torch.empty(len(rows) * self._bytes, dtype=torch.uint8))
            made = sample_ragged(host, offsets, sizes, *matrices, size, nearest=nearest)
            return lambda: made
        copied, event = self._copy(rows)

        def finish() -> Tensor:
            # The model's stream waits for the copy; this thread does not.
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            copied.record_stream(stream)
            return sample_ragged(copied, offsets, sizes, *matrices, size, nearest=nearest)

        return finish

    def _read(self, rows: NDArray[np.int64], into: Tensor) -> Tensor:
        # Disks read a memory map faster in ascending than in shuffled order.
        pixels = into.numpy().reshape(len(rows), self._side, self._side, 3)
        for position in np.argsort(rows):
            pixels[position] = self._photos[rows[position]]
        return into

    def _copy(self, rows: NDArray[np.int64]) -> tuple[Tensor, torch.cuda.Event]:
        """Read photos into pinned memory and start the copy to the GPU."""
        needed, turn = len(rows) * self._bytes, self._turn
        self._turn = (turn + 1) % _COPIES
        if turn in self._pinned:
            self._pinned[turn][1].synchronize()  # this buffer's last copy, usually long finished
        # The stream selects its GPU; a new thread starts on the first one.
        with torch.cuda.stream(self._stream):
            buffer = self._pinned[turn][0] if turn in self._pinned else torch.empty(0)
            if len(buffer) < needed:
                buffer = torch.empty(needed, dtype=torch.uint8, pin_memory=True)
            copied = self._read(rows, buffer[:needed]).to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._pinned[turn] = buffer, event
        return copied, event


def prefetch(
    make: Callable[[NDArray[np.int64]], _Batch], batches: Sequence[NDArray[np.int64]]
) -> Generator[_Batch, None, None]:
    """Yield the result of `make` for each batch while a thread prefetches the next one."""
    with ThreadPoolExecutor(1, "loader") as pool:
        following = pool.submit(make, batches[0]) if batches else None
        for index in range(len(batches)):
            assert following is not None
            ready = following.result()
            if index + 1 < len(batches):
                following = pool.submit(make, batches[index + 1])
            yield ready
