"""Batches for training: pixels from the cache, changed and normalised by `sample`, one batch ahead of the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfundus.data.store import PhotoArray
from fastfundus.kernels.ops import sample

__all__ = ["balanced_order", "epoch_batches", "epoch_order", "one_ahead", "parts_of"]

_Batch = TypeVar("_Batch")


def epoch_order(count: int, batch_size: int, *, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Shuffle an epoch into whole batches.

    Photos that do not fill a last batch wait for another epoch; a set smaller than a batch is one batch.
    """
    return _whole_batches(np.random.default_rng([seed, epoch, 0x0D]).permutation(count), batch_size)


def _whole_batches(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    batch_size = min(batch_size, len(order))
    return [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]


def balanced_order(labels: NDArray[np.float64], batch_size: int, *, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Shuffle an epoch into whole batches in which, over the epoch, both classes come equally often.

    Each class is gone through in a shuffled order, again and again if it is the rarer one: no photo is shown twice more
    often than another of its class. Like `epoch_order` it depends on seed and epoch alone, so that ranks can share it.

    Args:
        labels: [N] 0 or 1, both of them present.
        batch_size: photos a batch.
        seed: of the run.
        epoch: counted from 0.
    """
    generator = np.random.default_rng([seed, epoch, 0xBA])
    half = len(labels) // 2
    drawn = []
    for value, count in ((0, len(labels) - half), (1, half)):
        own = np.flatnonzero(labels == value)
        rounds = [generator.permutation(own) for _ in range(-(-count // len(own)))]
        drawn.append(np.concatenate(rounds)[:count])
    return _whole_batches(generator.permutation(np.concatenate(drawn)), batch_size)


def parts_of(batch: NDArray[np.int64], accumulate: int) -> list[NDArray[np.int64]]:
    """Share out a batch into at most `accumulate` parts of nearly equal size, none of them empty."""
    return [part for part in np.array_split(batch, accumulate) if len(part)]


def epoch_batches(
    photos: PhotoArray,
    rows: NDArray[np.int64],
    targets: NDArray[np.float64],
    batches: list[NDArray[np.int64]],
    geometry: NDArray[np.float32],
    colour: NDArray[np.float32],
    *,
    size: int,
    device: torch.device,
    channels_last: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs [B, 3, size, size] float32 and targets [B, 1], while a thread makes the next batch.

    Args:
        photos: uint8 [*, S, S, 3], the cache.
        rows: [N] training rows of the cache.
        targets: [N] 0 or 1.
        batches: positions into `rows`, from `epoch_order`.
        geometry: [N, 2, 3], from `draw_epoch`.
        colour: [N, 3, 4], from `draw_epoch`.
        size: side of the inputs in pixels; the geometry is of the cache's side.
        device: where the model is.
        channels_last: memory layout of the inputs.
    """
    side = photos.shape[1]
    # Output positions are stretched to those of the cache's side first.
    geometry = geometry * np.array([side / size, side / size, 1], np.float32)

    def make(batch: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        # Reading a memory map in ascending order is kinder to disks than in shuffled order.
        sequence = np.argsort(rows[batch])
        pixels = np.empty((len(batch), side, side, 3), np.uint8)
        for position in sequence:
            pixels[position] = photos[rows[batch[position]]]
        images = torch.from_numpy(pixels).to(device, non_blocking=True)
        inputs = sample(images, torch.from_numpy(geometry[batch]), torch.from_numpy(colour[batch]), size)
        if not channels_last:
            inputs = inputs.contiguous()
        return inputs, torch.from_numpy(targets[batch]).float()[:, None].to(device, non_blocking=True)

    yield from one_ahead(make, batches)


def one_ahead(
    make: Callable[[NDArray[np.int64]], _Batch], batches: Sequence[NDArray[np.int64]]
) -> Generator[_Batch, None, None]:
    """Yield what `make` makes of each batch, while a thread makes the next one."""
    with ThreadPoolExecutor(1, "feed") as pool:
        following = pool.submit(make, batches[0]) if batches else None
        for index in range(len(batches)):
            assert following is not None
            ready = following.result()
            if index + 1 < len(batches):
                following = pool.submit(make, batches[index + 1])
            yield ready
