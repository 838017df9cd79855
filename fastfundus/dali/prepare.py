"""`prepare` with decoding by DALI and cropping by the ragged kernel; all else is shared with the CPU `prepare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.dali.decode import MAX_THREADS, DaliDecoder
from fastfundus.errors import PhotoError, TransientError
from fastfundus.kernels.ops import sample_ragged
from fastfundus.machine import usable_cores
from fastfundus.photo.decode_plan import DecodePlan, plan_decode
from fastfundus.photo.field import Field
from fastfundus.photo.header import PhotoHeader
from fastfundus.photo.isolation import prepare_isolated
from fastfundus.photo.prepare import (
    PreparedPhoto,
    crop_window,
    facts_of,
    finish,
    known_of,
    look_at,
    min_side,
    plan_for_crop,
    round_mask,
)
from fastfundus.photo.quality import QUALITY_PX
from fastfundus.photo.resample import shrink
from fastfundus.spec import PreprocessSpec
from fastfundus.training.ragged import RaggedPhotos, open_for_dali

__all__ = ["DaliPreparer"]


@dataclass(frozen=True, slots=True)
class _Sound:
    """A file that DALI decodes."""

    data: bytes
    header: PhotoHeader


@dataclass(frozen=True, slots=True)
class _Crop:
    """A crop to cut out of a photo."""

    known: PreparedPhoto
    """The photo so far; its `window` is the crop."""
    found: Field | None
    to_full: float


class DaliPreparer:
    """Prepares groups of files; called by `data.build_cache`.

    Args:
        spec: the preprocessing to apply to each photo.
        decoder: decoder of whole photos; groups must not exceed its batch size.
        threads: number of threads for reading files and for the CPU decoder; None uses one per usable core.
    """

    def __init__(self, spec: PreprocessSpec, decoder: DaliDecoder, *, threads: int | None = None) -> None:
        self.spec, self.decoder = spec, decoder
        self._threads = threads or min(MAX_THREADS, usable_cores())

    def __call__(self, paths: Sequence[Path]) -> list[PreparedPhoto]:
        """Read and prepare files; unreadable or damaged files do not raise but are reported in their results."""
        return self.prepare(paths)[0]

    def prepare(self, paths: Sequence[Path]) -> tuple[list[PreparedPhoto], dict[int, torch.Tensor]]:
        """Read and prepare files, and also return the crops that are on the decoder's device.

        Returns:
            The photos; and, by position, the crops of the photos that DALI decoded, uint8 [size, size, 3] on the
            device, equal to their `image`.
        """
        with ThreadPoolExecutor(self._threads) as pool:
            files = list(pool.map(partial(open_for_dali, listed=True), paths))
            sound = {
                n: _Sound(data, header)
                for n, (data, header) in enumerate(files)
                if isinstance(data, bytes) and header is not None and self._takes(header)
            }
            prepared, on_device = self._prepare_sound(list(sound.values()), pool)
            done = dict(zip(sound, prepared, strict=True))
            positions = list(sound)

            def finished(n: int) -> PreparedPhoto:
                data, _ = files[n]
                if isinstance(data, PhotoError):
                    return PreparedPhoto(data.status, data.reason)
                try:
                    return done.get(n) or prepare_isolated(data, self.spec)
                except TransientError as error:
                    return PreparedPhoto(error.status, error.reason)

            images = {positions[place]: image for place, image in on_device.items()}
            return list(pool.map(finished, range(len(paths)))), images

    def _takes(self, header: PhotoHeader) -> bool:
        """Return whether DALI decodes a photo; narrow strips would make the squares of the whole group too large."""
        plan = plan_decode(header, min_side(self.spec))
        return max(plan.width, plan.height) <= 4 * min_side(self.spec)

    def _prepare_sound(
        self, files: list[_Sound], pool: Executor
    ) -> tuple[list[PreparedPhoto | None], dict[int, torch.Tensor]]:
        """Return a result for each file, None if it needs the CPU decoder; and, by position, images on the device."""
        photos, refused = self.decoder.decode([file.data for file in files])
        positions = [n for n in range(len(files)) if n not in refused]
        # Detect the field in an image like that of a scaled decode, so that both backends find the same field.
        plans = [plan_decode(files[n].header, min_side(self.spec)) for n in positions]
        pictures = _shrunk(photos, [plan.divisor for plan in plans])
        shapes = [tuple(shape) for shape in photos.sizes.tolist()]
        seen = list(pool.map(self._find_crop, (files[n] for n in positions), plans, shapes, pictures))
        crops = {place: crop for place, crop in enumerate(seen) if isinstance(crop, _Crop)}
        kept = _cut(photos, crops, self.spec.size)
        images = kept.cpu().numpy()
        shown = images if self.spec.size >= QUALITY_PX else _cut(photos, crops, QUALITY_PX).cpu().numpy()

        def finished(crop: _Crop, image: NDArray[np.uint8], large: NDArray[np.uint8]) -> PreparedPhoto:
            return finish(crop.known, image, large, crop.found, crop.to_full, self.spec)

        results: list[PreparedPhoto | None] = [None] * len(files)
        for place, result in enumerate(seen):
            if isinstance(result, PreparedPhoto):
                results[positions[place]] = result
        for place, result in zip(crops, pool.map(finished, crops.values(), images, shown), strict=True):
            results[positions[place]] = result
        if self.spec.field == "circle" and self.spec.mask_outside and len(kept):
            # `finish` masks the images on the host in the same way.
            round_fields = [row for row, crop in enumerate(crops.values()) if crop.found is not None]
            kept[round_fields] &= torch.from_numpy(round_mask(self.spec.size)).to(kept.device)
        return results, {positions[place]: kept[row] for row, place in enumerate(crops)}

    def _find_crop(
        self, file: _Sound, plan: DecodePlan, shape: tuple[int, ...], picture: NDArray[np.uint8]
    ) -> _Crop | PreparedPhoto | None:
        """Return the crop of a photo, or the result of a rejected photo; None if it needs the CPU decoder."""
        facts = facts_of(None, file.header)
        known = replace(known_of(file.data), height_px=shape[0], width_px=shape[1], facts=facts)
        whole, scale = shrink(picture)
        try:
            small, found = look_at(whole, picture.shape)
        except PhotoError as error:
            return replace(known, status=error.status, reason=error.reason)
        if small is not whole:
            # A white margin must be blackened at full size, too, which only the CPU path does.
            return None
        field = found if self.spec.field == "circle" else None
        side = crop_window(field, scale, picture.shape, self.spec)[2]
        better = plan_for_crop(file.header, plan, side, self.spec)
        window = crop_window(field, scale * plan.divisor / better.divisor, _divided(shape, better.divisor), self.spec)
        left, top, side = (better.divisor * value for value in window)
        return _Crop(replace(known, window=(left, top, side)), found, scale * plan.divisor)


def _divided(shape: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    return tuple(-(-side // divisor) for side in shape)


def _shrunk(photos: RaggedPhotos, divisors: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Yield each photo averaged over blocks of its divisor, as uint8 [H, W, 3]."""
    shapes = [_divided(shape, divisor) for shape, divisor in zip(photos.sizes.tolist(), divisors, strict=True)]
    if not shapes:
        return
    origin = np.zeros(len(shapes))
    scales = np.array(divisors, np.float64)
    squares = _sampled(photos, list(range(len(shapes))), origin, origin, scales, max(map(max, shapes))).cpu().numpy()
    for square, (height, width) in zip(squares, shapes, strict=True):
        yield np.ascontiguousarray(square[:height, :width])


def _cut(photos: RaggedPhotos, crops: dict[int, _Crop], size: int) -> torch.Tensor:
    """Return the crops resized to `size`, as uint8 [N, size, size, 3] on the device."""
    windows = [crop.known.window for crop in crops.values()]
    left, top, side = np.array(windows, np.float64).reshape(-1, 3).T
    return _sampled(photos, list(crops), left, top, side / size, size)


def _sampled(
    photos: RaggedPhotos,
    places: list[int],
    left: NDArray[np.float64],
    top: NDArray[np.float64],
    scale: NDArray[np.float64],
    size: int,
) -> torch.Tensor:
    """Sample unrotated squares of photos with the ragged kernel, rounded to grey levels: uint8 [N, size, size, 3]."""
    geometry = torch.zeros(len(places), 2, 3)
    geometry[:, 0, 0] = geometry[:, 1, 1] = torch.from_numpy(scale)
    geometry[:, 0, 2], geometry[:, 1, 2] = torch.from_numpy(left), torch.from_numpy(top)
    colour = torch.eye(3, 4).repeat(len(places), 1, 1)
    chosen = photos.offsets[places], photos.sizes[places]
    values = sample_ragged(photos.pixels, *chosen, geometry, colour, size).permute(0, 2, 3, 1)
    return values.round().clamp(0, 255).to(torch.uint8).contiguous()
