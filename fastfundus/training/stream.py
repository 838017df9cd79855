"""Training directly from camera files, decoding only the part of each photo that its crop shows.

All random values are drawn on the host in advance, as in training from a cache: the order of an epoch and two matrices
per photo. A stream is therefore identical on any device and with any number of ranks, and can be resumed exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastfundus.config import AugmentConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.errors import CheckpointError, PhotoError
from fastfundus.kernels.ops import sample_ragged
from fastfundus.machine import usable_cores
from fastfundus.photo.file import read_photo
from fastfundus.photo.prepare import decode_reduced
from fastfundus.spec import PreprocessSpec
from fastfundus.training.augment import Transforms, draw_epoch
from fastfundus.training.loader import epoch_order, prefetch
from fastfundus.training.ragged import RaggedPhotos, Window, open_for_dali

__all__ = ["CameraPhoto", "CameraStream", "WindowDecoder", "masked_outside", "source_window"]


_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class CameraPhoto:
    """A file, and the square that `prepare` would crop from it."""

    path: Path
    left_px: float
    """Left edge of the square in the upright photo; the square may extend beyond the photo."""
    top_px: float
    side_px: float

    @classmethod
    def of_cache(cls, cache: PhotoCache, rows: NDArray[np.int64]) -> list[CameraPhoto]:
        """Return the source files and squares of rows of a cache."""
        found = []
        for row in cache.manifest[rows].iter_rows(named=True):
            x, y, side = row["width_px"] / 2, row["height_px"] / 2, float(min(row["width_px"], row["height_px"]))
            if row["field_x_px"] is not None:
                x, y, side = row["field_x_px"], row["field_y_px"], 2 * row["field_radius_px"] * (1 + cache.spec.margin)
            found.append(cls(cache.source / row["path"], x - side / 2, y - side / 2, side))
        return found


class WindowDecoder(Protocol):
    """A decoder of JPEG windows, such as `dali.decode.DaliDecoder`."""

    device: torch.device
    """Device of the decoded photos."""
    batch_size: int
    """Largest number of files per call."""

    def decode(
        self, files: Sequence[bytes], windows: Sequence[Window] | None = None
    ) -> tuple[RaggedPhotos, dict[int, str]]:
        """Decode a window of each file.

        Returns:
            The photos that could be decoded, and a reason for each that could not, by position.
        """
        ...


@dataclass
class CameraStream:
    """Batches of augmented crops, in a different order in each epoch.

    Args:
        photos: the training set.
        spec: size, mean and std of the crops.
        augment: random augmentation.
        decoder: decodes windows of files; its batch size must be at least `batch_size`. With None, the CPU decodes all
            files, each at the smallest size that its crop allows.
        batch_size: number of photos per batch and rank.
        seed: seed of the order and the augmentation.
        rank: rank of this process, 0 to world_size - 1.
        world_size: number of processes that share each epoch; each photo is assigned to one of them.
        dtype: dtype of the crops.
        device: device on which crops are made without a decoder; with a decoder, its device is used.
    """

    photos: Sequence[CameraPhoto]
    spec: PreprocessSpec
    augment: AugmentConfig
    decoder: WindowDecoder | None
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU
    epoch: int = 0
    """The current epoch, or the next one between epochs."""
    step: int = 0
    """Number of batches of this epoch that have been yielded."""
    faults: dict[Path, str] = field(default_factory=dict)
    """Reasons for the files that could not be decoded; each makes its batch one photo shorter."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be 0 to world_size - 1 = {self.world_size - 1}, got {self.rank}")
        if len(self.photos) < self.batch_size * self.world_size:
            raise ValueError(
                f"{len(self.photos)} photos do not fill a batch of {self.batch_size} on {self.world_size} ranks; "
                "reduce batch_size"
            )
        if self.decoder is None:
            return
        self.device = self.decoder.device
        if self.batch_size > self.decoder.batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} exceeds the decoder's, {self.decoder.batch_size}; increase the latter"
            )

    def __len__(self) -> int:
        """Number of batches per epoch; photos that do not fill a last batch on every rank are left out of the epoch."""
        return len(self.photos) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Yield the remaining batches of the epoch, prefetching one batch, then advance to the next epoch.

        Yields:
            Crops [B, 3, S, S] of `dtype`, channels-last, on `device`, and [B] positions in `photos`.
        """
        order = epoch_order(len(self.photos), self.batch_size * self.world_size, seed=self.seed, epoch=self.epoch)
        transforms = draw_epoch(self.augment, self.spec, len(self.photos), seed=self.seed, epoch=self.epoch)
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        left = [batch[own] for batch in order[self.step :]]
        with ThreadPoolExecutor(max(4, usable_cores()), "read") as workers:

            def make(batch: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
                return self._batch(batch, transforms[batch], workers)

            # The generator must be closed before the workers, which the batch in progress may still need.
            with closing(prefetch(make, left)) as batches:
                for ready in batches:
                    # Incremented before the yield, so that a state saved while this batch is processed counts it.
                    self.step += 1
                    yield ready
        self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream; the batch yielded last counts as done."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a position returned by `state_dict`.

        Raises:
            CheckpointError: the number of photos, the batch size, the number of ranks or the seed differs.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise CheckpointError(
                    f"the stream was saved with {name} {state[name]} but now has {value}, so the remaining photos of "
                    "the epoch would differ; restore the old value or start a new run"
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
        self, batch: NDArray[np.int64], transforms: Transforms, workers: Executor
    ) -> tuple[Tensor, NDArray[np.int64]]:
        chosen = [self.photos[n] for n in batch]
        files: Sequence[Path | bytes | PhotoError] = [photo.path for photo in chosen]
        warps = [
            _to_camera(photo, warp, self.spec.size) for photo, warp in zip(chosen, transforms.geometry, strict=True)
        ]
        windows: dict[int, Window] = {}
        taken: list[int] = []
        photos = RaggedPhotos.concatenate([], self.device)
        if self.decoder is not None:
            files, headers = zip(*workers.map(open_for_dali, (photo.path for photo in chosen)), strict=True)
            for n, header in enumerate(headers):
                # DALI's windows refer to the stored image, so photos that must be rotated are left to the CPU.
                if header is not None and header.orientation == 1:
                    windows[n] = source_window(warps[n], self.spec.size, header.height, header.width)
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
        # Restore the order of the batch.
        places = np.argsort([*taken, *others])
        ready = sorted([*taken, *others])
        matrices = torch.from_numpy(np.array([warps[n] for n in ready], np.float32).reshape(-1, 2, 3))
        tints = torch.from_numpy(transforms.colour[ready])
        crops = sample_ragged(
            photos.pixels, photos.offsets[places], photos.sizes[places], matrices, tints, self.spec.size, self.dtype
        )
        if self.spec.mask_outside:
            crops = masked_outside(crops, transforms.geometry[ready], tints, self.spec.size)
        return crops, batch[ready]


def _reduced(file: Path | bytes | PhotoError, warp: NDArray[np.float64]) -> tuple[NDArray[np.uint8], int] | PhotoError:
    """Decode a photo as small as possible while each pixel of its crop still spans at least one decoded pixel."""
    try:
        if isinstance(file, PhotoError):
            return file
        data = read_photo(file) if isinstance(file, Path) else file
        return decode_reduced(data, float(np.hypot(warp[:, 0], warp[:, 1]).min()))
    except PhotoError as error:
        return error


def masked_outside(crops: Tensor, geometry: NDArray[np.float32], colour: Tensor, size: int) -> Tensor:
    """Blacken the pixels outside the circle of the field in place, as in a cache, so that text cannot become a feature.

    In each row of a crop the circle covers one interval of columns, whose ends are the roots of a quadratic equation.

    Args:
        crops: [B, 3, S, S], channels-last; modified in place.
        geometry: [B, 2, 3], maps output positions to positions in the prepared crop.
        colour: [B, 3, 4]; the last column is the output value of black.
        size: S.

    Returns:
        `crops`.
    """
    linear, shift = geometry[:, :, :2].astype(np.float64), geometry[:, :, 2] - size / 2
    centres = np.arange(size) + 0.5
    # Vector from the circle's centre to the start of each row, [B, S, 2], and the step along a row, [B, 1, 2].
    begin, step = centres[:, None] * linear[:, None, :, 1] + shift[:, None, :], linear[:, None, :, 0]
    along, length = (begin * step).sum(axis=2), np.square(step).sum(axis=2)
    inside = np.square(along) - length * (np.square(begin).sum(axis=2) - size**2 / 4)
    # The interval is empty in rows that do not intersect the circle.
    reach = np.where(inside >= 0, np.sqrt(np.maximum(inside, 0)), -np.inf)
    ends = torch.from_numpy(np.stack([-along - reach, -along + reach]) / length).float().to(crops.device)[..., None]
    # View each row as 3 S values, with the three channels of a pixel adjacent, so that one pass is sufficient.
    rows = crops.permute(0, 2, 3, 1).view(len(crops), size, 3 * size)
    columns = torch.from_numpy(np.repeat(centres, 3)).float().to(crops.device)
    black = colour[:, :, 3].to(crops.device, crops.dtype).repeat(1, size)[:, None]
    torch.where((columns < ends[0]) | (columns > ends[1]), black, rows, out=rows)
    return crops


def _to_camera(photo: CameraPhoto, geometry: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    """Convert a map from output to prepared-crop positions into one from output to upright-photo positions."""
    scaled = geometry.astype(np.float64) * (photo.side_px / size)
    scaled[:, 2] += (photo.left_px, photo.top_px)
    return scaled


def source_window(geometry: NDArray[np.float64], size: int, height: int, width: int) -> Window:
    """Return the window of a photo that an output depends on.

    Args:
        geometry: [2, 3], maps output positions to positions in the photo.
        size: side of the output in pixels.
        height: height of the photo in pixels.
        width: width of the photo in pixels.

    Returns:
        Top, left, height and width of the window, which is within the photo and has at least one pixel.
    """
    corners = geometry @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]], np.float64)
    # Add half a box around the outermost positions, and one pixel for interpolation.
    reach = np.hypot(geometry[:, 0], geometry[:, 1]) / 2 + 1
    low, high = np.floor(corners.min(axis=1) - reach), np.ceil(corners.max(axis=1) + reach)
    left, right = (int(value) for value in np.clip([low[0], high[0]], 0, width))
    top, bottom = (int(value) for value in np.clip([low[1], high[1]], 0, height))
    # If the output is completely outside the photo, it is black and any pixel can be decoded.
    left, top = min(left, width - 1), min(top, height - 1)
    return top, left, max(bottom - top, 1), max(right - left, 1)
