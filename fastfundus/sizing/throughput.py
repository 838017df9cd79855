"""Benchmarks of preparation, inference and screening on this machine, for choosing and tuning hardware."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.bundle import Bundle
from fastfundus.engines.runtime import Engine
from fastfundus.errors import DataError
from fastfundus.machine import usable_cores
from fastfundus.photo.memory import keep_memory
from fastfundus.records import SourcePhoto
from fastfundus.screening.decode_pool import DecodePool
from fastfundus.screening.pipeline import Timing, screen_photos
from fastfundus.spec import PreprocessSpec

__all__ = ["Rate", "engine_rate", "prepare_rate", "screen_rate"]

_MIN_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Rate:
    """Throughput with all cores: the median over several rounds, and the extremes."""

    photos_per_s: float
    least: float
    most: float
    rounds: int

    @property
    def core_seconds(self) -> float:
        """Core-seconds per photo, with all cores busy."""
        return usable_cores() / self.photos_per_s


def _timed(job: Callable[[], int], seconds: float) -> Rate:
    """Time repeated runs of a job that returns its number of photos; the first run is a warm-up and is not counted."""
    job()
    rates: list[float] = []
    ends = time.perf_counter() + seconds
    while len(rates) < _MIN_ROUNDS or time.perf_counter() < ends:
        began = time.perf_counter()
        photos = job()
        rates.append(photos / (time.perf_counter() - began))
    return Rate(float(np.median(rates)), min(rates), max(rates), len(rates))


def prepare_rate(photos: Sequence[SourcePhoto], spec: PreprocessSpec, seconds: float = 5.0) -> Rate:
    """Measure reading, decoding and cropping as `screen` does them, without inference.

    Args:
        photos: photos to prepare repeatedly; use a few dozen, or cores idle at the end of each round.
        spec: preprocessing to apply.
        seconds: minimum duration.

    Raises:
        DataError: none of them can be prepared.
    """
    keep_memory()
    cv2.setNumThreads(1)

    def job() -> int:
        decode_pool = DecodePool(spec)
        pending_photos = [decode_pool.begin(photo) for photo in photos]
        usable = [decode_pool.take(pending).image is not None for pending in pending_photos]
        decode_pool.close()
        if not any(usable):
            raise DataError(f"none of the {len(photos)} photos can be prepared, the first is {photos[0].path}")
        return len(photos)

    return _timed(job, seconds)


def engine_rate(engine: Engine, photos: NDArray[np.uint8], seconds: float = 5.0) -> Rate:
    """Measure an engine alone, on photos uint8 [N, S, S, 3] that are already in memory."""

    def job() -> int:
        engine.infer(photos)
        return len(photos)

    return _timed(job, seconds)


def screen_rate(photos: Sequence[SourcePhoto], bundle: Bundle, seconds: float = 5.0) -> tuple[Rate, Timing]:
    """Measure throughput from files to decisions; also return the timing of the last round.

    Start-up and writing results are excluded, so the rates are those of a long run.
    """
    timing = Timing()
    with bundle.load() as engine:

        def job() -> int:
            nonlocal timing
            timing = Timing()
            return sum(1 for _ in screen_photos(photos, bundle, timing, engine=engine))

        return _timed(job, seconds), timing
