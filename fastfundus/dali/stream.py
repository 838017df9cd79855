"""Training straight from camera files: of each photo no more is decoded than its crop shows.

Everything random is drawn on the host beforehand, as for training from a cache: the order of an epoch and two matrices
a photo. A stream is therefore the same on any device, with any number of ranks, and goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfundus.config import AugmentConfig
from fastfundus.dali.ragged import RaggedPhotos, Window, opened
from fastfundus.data.cache import PhotoCache
from fastfundus.errors import CheckpointError, PhotoError
from fastfundus.kernels.ops import sample_ragged
from fastfundus.photo.file import read_photo
from fastfundus.photo.prepare import decode_reduced
from fastfundus.spec import PreprocessSpec
from fastfundus.train.augment import draw_epoch
from fastfundus.train.feed import epoch_order, one_ahead

if TYPE_CHECKING:
    # Loaded by who has one: without DALI the CPU decodes.
    from fastfundus.dali.decode import DaliDecoder

__all__ = ["CameraPhoto", "CameraStream", "masked_outside", "window_of"]


_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class CameraPhoto:
    """A file and the square in it that `prepare` would have cut out."""

    path: Path
    left_px: float
    """Of the square's left edge in the upright photo; it may lie outside."""
    top_px: float
    side_px: float

    @classmethod
    def of_cache(cls, cache: PhotoCache, rows: NDArray[np.int64]) -> list[CameraPhoto]:
        """The files that rows of a cache were prepared from, and where in them their squares lie."""
        found = []
        for row in cache.manifest[rows].iter_rows(named=True):
            x, y, side = row["width_px"] / 2, row["height_px"] / 2, float(min(row["width_px"], row["height_px"]))
            if row["field_x_px"] is not None:
                x, y, side = row["field_x_px"], row["field_y_px"], 2 * row["field_radius_px"] * (1 + cache.spec.margin)
            found.append(cls(cache.source / row["path"], x - side / 2, y - side / 2, side))
        return found


@dataclass
class CameraStream:
    """Batches of augmented crops, in an order of their own for each epoch.

    Args:
        photos: the training set.
        spec: size, mean and std of the crops.
        augment: random changes.
        decoder: decodes windows of files; its batch size is at least `batch_size`. None leaves all files to the CPU,
            where each is decoded as small as its crop allows.
        batch_size: photos a batch and rank.
        seed: of order and changes.
        rank: of this process, 0 to world_size - 1.
        world_size: processes that share each epoch: every photo is met by one of them.
        dtype: of the crops.
        device: where crops are made without a decoder; else it is the decoder's.
    """

    photos: Sequence[CameraPhoto]
    spec: PreprocessSpec
    augment: AugmentConfig
    decoder: DaliDecoder | None
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU
    epoch: int = 0
    """The epoch that comes next, or is under way."""
    step: int = 0
    """Batches of it that have been handed out."""
    faults: dict[Path, str] = field(default_factory=dict)
    """Files that could not be decoded, with the reason; their batches are shorter by one."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be 0 to world_size - 1 = {self.world_size - 1}, got {self.rank}")
        if len(self.photos) < self.batch_size * self.world_size:
            raise ValueError(
                f"{len(self.photos)} photos do not fill a batch of {self.batch_size} on {self.world_size} ranks; lower "
                "batch_size"
            )
        if self.decoder is None:
            return
        self.device = self.decoder.device
        if self.batch_size > self.decoder.batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, the decoder takes {self.decoder.batch_size}; raise that"
            )

    def __len__(self) -> int:
        """Batches an epoch. Photos that do not fill a last one on every rank wait for another epoch."""
        return len(self.photos) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Yield what is left of the epoch, one batch ahead, then begin the next one.

        Yields:
            Crops [B, 3, S, S] of `dtype`, channels-last, on `device`, and [B] positions in `photos`.
        """
        order = epoch_order(len(self.photos), self.batch_size * self.world_size, seed=self.seed, epoch=self.epoch)
        geometry, colour = draw_epoch(self.augment, self.spec, len(self.photos), seed=self.seed, epoch=self.epoch)
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        left = [batch[own] for batch in order[self.step :]]
        with ThreadPoolExecutor(max(4, os.cpu_count() or 1), "read") as workers:

            def make(batch: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
                return self._batch(batch, geometry[batch], colour[batch], workers)

            # Closed before the workers are, which the batch under way may still need.
            with closing(one_ahead(make, left)) as batches:
                for ready in batches:
                    # Before it is handed out: who saves the state while working on this batch has had it.
                    self.step += 1
                    yield ready
        self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is; the batch that was handed out last counts as done."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: it was taken from a stream of other photos, batches, ranks or seed.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise CheckpointError(
                    f"the stream was saved with {name} {state[name]} and has {value} now: the photos left of an epoch "
                    "would not be the same; set it back, or begin a new run"
                )
        self.epoch, self.step = state["epoch"], state["step"]

    def _identity(self) -> dict[str, Any]:
        return {
            "photos": len(self.photos),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "seed": self.seed,
        }

    def _batch(
        self, batch: NDArray[np.int64], geometry: NDArray[np.float32], colour: NDArray[np.float32], workers: Executor
    ) -> tuple[Tensor, NDArray[np.int64]]:
        chosen = [self.photos[n] for n in batch]
        files: Sequence[Path | bytes | PhotoError] = [photo.path for photo in chosen]
        warps = [_to_camera(photo, warp, self.spec.size) for photo, warp in zip(chosen, geometry, strict=True)]
        windows: dict[int, Window] = {}
        taken: list[int] = []
        photos = RaggedPhotos.joined([], self.device)
        if self.decoder is not None:
            files, headers = zip(*workers.map(opened, (photo.path for photo in chosen)), strict=True)
            for n, header in enumerate(headers):
                # DALI's windows lie in the stored picture: a photo that is to be turned is left to the CPU.
                if header is not None and header.orientation == 1:
                    windows[n] = window_of(warps[n], self.spec.size, header.height, header.width)
            photos, refused = self.decoder.decode([files[n] for n in windows], list(windows.values()))
            taken = [n for place, n in enumerate(windows) if place not in refused]
            for n in taken:
                warps[n][:, 2] -= windows[n][1], windows[n][0]
        left = [n for n in range(len(batch)) if n not in taken]
        others: dict[int, Tensor] = {}
        for n, got in zip(left, workers.map(_reduced, [files[n] for n in left], [warps[n] for n in left]), strict=True):
            if isinstance(got, PhotoError):
                self.faults[chosen[n].path] = got.reason
                continue
            others[n] = torch.from_numpy(got[0])
            warps[n] /= got[1]
        photos = photos.followed_by(list(others.values()))
        # In the order of the batch.
        places = np.argsort([*taken, *others])
        ready = sorted([*taken, *others])
        matrices = torch.from_numpy(np.array([warps[n] for n in ready], np.float32).reshape(-1, 2, 3))
        tints = torch.from_numpy(colour[ready])
        crops = sample_ragged(
            photos.pixels, photos.offsets[places], photos.sizes[places], matrices, tints, self.spec.size, self.dtype
        )
        if self.spec.mask_outside:
            crops = masked_outside(crops, geometry[ready], tints, self.spec.size)
        return crops, batch[ready]


def _reduced(file: Path | bytes | PhotoError, warp: NDArray[np.float64]) -> tuple[NDArray[np.uint8], int] | PhotoError:
    """Decode a photo as small as its crop allows, so that a pixel of the crop still spans one of the photo."""
    try:
        if isinstance(file, PhotoError):
            return file
        data = read_photo(file) if isinstance(file, Path) else file
        return decode_reduced(data, float(np.hypot(warp[:, 0], warp[:, 1]).min()))
    except PhotoError as error:
        return error


def masked_outside(crops: Tensor, geometry: NDArray[np.float32], colour: Tensor, size: int) -> Tensor:
    """Blacken what lies outside the field's circle, as the pixels of a cache are: text must not become a feature.

    On each row of a crop the circle is one stretch of columns: its ends solve a quadratic equation.

    Args:
        crops: [B, 3, S, S], channels-last; written to.
        geometry: [B, 2, 3], output positions to positions in the prepared crop.
        colour: [B, 3, 4], whose last column is what black becomes.
        size: S.
    """
    linear, shift = geometry[:, :, :2].astype(np.float64), geometry[:, :, 2] - size / 2
    centres = np.arange(size) + 0.5
    # From the circle's centre to where each row begins, [B, S, 2], and a step along the row, [B, 1, 2].
    begin, step = centres[:, None] * linear[:, None, :, 1] + shift[:, None, :], linear[:, None, :, 0]
    along, length = (begin * step).sum(axis=2), np.square(step).sum(axis=2)
    inside = np.square(along) - length * (np.square(begin).sum(axis=2) - size**2 / 4)
    # A row that misses the circle has a stretch of nothing.
    reach = np.where(inside >= 0, np.sqrt(np.maximum(inside, 0)), -np.inf)
    ends = torch.from_numpy(np.stack([-along - reach, -along + reach]) / length).float().to(crops.device)[..., None]
    # As rows of 3 S values: where all three of a pixel stand side by side, this is one pass.
    rows = crops.permute(0, 2, 3, 1).view(len(crops), size, 3 * size)
    columns = torch.from_numpy(np.repeat(centres, 3)).float().to(crops.device)
    black = colour[:, :, 3].to(crops.device, crops.dtype).repeat(1, size)[:, None]
    torch.where((columns < ends[0]) | (columns > ends[1]), black, rows, out=rows)
    return crops


def _to_camera(photo: CameraPhoto, geometry: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    """Output positions to positions in the upright photo, from output positions to positions in the prepared crop."""
    scaled = geometry.astype(np.float64) * (photo.side_px / size)
    scaled[:, 2] += (photo.left_px, photo.top_px)
    return scaled


def window_of(geometry: NDArray[np.float64], size: int, height: int, width: int) -> Window:
    """The part of a photo that an output looks at.

    Args:
        geometry: [2, 3], output positions to positions in the photo.
        size: side of the output in pixels.
        height: of the photo in pixels.
        width: of the photo in pixels.

    Returns:
        Top, left, height and width: within the photo, and at least one pixel.
    """
    corners = geometry @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]], np.float64)
    # Half a box beyond the centres of the outermost pixels, and a pixel for interpolation.
    reach = np.hypot(geometry[:, 0], geometry[:, 1]) / 2 + 1
    low, high = np.floor(corners.min(axis=1) - reach), np.ceil(corners.max(axis=1) + reach)
    left, right = (int(value) for value in np.clip([low[0], high[0]], 0, width))
    top, bottom = (int(value) for value in np.clip([low[1], high[1]], 0, height))
    # Wholly outside: any pixel will do, the output is black.
    left, top = min(left, width - 1), min(top, height - 1)
    return top, left, max(bottom - top, 1), max(right - left, 1)
