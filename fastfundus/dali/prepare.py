"""`prepare` with DALI as decoder and the ragged kernel as scissors; all else is the code of the CPU's `prepare`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastfundus.dali.decode import DaliDecoder, RaggedPhotos, sound_jpeg
from fastfundus.errors import PhotoError
from fastfundus.kernels.ops import sample_ragged
from fastfundus.photo.field import Field
from fastfundus.photo.file import read_photo
from fastfundus.photo.header import PhotoHeader
from fastfundus.photo.plan import plan_decode
from fastfundus.photo.prepare import (
    PreparedPhoto,
    crop_window,
    finish,
    known_of,
    least_side,
    look_at,
    plan_for_crop,
    prepare_bytes,
)
from fastfundus.photo.quality import QUALITY_PX
from fastfundus.photo.resample import shrink
from fastfundus.spec import PreprocessSpec

__all__ = ["DaliPreparer"]


@dataclass(frozen=True, slots=True)
class _Crop:
    """What is to be cut out of a photo."""

    known: PreparedPhoto
    """Its window is what is cut out."""
    found: Field | None
    to_full: float


class DaliPreparer:
    """Prepares groups of files; called by `data.build_cache`.

    Args:
        spec: what to make of each photo.
        decoder: decodes whole photos; a group has at most its batch size.
        threads: for reading, and for files that go to the CPU's decoder; None takes one a core.
    """

    def __init__(self, spec: PreprocessSpec, decoder: DaliDecoder, *, threads: int | None = None) -> None:
        self.spec, self.decoder = spec, decoder
        self._threads = threads or os.cpu_count() or 1

    def __call__(self, paths: Sequence[Path]) -> list[PreparedPhoto]:
        """Read and prepare files; never raises for what is in one, or for one that cannot be read."""
        with ThreadPoolExecutor(self._threads) as pool:
            results = list(pool.map(_read, paths))
            headers = pool.map(lambda result: sound_jpeg(result) if isinstance(result, bytes) else None, results)
            sound = {n: header for n, header in enumerate(headers) if header is not None and self._takes(header)}
            files = [result for n, result in enumerate(results) if n in sound and isinstance(result, bytes)]
            prepared = self._prepare_sound(files, list(sound.values()))
            done = {n: prepared[place] for place, n in enumerate(sound) if place in prepared}

            def finished(n: int) -> PreparedPhoto:
                result = results[n]
                if isinstance(result, PreparedPhoto):
                    return result
                return done[n] if n in done else prepare_bytes(result, self.spec)

            return list(pool.map(finished, range(len(paths))))

    def _takes(self, header: PhotoHeader) -> bool:
        """Whether a photo goes to DALI: strips would make the squares of a whole group too large."""
        plan = plan_decode(header, least_side(self.spec))
        return max(plan.width, plan.height) <= 4 * least_side(self.spec)

    def _prepare_sound(self, files: list[bytes], headers: list[PhotoHeader]) -> dict[int, PreparedPhoto]:
        """Results by position; files that are missing in it are left to the CPU's decoder."""
        photos, refused = self.decoder.decode(files)
        positions = [n for n in range(len(files)) if n not in refused]
        # The field is looked for in what a scaled decode would have given, so that both executors find the same.
        plans = [plan_decode(headers[n], least_side(self.spec)) for n in positions]
        results: dict[int, PreparedPhoto] = {}
        crops: dict[int, _Crop] = {}
        for place, picture in enumerate(_shrunk(photos, [plan.divisor for plan in plans])):
            n, plan, shape = positions[place], plans[place], tuple(photos.sizes[place].tolist())
            known = replace(known_of(files[n]), height_px=shape[0], width_px=shape[1])
            whole, scale = shrink(picture)
            try:
                small, found = look_at(whole, picture.shape)
            except PhotoError as error:
                results[n] = replace(known, status=error.status, reason=error.reason)
                continue
            if small is not whole:
                # A white margin is blackened at full size, too: the CPU's decoder does that.
                continue
            field = found if self.spec.field == "circle" else None
            side = crop_window(field, scale, picture.shape, self.spec)[2]
            better = plan_for_crop(headers[n], plan, side, self.spec)
            window = crop_window(
                field, scale * plan.divisor / better.divisor, _divided(shape, better.divisor), self.spec
            )
            left, top, side = (better.divisor * value for value in window)
            crops[place] = _Crop(replace(known, window=(left, top, side)), found, scale * plan.divisor)
        images = _cut(photos, crops, self.spec.size)
        shown = images if self.spec.size >= QUALITY_PX else _cut(photos, crops, QUALITY_PX)
        for (place, crop), image, large in zip(crops.items(), images, shown, strict=True):
            results[positions[place]] = finish(crop.known, image, large, crop.found, crop.to_full, self.spec)
        return results


def _read(path: Path) -> bytes | PreparedPhoto:
    try:
        return read_photo(path)
    except PhotoError as error:
        return PreparedPhoto(error.status, error.reason)


def _divided(shape: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    return tuple(-(-side // divisor) for side in shape)


def _shrunk(photos: RaggedPhotos, divisors: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Each photo averaged over blocks of its divisor: uint8 [H, W, 3]."""
    shapes = [_divided(shape, divisor) for shape, divisor in zip(photos.sizes.tolist(), divisors, strict=True)]
    if not shapes:
        return
    origin = np.zeros(len(shapes))
    scales = np.array(divisors, np.float64)
    squares = _sampled(photos, list(range(len(shapes))), origin, origin, scales, max(map(max, shapes)))
    for square, (height, width) in zip(squares, shapes, strict=True):
        yield np.ascontiguousarray(square[:height, :width])


def _cut(photos: RaggedPhotos, crops: dict[int, _Crop], size: int) -> NDArray[np.uint8]:
    """Windows by place, brought to `size`: uint8 [N, size, size, 3]."""
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
) -> NDArray[np.uint8]:
    """Upright squares of photos by the ragged kernel, rounded to grey levels: uint8 [N, size, size, 3] on the host."""
    geometry = torch.zeros(len(places), 2, 3)
    geometry[:, 0, 0] = geometry[:, 1, 1] = torch.from_numpy(scale)
    geometry[:, 0, 2], geometry[:, 1, 2] = torch.from_numpy(left), torch.from_numpy(top)
    colour = torch.eye(3, 4).repeat(len(places), 1, 1)
    chosen = photos.offsets[places], photos.sizes[places]
    values = sample_ragged(photos.pixels, *chosen, geometry, colour, size).permute(0, 2, 3, 1)
    return values.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
